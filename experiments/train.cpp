#include <retain/experiments/commands.h>
#include <retain/experiments/text.h>
#include <retain/experiments/training.h>

#include <iostream>

namespace retain {
namespace {

/// The stored run with what the user gave now laid over it.
RunOptions resumed_run(const Options& given, const std::string& folder) {
  const RunOptions stored = stored_run(folder);
  RunOptions wanted = stored;
  Options options("", "");
  add_run_options(options, wanted);
  for (const std::string& name : given.config_names()) {
    if (given.given(name)) options.set(name, {given.value(name)});
  }
  complete(wanted);
  check_resumable(folder, stored, wanted);
  return wanted;
}

std::string default_folder(RunOptions run) {
  complete(run);
  std::string name = "runs/" + title(run);
  for (char& letter : name) letter = letter == ' ' ? '-' : letter;
  return name;
}

}  // namespace

int train_command(const Arguments& arguments) {
  RunOptions run;
  std::string out;
  bool resume = false;
  Options options("retain train --world NAME --horizon H --core NAME --out FOLDER [options]",
                  "Trains a policy with memory. The run's folder holds config.ini (run it again "
                  "with --config), "
                  "metrics.jsonl, run.h5 and checkpoint.h5. SIGINT and SIGTERM finish the update, "
                  "save and exit with "
                  "130 and 143; --resume goes on from the checkpoint as if nothing had happened, "
                  "also after a crash.");
  add_run_options(options, run);
  options.add("out", out, "The run's folder; default: runs/WORLD-HORIZON-CORE-seed-SEED.");
  options.exclude_from_config("out");
  options.add_flag("resume", resume, "Go on with the run in --out; begin it if there is none.");
  options.allow_config();
  if (!options.parse(arguments)) return 0;

  if (out.empty()) out = default_folder(run);
  if (!holds_run(out)) {
    complete(run);
    if (resume) std::cerr << "retain train: no run in " << out << " yet: beginning it\n";
  } else if (resume) {
    run = resumed_run(options, out);
  } else {
    throw UsageError("--out " + out +
                     " holds a run: --resume goes on with it, or choose another folder");
  }
  use_threads(run.threads);
  use_tf32(run.tf32);
  const StopSignal stop;
  const auto trainer = train(run, out, title(run), stop);
  std::cout << checkpoint_path(out) << ": " << trainer->updates() << " updates, "
            << short_count(static_cast<double>(trainer->env_steps())) << " env steps\n";
  return 0;
}

}  // namespace retain
