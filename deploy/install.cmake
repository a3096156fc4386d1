# cmake --install: the program, the static libraries with their headers, and a package for find_package(longfill) with
# longfill::engine (prefill in process) and longfill::client (gRPC client). Headers lie below include/longfill, so
# #include "runtime/engine/prefill_engine.h" reads the same as here.
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/longfill)
set(installed_libraries)
foreach(library base sparse cpu cuda parallel parallel_mpi parallel_nccl json_input pattern_file models search kv engine proto convert client)
  if(TARGET longfill_${library})
    list(APPEND installed_libraries longfill_${library})
    set_target_properties(longfill_${library} PROPERTIES EXPORT_NAME ${library})
  endif()
endforeach()

install(TARGETS ${installed_libraries} EXPORT longfill-targets ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(EXPORT longfill-targets NAMESPACE longfill:: DESTINATION ${package_dir})
install(DIRECTORY kernels parallel models runtime DESTINATION include/longfill
        FILES_MATCHING PATTERN "*.h" PATTERN "oracle" EXCLUDE)
if(TARGET longfill_proto)
  get_target_property(generated_dir longfill_proto LONGFILL_GENERATED_DIR)
  install(DIRECTORY ${generated_dir}/longfill DESTINATION include/longfill FILES_MATCHING PATTERN "*.h")
  install(DIRECTORY proto/longfill DESTINATION share/longfill/proto FILES_MATCHING PATTERN "*.proto")
endif()

configure_package_config_file(${CMAKE_CURRENT_LIST_DIR}/longfill-config.cmake.in
                              ${PROJECT_BINARY_DIR}/longfill-config.cmake INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/longfill-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/longfill-config.cmake ${PROJECT_BINARY_DIR}/longfill-config-version.cmake
        DESTINATION ${package_dir})
