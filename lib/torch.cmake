# Finds LibTorch and gives the target retain::torch.
#
# The wheel's own package file demands a CUDA toolkit as soon as the wheel was built with CUDA. This one
# does not: the libraries in the wheel are enough to run on a GPU, and the toolkit is only for kernels.

include(CMakeFindDependencyMacro)

find_path(RETAIN_TORCH_INCLUDE_DIR torch/library.h PATH_SUFFIXES include HINTS ${Torch_DIR}/../../..
          PATHS ${CMAKE_PREFIX_PATH} NO_CMAKE_FIND_ROOT_PATH)
foreach(prefix IN LISTS CMAKE_PREFIX_PATH)  # …/torch/share/cmake, as torch.utils.cmake_prefix_path says it
  if(NOT RETAIN_TORCH_INCLUDE_DIR AND EXISTS ${prefix}/../../include/torch/library.h)
    get_filename_component(include_dir ${prefix}/../../include ABSOLUTE)
    set(RETAIN_TORCH_INCLUDE_DIR ${include_dir} CACHE PATH "" FORCE)
  endif()
endforeach()
if(NOT RETAIN_TORCH_INCLUDE_DIR)
  message(FATAL_ERROR "retain: LibTorch not found. Name it: "
    "-DCMAKE_PREFIX_PATH=$(python3 -c 'import torch; print(torch.utils.cmake_prefix_path)')")
endif()
get_filename_component(RETAIN_TORCH_DIR ${RETAIN_TORCH_INCLUDE_DIR} DIRECTORY)

if(NOT TARGET retain::torch)
  add_library(retain::torch INTERFACE IMPORTED GLOBAL)
  target_include_directories(retain::torch SYSTEM INTERFACE
    ${RETAIN_TORCH_INCLUDE_DIR} ${RETAIN_TORCH_INCLUDE_DIR}/torch/csrc/api/include)
  target_compile_options(retain::torch INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-fopenmp>)  # at::parallel_for is sequential without it
  set(torch_libraries ${RETAIN_TORCH_DIR}/lib/libtorch_cpu.so ${RETAIN_TORCH_DIR}/lib/libc10.so)
  if(EXISTS ${RETAIN_TORCH_DIR}/lib/libtorch_cuda.so)
    list(APPEND torch_libraries ${RETAIN_TORCH_DIR}/lib/libtorch_cuda.so)
  endif()
  # Nothing of ours names a symbol of libtorch_cuda: it registers its kernels when it is loaded.
  target_link_libraries(retain::torch INTERFACE
    -Wl,--push-state,--no-as-needed ${torch_libraries} -Wl,--pop-state -Wl,--allow-shlib-undefined)
  file(GLOB openmp ${RETAIN_TORCH_DIR}/lib/libgomp*.so*)
  if(openmp)
    target_link_libraries(retain::torch INTERFACE ${openmp})
  else()
    target_link_libraries(retain::torch INTERFACE gomp)
  endif()
endif()
