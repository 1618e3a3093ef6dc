#include <ATen/core/Tensor.h>
#include <retain/lib/dtype_name.h>
#include <retain/lib/io/checkpoint.h>
#include <retain/lib/io/sealed_file.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <filesystem>

namespace retain {
namespace {

struct Line {
  std::string name, type, shape, size;
  std::string text;  ///< Of several lines, shown below.
};

std::string human_size(double bytes) {
  constexpr std::array kUnits{"B", "KiB", "MiB", "GiB", "TiB"};
  size_t unit = 0;
  for (; bytes >= 1024 && unit + 1 < kUnits.size(); ++unit) bytes /= 1024;
  char buffer[32];
  std::snprintf(buffer, sizeof(buffer), unit == 0 ? "%.0f %s" : "%.1f %s", bytes, kUnits[unit]);
  return buffer;
}

std::string value_of(const Tensor& scalar) {
  if (!scalar.is_floating_point()) return std::to_string(scalar.item<int64_t>());
  char buffer[32];
  std::snprintf(buffer, sizeof(buffer), "%.9g", scalar.item<double>());
  return buffer;
}

std::string shape_of(const Tensor& tensor) {
  std::string result;
  for (const auto size : tensor.sizes())
    result += (result.empty() ? "" : ", ") + std::to_string(size);
  return "[" + result + "]";
}

Line entry_line(const CheckpointReader& file, const std::string& name, const std::string& label) {
  if (file.is_text(name)) {
    const auto text = file.text(name);
    const bool short_text = text.find('\n') == std::string::npos && text.size() <= 60;
    return {label, "text", short_text ? text : "", human_size(static_cast<double>(text.size())),
            short_text ? "" : text};
  }
  const auto tensor = file.tensor(name);
  return {label,
          dtype_name(tensor.scalar_type()),
          tensor.dim() == 0 ? value_of(tensor) : shape_of(tensor),
          human_size(static_cast<double>(tensor.nbytes())),
          {}};
}

/// One line an entry, and one for each group that opens before it, indented by depth.
std::vector<Line> lines_of(const CheckpointReader& file) {
  std::vector<Line> lines;
  std::string open;
  for (const auto& name : file.names()) {
    const auto slash = name.rfind('/');
    const auto group = slash == std::string::npos ? "" : name.substr(0, slash + 1);
    for (size_t at = 0, next; (next = group.find('/', at)) != std::string::npos; at = next + 1) {
      if (open.compare(0, next + 1, group, 0, next + 1) == 0) continue;
      const auto depth =
          std::count(group.begin(), group.begin() + static_cast<std::ptrdiff_t>(at), '/');
      lines.push_back(
          {std::string(2 * depth, ' ') + group.substr(at, next + 1 - at), {}, {}, {}, {}});
    }
    open = group;
    const auto depth = std::count(group.begin(), group.end(), '/');
    lines.push_back(
        entry_line(file, name, std::string(2 * depth, ' ') + name.substr(group.size())));
  }
  return lines;
}

std::string padded(const std::string& text, size_t width) {
  return text + std::string(std::max(width, text.size()) - text.size(), ' ');
}

std::string indented(const std::string& text) {
  std::string result = "    | ";
  for (const char c : text.substr(0, text.find_last_not_of('\n') + 1)) {
    result += c;
    if (c == '\n') result += "    | ";
  }
  return result + "\n";
}

}  // namespace

std::string describe(const std::string& path) {
  const CheckpointReader file(path, "");
  const auto lines = lines_of(file);
  size_t name_width = 0, type_width = 0, shape_width = 0;
  for (const auto& line : lines) {
    name_width = std::max(name_width, line.name.size());
    type_width = std::max(type_width, line.type.size());
    shape_width = std::max(shape_width, line.shape.size());
  }
  std::string result =
      path + ": " + file.kind() + " file, format version " + std::to_string(kFormatVersion) + ", " +
      human_size(static_cast<double>(std::filesystem::file_size(path))) + ", checksum good\n\n";
  for (const auto& line : lines) {
    auto row = padded(line.name, name_width);
    if (!line.type.empty()) {
      row += "  " + padded(line.type, type_width) + "  " + padded(line.shape, shape_width) + "  " +
             line.size;
    }
    row.resize(row.find_last_not_of(' ') + 1);
    result += row + "\n";
    if (!line.text.empty()) result += indented(line.text);
  }
  return result;
}

}  // namespace retain
