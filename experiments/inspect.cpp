#include <retain/experiments/commands.h>
#include <retain/experiments/options.h>
#include <retain/lib/io/checkpoint.h>

#include <iostream>

namespace retain {

int inspect_command(const Arguments& arguments) {
  Options options("retain inspect FILE",
                  "Shows every entry of a file of retain (checkpoint, state, run) after checking "
                  "each of its bytes.");
  Arguments files;
  options.add_positional("FILE", files, 1, "Such a file.");
  if (!options.parse(arguments)) return 0;
  if (files.empty()) throw UsageError("which FILE?");
  std::cout << describe(files.front());
  return 0;
}

}  // namespace retain
