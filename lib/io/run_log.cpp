#include <ATen/ops/full.h>
#include <retain/lib/io/atomic_file.h>
#include <retain/lib/io/checkpoint.h>
#include <retain/lib/io/run_log.h>

#include <filesystem>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <stdexcept>

namespace retain {
namespace {

constexpr const char* kUpdate = "update";

std::string metrics_path(const std::string& folder) { return folder + "/metrics.jsonl"; }

std::string line_of(const NumberedRow& row) {
  nlohmann::ordered_json line{{kUpdate, row.first}};
  for (const auto& [name, value] : row.second)
    line[name] = value;  // NaN and Inf are dumped as null
  return line.dump() + "\n";
}

NumberedRow row_of(const std::string& line) {
  const auto object = nlohmann::ordered_json::parse(line);
  NumberedRow row{object.at(kUpdate).get<int64_t>(), {}};
  for (const auto& [name, value] : object.items()) {
    if (name == kUpdate) continue;
    row.second.emplace_back(
        name, value.is_null() ? std::numeric_limits<double>::quiet_NaN() : value.get<double>());
  }
  return row;
}

}  // namespace

std::vector<NumberedRow> read_metrics(const std::string& folder) {
  const auto path = metrics_path(folder);
  std::vector<NumberedRow> rows;
  if (!std::filesystem::exists(path)) return rows;
  const auto text = read_file(path);
  for (size_t begin = 0, end; (end = text.find('\n', begin)) != std::string::npos;
       begin = end + 1) {
    try {
      rows.push_back(row_of(text.substr(begin, end - begin)));
    } catch (const nlohmann::json::exception&) {
      throw std::runtime_error("cannot read \"" + path + "\": line " +
                               std::to_string(rows.size() + 1) + " is no row of metrics");
    }
  }
  return rows;
}

RunLog::RunLog(std::string folder, std::string config, int64_t resume_update)
    : folder_(std::move(folder)), config_(std::move(config)) {
  std::string kept;
  if (resume_update >= 0) {
    for (auto& row : read_metrics(folder_)) {
      if (row.first > resume_update) break;
      kept += line_of(row);
      rows_.push_back(std::move(row));
    }
  }
  write_file(metrics_path(folder_), {kept});
}

void RunLog::append(int64_t update, const MetricRow& row) {
  if (!rows_.empty() && update <= rows_.back().first) {
    throw std::invalid_argument("RunLog::append: update must be above " +
                                std::to_string(rows_.back().first) + ", got " +
                                std::to_string(update));
  }
  append_file(metrics_path(folder_), line_of({update, row}));
  rows_.emplace_back(update, row);
}

void RunLog::write_run() const {
  const auto count = static_cast<int64_t>(rows_.size());
  auto updates = at::full({count}, 0, at::kLong);
  std::vector<std::pair<std::string, at::Tensor>> columns;
  std::map<std::string, double*> values;
  for (int64_t i = 0; i < count; ++i) {
    const auto& [update, row] = rows_[static_cast<size_t>(i)];
    updates.mutable_data_ptr<int64_t>()[i] = update;
    for (const auto& [name, value] : row) {
      auto& column = values[name];
      if (!column) {
        columns.emplace_back(
            name, at::full({count}, std::numeric_limits<double>::quiet_NaN(), at::kDouble));
        column = columns.back().second.mutable_data_ptr<double>();
      }
      column[i] = value;
    }
  }
  CheckpointWriter writer(folder_ + "/run.h5", "run");
  writer.write("config", config_);
  writer.write(kUpdate, updates);
  for (const auto& [name, column] : columns) writer.write("metrics/" + name, column);
  writer.commit();
}

}  // namespace retain
