# Finds and enables CUDA for the whole tree, or says what is missing. Included by the top CMakeLists.txt.
set(minimum_cuda 12.8)
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES "80-real;90")  # A100 and the like as machine code, Hopper, newer ones through its PTX
endif()
if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  find_program(LONGFILL_NVCC nvcc HINTS $ENV{CUDA_PATH}/bin PATHS /usr/local/cuda/bin)
  if(NOT LONGFILL_NVCC)
    message(FATAL_ERROR "LONGFILL_CUDA needs the CUDA toolkit ${minimum_cuda} or newer, and there is no nvcc on PATH, in CUDA_PATH "
                        "or in /usr/local/cuda. Install it (developer.nvidia.com/cuda-downloads), name it by "
                        "-DCMAKE_CUDA_COMPILER=.../nvcc, or build with -DLONGFILL_CUDA=OFF")
  endif()
  set(CMAKE_CUDA_COMPILER ${LONGFILL_NVCC})
endif()
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS minimum_cuda)
  message(FATAL_ERROR "LONGFILL_CUDA needs the CUDA toolkit ${minimum_cuda} or newer; ${CMAKE_CUDA_COMPILER} is "
                      "${CMAKE_CUDA_COMPILER_VERSION}")
endif()
find_package(CUDAToolkit ${minimum_cuda} REQUIRED)
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # the CMake of Debian 12 does not know that nvcc takes it
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
endif()
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)
if(CCACHE)
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${CCACHE})
endif()
set(CMAKE_INSTALL_RPATH_USE_LINK_PATH ON)  # an installed program finds cuBLASLt where the build did
