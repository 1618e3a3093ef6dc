#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>

// The program proper is a library that is loaded from here: LibTorch's OpenMP reads the environment
// when it is loaded, so what it is to find there must be set before.
int main(int argc, char** argv) {
  // Threads that spin while they wait slow the program several times over on a machine that is busy
  // with something else.
  if (!std::getenv("GOMP_SPINCOUNT")) setenv("OMP_WAIT_POLICY", "passive", false);

  void* program = dlopen("libretain_program.so", RTLD_NOW | RTLD_GLOBAL);
  using Main = int(int, char**);
  auto* run = program ? reinterpret_cast<Main*>(dlsym(program, "retain_main")) : nullptr;
  if (!run) {
    std::fprintf(stderr, "retain: %s\n", dlerror());
    return 1;
  }
  return run(argc, argv);
}
