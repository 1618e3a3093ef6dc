#include <retain/experiments/text.h>

#include <algorithm>
#include <cmath>
#include <cstdio>

namespace retain {

std::string short_count(double count) {
  const char* suffix = "";
  for (const char* next : {"k", "M", "G", "T"}) {
    if (std::abs(count) < 999.5) break;
    count /= 1000;
    suffix = next;
  }
  const int decimals = *suffix == '\0' || std::abs(count) >= 99.95 ? 0
                       : std::abs(count) >= 9.995                  ? 1
                                                                   : 2;
  return fixed(count, decimals) + suffix;
}

std::string short_time(double seconds) {
  const auto whole = static_cast<int64_t>(std::llround(std::max(0.0, seconds)));
  char text[32];
  if (whole < 60) {
    std::snprintf(text, sizeof(text), "%d s", static_cast<int>(whole));
  } else if (whole < 3600) {
    std::snprintf(text, sizeof(text), "%d:%02d", static_cast<int>(whole / 60),
                  static_cast<int>(whole % 60));
  } else {
    std::snprintf(text, sizeof(text), "%lld:%02d:%02d", static_cast<long long>(whole / 3600),
                  static_cast<int>(whole / 60 % 60), static_cast<int>(whole % 60));
  }
  return text;
}

std::string percent(double share) { return std::isnan(share) ? "-" : fixed(100 * share, 0) + " %"; }

std::string fixed(double value, int decimals) {
  if (std::isnan(value)) return "-";
  char text[64];
  std::snprintf(text, sizeof(text), "%.*f", decimals, value);
  const bool negative_zero =
      text[0] == '-' && std::string(text).find_first_not_of("-0.") == std::string::npos;
  return text + (negative_zero ? 1 : 0);
}

int64_t display_width(const std::string& text) {
  return std::count_if(text.begin(), text.end(), [](char byte) { return (byte & 0xC0) != 0x80; });
}

std::string table(const std::vector<std::vector<std::string>>& rows, size_t left) {
  std::vector<int64_t> widths;
  for (const auto& row : rows) {
    widths.resize(std::max(widths.size(), row.size()));
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], display_width(row[i]));
  }
  std::string text;
  for (const auto& row : rows) {
    std::string line;
    for (size_t i = 0; i < row.size(); ++i) {
      const std::string space(static_cast<size_t>(widths[i] - display_width(row[i])), ' ');
      line += (i > 0 ? "  " : "") + (i < left ? row[i] + space : space + row[i]);
    }
    text += line.substr(0, line.find_last_not_of(' ') + 1) + "\n";
  }
  return text;
}

bool is_out_of_memory(const std::string& message) {
  return message.find("can't allocate memory") != std::string::npos;
}

}  // namespace retain
