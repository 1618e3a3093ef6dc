#pragma once

#include <retain/experiments/run_options.h>
#include <retain/experiments/stop_signal.h>

#include <string>

namespace retain {

/// Where a run folder keeps what a run is and where it stands.
std::string config_path(const std::string& folder);
std::string checkpoint_path(const std::string& folder);

/// Makes it and those above it. Throws UsageError if that cannot be.
void make_folder(const std::string& folder);

/// Whether a run was begun in `folder`.
bool holds_run(const std::string& folder);

/// What the run in `folder` was begun with: its checkpoint's word, before the first one
/// config.ini's.
RunOptions stored_run(const std::string& folder);

/// Throws UsageError, and names what differs, unless `wanted` may go on where `stored` stands:
/// updates (without anneal, and no fewer than are done), device, checkpoint_every and threads may
/// change.
void check_resumable(const std::string& folder, const RunOptions& stored, const RunOptions& wanted);

/// Trains `run` in `folder` to its last update, from the folder's checkpoint if there is one:
/// writes config.ini, metrics.jsonl, run.h5 and checkpoint.h5, and shows progress on stderr. After
/// a signal it finishes the update, saves and throws Stopped. One process at a time may train in a
/// folder.
std::unique_ptr<Trainer> train(const RunOptions& run, const std::string& folder,
                               const std::string& title, const StopSignal& stop);

}  // namespace retain
