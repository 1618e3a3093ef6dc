#include <retain/experiments/values.h>

#include <charconv>
#include <cmath>
#include <fstream>
#include <sstream>

namespace retain {
namespace {

std::string rule(const Range& range) {
  std::string text;
  if (range.min > -std::numeric_limits<double>::infinity()) {
    text += (range.open ? " > " : " >= ") + to_text(range.min);
  }
  if (range.max < std::numeric_limits<double>::infinity()) {
    text += (text.empty() ? " <= " : " and <= ") + to_text(range.max);
  }
  return text;
}

bool inside(double value, const Range& range) {
  return (range.open ? value > range.min : value >= range.min) && value <= range.max;
}

[[noreturn]] void reject(const std::string& name, const std::string& must,
                         const std::string& text) {
  throw UsageError("--" + name + " must be " + must + ", got \"" + text + "\"");
}

template <class T>
bool read_whole(const std::string& text, T& value) {
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  return error == std::errc() && stop == end;
}

}  // namespace

std::string to_text(double value) {
  char buffer[32];
  const auto result = std::to_chars(buffer, buffer + sizeof(buffer), value);
  return std::string(buffer, result.ptr);
}

double parse_number(const std::string& name, const std::string& text, Range range) {
  double value = 0;
  if (!read_whole(text, value) || !(std::abs(value) < std::numeric_limits<double>::infinity()) ||
      !inside(value, range)) {
    reject(name, "a number" + rule(range), text);
  }
  return value;
}

int64_t parse_integer(const std::string& name, const std::string& text, Range range) {
  int64_t value = 0;
  if (!read_whole(text, value) || !inside(static_cast<double>(value), range)) {
    reject(name, "a whole number" + rule(range), text);
  }
  return value;
}

bool parse_bool(const std::string& name, const std::string& text) {
  if (text != "true" && text != "false") reject(name, "true or false", text);
  return text == "true";
}

std::string read_text(const std::string& path) {
  std::ifstream file(path);
  std::ostringstream text;
  if (file.peek() != std::ifstream::traits_type::eof()) text << file.rdbuf();
  if (!file && !file.eof()) throw UsageError("cannot read " + path);
  return text.str();
}

}  // namespace retain
