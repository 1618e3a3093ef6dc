#include <fcntl.h>
#include <retain/experiments/progress.h>
#include <retain/experiments/training.h>
#include <retain/lib/io/atomic_file.h>
#include <retain/lib/io/run_log.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <iostream>

namespace retain {
namespace {

/// Held by the process that trains in a folder; the system takes it back however the process ends.
class FolderLock {
 public:
  explicit FolderLock(const std::string& folder)
      : file_(open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)) {
    if (file_ >= 0 && flock(file_, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
      close(file_);
      throw UsageError("--out " + folder + ": another process is training there");
    }
  }
  ~FolderLock() {
    if (file_ >= 0) close(file_);
  }
  FolderLock(const FolderLock&) = delete;
  FolderLock& operator=(const FolderLock&) = delete;

 private:
  int file_;
};

void save(const Trainer& trainer, const std::string& folder, const std::string& config) {
  CheckpointWriter writer(checkpoint_path(folder));
  writer.write("config", config);
  trainer.save(writer);
  writer.commit();
}

/// Throws if the run in `folder` has gone beyond the last update that is wanted.
void check_updates(const std::string& folder, int64_t done, int64_t wanted) {
  if (done <= wanted) return;
  throw UsageError("--updates " + std::to_string(wanted) + ": the run in " + folder + " has done " +
                   std::to_string(done));
}

double normalized_return(const EnvironmentSpec& spec, double mean_return) {
  return (mean_return - spec.chance_return) / (spec.best_return - spec.chance_return);
}

MetricRow metric_row(const TrainMetrics& metrics, const EnvironmentSpec& spec) {
  const PPOMetrics& ppo = metrics.ppo;
  return {{"env_steps", static_cast<double>(metrics.env_steps)},
          {"episodes", static_cast<double>(metrics.episodes)},
          {"mean_return", metrics.mean_return},
          {"normalized", normalized_return(spec, metrics.mean_return)},
          {"policy_loss", ppo.policy_loss},
          {"value_loss", ppo.value_loss},
          {"entropy", ppo.entropy},
          {"approx_kl", ppo.approx_kl},
          {"clip_fraction", ppo.clip_fraction},
          {"grad_norm", ppo.grad_norm},
          {"first_ratio_error", ppo.first_ratio_error},
          {"epochs", static_cast<double>(ppo.epochs)},
          {"rollout_seconds", metrics.rollout_seconds},
          {"learn_seconds", metrics.learn_seconds}};
}

ProgressStep progress_step(const Trainer& trainer, const TrainMetrics& metrics) {
  return {.updates = trainer.updates(),
          .env_steps = metrics.env_steps,
          .episodes = metrics.episodes,
          .mean_return = metrics.mean_return,
          .normalized = normalized_return(trainer.spec(), metrics.mean_return)};
}

}  // namespace

std::string config_path(const std::string& folder) { return folder + "/config.ini"; }
std::string checkpoint_path(const std::string& folder) { return folder + "/checkpoint.h5"; }

void make_folder(const std::string& folder) {
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) throw UsageError("--out " + folder + ": cannot make the folder: " + error.message());
}

bool holds_run(const std::string& folder) {
  return std::filesystem::exists(config_path(folder)) ||
         std::filesystem::exists(checkpoint_path(folder));
}

RunOptions stored_run(const std::string& folder) {
  const std::string checkpoint = checkpoint_path(folder);
  if (!std::filesystem::exists(checkpoint))
    return read_run(read_text(config_path(folder)), config_path(folder));
  return read_run(CheckpointReader(checkpoint).text("config"), checkpoint);
}

void check_resumable(const std::string& folder, const RunOptions& stored,
                     const RunOptions& wanted) {
  RunOptions there = stored, here = wanted;
  Options old_options("", ""), new_options("", "");
  add_run_options(old_options, there);
  add_run_options(new_options, here);
  std::vector<std::string> free = {"device", "checkpoint_every", "threads"};
  if (!stored.trainer.ppo.anneal) free.push_back("updates");  // the learning rate follows them
  std::vector<std::string> differences;
  for (const std::string& name : old_options.config_names()) {
    const std::string old_value = old_options.value(name), new_value = new_options.value(name);
    if (old_value == new_value || std::find(free.begin(), free.end(), name) != free.end()) continue;
    differences.push_back(name + " was " + old_value + ", not " + new_value);
  }
  if (!differences.empty())
    throw UsageError("--resume: the run in " + folder + " differs: " + join(differences, "; "));
  if (std::filesystem::exists(checkpoint_path(folder))) {
    const CheckpointReader reader(checkpoint_path(folder));
    check_updates(folder, reader.integer("progress/updates"), wanted.updates);
  }
}

std::unique_ptr<Trainer> train(const RunOptions& run, const std::string& folder,
                               const std::string& title, const StopSignal& stop) {
  auto trainer = make_trainer(run);
  make_folder(folder);
  const FolderLock lock(folder);
  const std::string config = to_ini(run);
  const bool resumed = std::filesystem::exists(checkpoint_path(folder));
  bool stored = false;  // the checkpoint holds these options
  if (resumed) {
    const CheckpointReader reader(checkpoint_path(folder));
    trainer->load(reader);
    stored = reader.text("config") == config;
  }
  check_updates(folder, trainer->updates(), run.updates);
  if (!stored) save(*trainer, folder, config);
  write_file(config_path(folder), {config});
  RunLog log(folder, config, resumed ? trainer->updates() : -1);
  Progress progress(std::cerr, ProgressStyle::of_stderr(), title, run.updates);
  progress.start(trainer->updates(), trainer->env_steps());
  while (trainer->updates() < run.updates && !stop.caught()) {
    const TrainMetrics metrics = trainer->update();
    log.append(trainer->updates(), metric_row(metrics, trainer->spec()));
    progress.show(progress_step(*trainer, metrics));
    if (trainer->updates() % run.checkpoint_every == 0) save(*trainer, folder, config);
  }
  progress.finish();
  save(*trainer, folder, config);
  log.write_run();
  if (trainer->updates() < run.updates) {
    throw Stopped{stop.caught(), "stopped after update " + std::to_string(trainer->updates()) +
                                     "; all is saved in " + folder + ", --resume goes on"};
  }
  return trainer;
}

}  // namespace retain
