#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace retain {

using MetricRow = std::vector<std::pair<std::string, double>>;

/// The metrics of a run: one JSON object a line in `<folder>/metrics.jsonl`, as the run goes, and the same
/// columns in `<folder>/run.h5` (written whole by write_run()).
class RunLog {
 public:
  /// Opens the log of a new run, or (resume_update ≥ 0) goes on with an old one and drops the rows after that update.
  RunLog(std::string folder, std::string config, int64_t resume_update = -1);
  void append(int64_t update, const MetricRow& row);  ///< Throws if the line cannot be written.
  void write_run() const;                             ///< "config" and one fp64 vector a metric, as a checkpoint file.
 private:
  std::string folder_;
  std::string config_;
  std::vector<std::pair<int64_t, MetricRow>> rows_;
};

}  // namespace retain
