#include <c10/util/Exception.h>
#include <retain/experiments/commands.h>
#include <retain/experiments/names.h>
#include <retain/experiments/stop_signal.h>
#include <retain/experiments/text.h>
#include <torch/version.h>

#include <algorithm>
#include <iostream>
#include <new>

namespace retain {
namespace {

struct Command {
  std::string name;
  int (*run)(const Arguments&);
  std::string summary;
};

const std::vector<Command>& commands() {
  static const std::vector<Command> all = {
      {"train", train_command,
       "Train a policy with memory on a world; stop and resume it exactly."},
      {"eval", eval_command, "Play a checkpoint greedily and print its normalised accuracy."},
      {"horizon", horizon_command,
       "Train several cores at several horizons: one table, one picture."},
      {"bench", bench_command, "Measure the speed of training, or of one op, on this machine."},
      {"worlds", worlds_command, "List the worlds, what they ask of a memory, and their options."},
      {"cores", cores_command, "List the memory cores, their parameters and their state."},
      {"inspect", inspect_command, "Show what a file of retain holds."},
      {"compare", compare_command, "Say whether two files of retain are bit-equal."},
  };
  return all;
}

std::string version() {
  return "retain " RETAIN_VERSION " (LibTorch " + std::string(TORCH_VERSION) + ")\n";
}

std::string help() {
  std::vector<std::vector<std::string>> rows;
  for (const Command& command : commands()) rows.push_back({"  " + command.name, command.summary});
  return version() +
         "Recurrent memory for reinforcement learning.\n\nUsage: retain COMMAND [options]\n\n" +
         table(rows, 2) + "\nretain COMMAND --help explains one of them.\n";
}

const Command& find_command(const std::string& name) {
  std::vector<std::string> names;
  for (const Command& command : commands()) names.push_back(command.name);
  check_name("command", name, names);
  return *std::find_if(commands().begin(), commands().end(),
                       [&](const Command& command) { return command.name == name; });
}

int run_command(const Arguments& arguments) {
  if (arguments.empty()) throw UsageError("no command given; retain --help lists them");
  const std::string& name = arguments.front();
  Arguments rest(arguments.begin() + 1, arguments.end());
  if (name == "--version") {
    std::cout << version();
  } else if (name == "--help" || name == "-h" || (name == "help" && rest.empty())) {
    std::cout << help();
  } else if (name == "help") {
    return find_command(rest.front()).run({"--help"});
  } else {
    return find_command(name).run(rest);
  }
  return 0;
}

}  // namespace

int run_program(const Arguments& arguments) {
  const bool named = !arguments.empty() && !arguments.front().starts_with("-");
  const std::string who = "retain" + (named ? " " + arguments.front() : "") + ": ";
  // One line, whatever the message: what follows is a trace for developers.
  auto fail = [&](int code, const std::string& message) {
    std::cout.flush();
    std::cerr << who << message.substr(0, message.find('\n')) << std::endl;
    return code;
  };
  try {
    const int code = run_command(arguments);
    return std::cout.flush() ? code : fail(1, "cannot write to the standard output");
  } catch (const Stopped& stopped) {
    return fail(128 + stopped.signal, stopped.message);
  } catch (const UsageError& error) {
    return fail(2, error.what());
  } catch (const c10::Error& error) {
    const std::string message = error.what_without_backtrace();
    return fail(1, is_out_of_memory(message) ? "out of memory" : message);
  } catch (const std::bad_alloc&) {
    return fail(1, "out of memory");
  } catch (const std::exception& error) {
    return fail(1, error.what());
  }
}

}  // namespace retain

/// What the launcher calls.
extern "C" int retain_main(int argc, char** argv) {
  return retain::run_program({argv + 1, argv + argc});
}
