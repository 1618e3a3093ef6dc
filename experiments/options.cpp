#include <retain/experiments/options.h>

#include <algorithm>
#include <iterator>
#include <sstream>

namespace retain {
namespace {

constexpr size_t kHelpColumn = 34;
constexpr size_t kHelpWidth = 110;

/// Lists come as tokens of a command line or as one line of an INI file.
Options::Values split(const Options::Values& values) {
  Options::Values words;
  for (std::string value : values) {
    std::replace(value.begin(), value.end(), ',', ' ');
    std::istringstream stream(value);
    words.insert(words.end(), std::istream_iterator<std::string>(stream), {});
  }
  return words;
}

/// `words` in lines that fit beside the option's name.
std::string wrap(const std::string& text, size_t indent, size_t width) {
  std::istringstream words(text);
  std::string wrapped, word;
  size_t column = indent;
  while (words >> word) {
    if (column > indent && column + 1 + word.size() > width) {
      wrapped += "\n" + std::string(indent, ' ');
      column = indent;
    }
    wrapped += (column > indent ? " " : "") + word;
    column += word.size() + (column > indent);
  }
  return wrapped;
}

}  // namespace

Options::Options(std::string synopsis, std::string summary)
    : synopsis_(std::move(synopsis)), summary_(std::move(summary)) {}

void Options::declare(Option option) {
  option.group = group_;
  options_.push_back(std::move(option));
}

template <class T, class Parse>
void Options::add_scalar(const std::string& name, T& target, const std::string& help, Parse parse) {
  auto get = [&target] {
    if constexpr (std::is_same_v<T, std::string>)
      return target;
    else if constexpr (std::is_same_v<T, bool>)
      return std::string(target ? "true" : "false");
    else if constexpr (std::is_same_v<T, double>)
      return to_text(target);
    else if constexpr (std::is_same_v<T, std::optional<int64_t>>)
      return target ? std::to_string(*target) : std::string();
    else
      return std::to_string(target);
  };
  declare({.name = name,
           .group = "",
           .help = help,
           .get = get,
           .set = [&target, parse](const Values& values) { target = parse(values.front()); }});
}

void Options::add(const std::string& name, int64_t& target, Range range, const std::string& help) {
  add_scalar(name, target, help,
             [=](const std::string& text) { return parse_integer(name, text, range); });
}

void Options::add(const std::string& name, uint64_t& target, const std::string& help) {
  add_scalar(name, target, help, [=](const std::string& text) {
    return static_cast<uint64_t>(parse_integer(name, text, {.min = 0}));
  });
}

void Options::add(const std::string& name, std::optional<int64_t>& target, Range range,
                  const std::string& help) {
  add_scalar(name, target, help,
             [=](const std::string& text) { return parse_integer(name, text, range); });
}

void Options::add(const std::string& name, double& target, Range range, const std::string& help) {
  add_scalar(name, target, help,
             [=](const std::string& text) { return parse_number(name, text, range); });
}

void Options::add(const std::string& name, bool& target, const std::string& help) {
  add_scalar(name, target, help, [=](const std::string& text) { return parse_bool(name, text); });
}

void Options::add(const std::string& name, std::string& target, const std::string& help) {
  add_scalar(name, target, help, [](const std::string& text) { return text; });
}

void Options::add(const std::string& name, Values& target, const std::string& help) {
  declare({.name = name,
           .group = "",
           .help = help,
           .kind = Kind::list,
           .get = [&target] { return join(target, " "); },
           .set = [&target](const Values& values) { target = split(values); }});
}

void Options::add(const std::string& name, std::vector<int64_t>& target, Range range,
                  const std::string& help) {
  auto get = [&target] {
    Values words;
    for (int64_t value : target) words.push_back(std::to_string(value));
    return join(words, " ");
  };
  auto set = [&target, name, range](const Values& values) {
    target.clear();
    for (const std::string& word : split(values))
      target.push_back(parse_integer(name, word, range));
  };
  declare({.name = name, .group = "", .help = help, .kind = Kind::list, .get = get, .set = set});
}

void Options::add(const std::string& name, std::map<std::string, std::string>& target,
                  const std::string& help) {
  auto get = [&target] {
    Values words;
    for (const auto& [key, value] : target) words.push_back(key + "=" + value);
    return join(words, " ");
  };
  auto set = [&target, name](const Values& values) {
    for (const std::string& word : split(values)) {
      const size_t equals = word.find('=');
      if (equals == 0 || equals == std::string::npos)
        throw UsageError("--" + name + " must be name=value, got \"" + word + "\"");
      target[word.substr(0, equals)] = word.substr(equals + 1);
    }
  };
  declare({.name = name, .group = "", .help = help, .kind = Kind::list, .get = get, .set = set});
}

void Options::add_flag(const std::string& name, bool& target, const std::string& help) {
  declare({.name = name,
           .group = "",
           .help = help,
           .kind = Kind::flag,
           .get = [] { return std::string(); },
           .set = [&target](const Values&) { target = true; },
           .in_config = false});
}

void Options::add_positional(const std::string& name, Values& target, int count,
                             const std::string& help) {
  declare({.name = name,
           .group = "",
           .help = help,
           .kind = Kind::list,
           .get = [] { return std::string(); },
           .set = [&target](const Values& values) { target = values; },
           .in_config = false,
           .positional = count});
}

const Options::Option& Options::find(const std::string& name) const {
  const auto found = std::find_if(options_.begin(), options_.end(),
                                  [&](auto& option) { return option.name == name; });
  if (found == options_.end()) throw UsageError(unknown_option(name, names()));
  return *found;
}

Options::Option& Options::find(const std::string& name) {
  return const_cast<Option&>(std::as_const(*this).find(name));
}

void Options::remove(const std::string& name) {
  std::erase_if(options_, [&](const Option& option) { return option.name == name; });
}

std::vector<std::string> Options::names() const {
  std::vector<std::string> names;
  for (const Option& option : options_) {
    if (option.positional == 0) names.push_back(option.name);
  }
  if (config_) names.push_back("config");
  names.push_back("help");
  return names;
}

std::vector<std::string> Options::config_names() const {
  std::vector<std::string> names;
  for (const Option& option : options_) {
    if (option.in_config) names.push_back(option.name);
  }
  return names;
}

std::string Options::ini() const {
  std::string text;
  for (const Option& option : options_) {
    const std::string value = option.in_config ? option.get() : "";
    if (value.find_first_of("#\n") != std::string::npos)
      throw UsageError("--" + option.name + " may hold neither # nor a line break, got \"" + value +
                       "\"");
    if (!value.empty()) text += option.name + " = " + value + "\n";
  }
  return text;
}

std::string Options::help() const {
  std::ostringstream text;
  text << wrap(summary_, 0, kHelpWidth) << "\n\nUsage: " << synopsis_ << "\n";
  auto line = [&](const std::string& name, const std::string& value, const std::string& help) {
    std::string left = "  " + name + (value.empty() ? "" : " " + value);
    left += left.size() + 2 > kHelpColumn ? "\n" + std::string(kHelpColumn, ' ')
                                          : std::string(kHelpColumn - left.size(), ' ');
    text << left << wrap(help, kHelpColumn, kHelpWidth) << "\n";
  };
  const std::string* title = nullptr;
  for (const Option& option : options_) {
    if (!title || *title != option.group)
      text << "\n" << option.group << (option.group.empty() ? "" : "\n");
    title = &option.group;
    line((option.positional > 0 ? "" : "--") + option.name, option.get(), option.help);
  }
  if (config_) line("--config", "FILE", "Options from an INI file; the command line wins.");
  line("--help", "", "This text.");
  return text.str();
}

}  // namespace retain
