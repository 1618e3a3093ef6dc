#pragma once

#include <retain/experiments/names.h>

#include <cstdint>
#include <limits>
#include <string>

namespace retain {

/// The numbers an option takes: both ends belong to it, `min` not if `open`.
struct Range {
  double min = -std::numeric_limits<double>::infinity();
  double max = std::numeric_limits<double>::infinity();
  bool open = false;
};

/// A number as text and back, bit for bit. The parsers throw UsageError, which opens with `name`.
std::string to_text(double value);
double parse_number(const std::string& name, const std::string& text, Range range = {});
int64_t parse_integer(const std::string& name, const std::string& text, Range range = {});
bool parse_bool(const std::string& name, const std::string& text);

/// The whole of a text file. Throws UsageError if it cannot be read.
std::string read_text(const std::string& path);

}  // namespace retain
