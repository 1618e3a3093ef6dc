#pragma once

#include <string>
#include <vector>

namespace retain {

using Arguments = std::vector<std::string>;

// One function a subcommand: reads its arguments, prints its result on stdout and returns the exit
// code. They throw UsageError for what the user can put right by another command line.
int train_command(const Arguments& arguments);
int eval_command(const Arguments& arguments);
int horizon_command(const Arguments& arguments);
int bench_command(const Arguments& arguments);
int worlds_command(const Arguments& arguments);
int cores_command(const Arguments& arguments);
int inspect_command(const Arguments& arguments);
int compare_command(const Arguments& arguments);

/// The whole program: picks the subcommand and turns whatever it throws into one line on stderr and
/// an exit code: 0 done, 1 it failed, 2 the command line is wrong, 128 + n stopped by signal n.
int run_program(const Arguments& arguments);

}  // namespace retain
