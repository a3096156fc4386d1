# cmake -D SOURCE_DIR=... -D VERSION=... -D TEMPLATE=... -D OUTPUT=... -P version.cmake
# Runs at every build and writes OUTPUT only when the commit has changed, so that nothing else is rebuilt.
execute_process(COMMAND git -C ${SOURCE_DIR} rev-parse --short=12 HEAD
                OUTPUT_VARIABLE GIT_COMMIT OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE failed)
if(failed)
  set(GIT_COMMIT unknown)
endif()
configure_file(${TEMPLATE} ${OUTPUT} @ONLY)
