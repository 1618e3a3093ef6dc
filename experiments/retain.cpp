#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace {

/// Every update frees tensors of many megabytes and asks for the same again. Memory that goes back
/// to the system in between comes again page by page, which takes as long as the arithmetic does.
void keep_freed_memory() {
#if defined(__GLIBC__)
  mallopt(M_MMAP_MAX, 0);
  mallopt(M_TRIM_THRESHOLD, -1);
  mallopt(M_ARENA_MAX, 1);  // those of other threads always give back
#endif
}

}  // namespace

// The program proper is a library that is loaded from here: LibTorch's OpenMP reads the environment
// when it is loaded, so what it is to find there must be set before.
int main(int argc, char** argv) {
  // Threads that spin while they wait slow the program several times over on a machine that is busy
  // with something else.
  if (!std::getenv("GOMP_SPINCOUNT")) setenv("OMP_WAIT_POLICY", "passive", false);

  keep_freed_memory();
  void* program = dlopen("libretain_program.so", RTLD_NOW | RTLD_GLOBAL);
  using Main = int(int, char**);
  auto* run = program ? reinterpret_cast<Main*>(dlsym(program, "retain_main")) : nullptr;
  if (!run) {
    std::fprintf(stderr, "retain: %s\n", dlerror());
    return 1;
  }
  return run(argc, argv);
}
