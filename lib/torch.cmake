# Finds LibTorch and makes the target retain::torch of it.
#
# The package file in the wheel wants a CUDA toolkit as soon as the wheel was built with CUDA. This one does not:
# the wheel's own libraries are enough to run on a GPU, a toolkit is needed only to compile kernels.

string(REPLACE ":" ";" torch_prefixes "${CMAKE_PREFIX_PATH};$ENV{CMAKE_PREFIX_PATH}")
if(RETAIN_TORCH_CONFIG_DIR AND NOT EXISTS ${RETAIN_TORCH_CONFIG_DIR}/TorchConfig.cmake)
  unset(RETAIN_TORCH_CONFIG_DIR CACHE)  # it has moved
endif()
find_path(RETAIN_TORCH_CONFIG_DIR TorchConfig.cmake HINTS ${Torch_DIR} ${RETAIN_BUILT_WITH_TORCH}
          PATHS ${torch_prefixes} PATH_SUFFIXES Torch share/cmake/Torch NO_DEFAULT_PATH)
if(NOT RETAIN_TORCH_CONFIG_DIR)
  string(CONCAT torch_not_found "LibTorch not found; name it with "
    "-DCMAKE_PREFIX_PATH=$(python3 -c 'import torch; print(torch.utils.cmake_prefix_path)')")
  return()
endif()
get_filename_component(torch_root ${RETAIN_TORCH_CONFIG_DIR}/../../.. ABSOLUTE)

if(NOT TARGET retain::torch)
  add_library(retain::torch INTERFACE IMPORTED GLOBAL)
  target_include_directories(retain::torch SYSTEM INTERFACE
    ${torch_root}/include ${torch_root}/include/torch/csrc/api/include)
  # Without OpenMP at::parallel_for, which is a template, runs on one thread.
  target_compile_options(retain::torch INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-fopenmp>)
  set(torch_libraries ${torch_root}/lib/libtorch_cpu.so ${torch_root}/lib/libc10.so)
  if(EXISTS ${torch_root}/lib/libtorch_cuda.so)
    list(APPEND torch_libraries ${torch_root}/lib/libtorch_cuda.so ${torch_root}/lib/libc10_cuda.so)
  endif()
  file(GLOB torch_openmp ${torch_root}/lib/libgomp*.so*)
  # No symbol of libtorch_cuda is named here: it registers its kernels when it is loaded.
  target_link_libraries(retain::torch INTERFACE
    -Wl,--push-state,--no-as-needed ${torch_libraries} -Wl,--pop-state
    -Wl,--allow-shlib-undefined ${torch_openmp})
  if(NOT torch_openmp)
    target_link_libraries(retain::torch INTERFACE gomp)
  endif()
endif()
