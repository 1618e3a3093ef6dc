#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace retain {

using MetricRow = std::vector<std::pair<std::string, double>>;
using NumberedRow = std::pair<int64_t, MetricRow>;  ///< The update, and what was measured in it.

/// The metrics of a run: one JSON object a line in `<folder>/metrics.jsonl`, as the run goes, and
/// the same columns in `<folder>/run.h5` (written whole by write_run()). Errors are
/// std::runtime_error of one line.
class RunLog {
 public:
  /// Opens the log of a new run and drops what an old one left there, or (resume_update ≥ 0) goes
  /// on with an old one and drops the rows after that update. `folder` must exist.
  RunLog(std::string folder, std::string config, int64_t resume_update = -1);

  /// Adds {"update": …, …} with one write; NaN and Inf become null. Updates must grow. Throws if
  /// the line cannot be written, and takes back what was.
  void append(int64_t update, const MetricRow& row);

  /// A checkpoint-format file of kind "run": "config" (text), "update" [n] int64 and
  /// "metrics/<name>" [n] float64, NaN where a row has no such metric.
  void write_run() const;

 private:
  std::string folder_;
  std::string config_;
  std::vector<NumberedRow> rows_;
};

/// The rows of `<folder>/metrics.jsonl` in the order written; none if there is no such file. null
/// reads as NaN. A last line without its end, as a killed run leaves it, is passed over; any other
/// bad line throws and is named.
std::vector<NumberedRow> read_metrics(const std::string& folder);

}  // namespace retain
