#include <retain/experiments/options.h>

#include <algorithm>
#include <boost/program_options.hpp>
#include <iostream>
#include <sstream>

namespace po = boost::program_options;

namespace retain {
namespace {

template <class Map>
auto& entry(Map& map, const std::string& name) {
  const auto found =
      std::find_if(map.begin(), map.end(), [&](auto& item) { return item.first == name; });
  return found != map.end()
             ? found->second
             : map.emplace_back(name, typename Map::value_type::second_type()).second;
}

std::string without_dashes(const std::string& name) {
  return name.substr(std::min(name.size(), name.find_first_not_of('-')));
}

}  // namespace

void Options::set(const std::string& name, const Values& values) {
  const Option& option = find(name);
  if (option.kind == Kind::value && values.size() != 1)
    throw UsageError("--" + name + " takes one value");
  option.set(values);
  given_.insert(name);
}

Options::Occurrences Options::parse_command_line(const Values& arguments) const {
  po::options_description description;
  po::positional_options_description positional;
  for (const Option& option : options_) {
    po::value_semantic* value =
        option.kind == Kind::flag   ? static_cast<po::value_semantic*>(new po::untyped_value(true))
        : option.kind == Kind::list ? po::value<Values>()->multitoken()
                                    : static_cast<po::value_semantic*>(po::value<std::string>());
    description.add_options()(option.name.c_str(), value);
    if (option.positional > 0) positional.add(option.name.c_str(), option.positional);
  }
  if (config_) description.add_options()("config", po::value<std::string>());
  Occurrences occurrences;
  try {
    namespace style = po::command_line_style;
    po::command_line_parser parser(arguments);
    parser.options(description)
        .style(style::allow_long | style::long_allow_adjacent | style::long_allow_next);
    if (positional.max_total_count() > 0) parser.positional(positional);
    for (const auto& option : parser.run().options) {
      if (option.string_key.empty())
        throw UsageError("unexpected argument \"" + option.value.at(0) + "\"");
      occurrences.emplace_back(option.string_key, option.value);
    }
  } catch (const po::unknown_option& error) {
    throw UsageError(unknown_option(without_dashes(error.get_option_name()), names()));
  } catch (const po::invalid_command_line_syntax& error) {
    const std::string name = "--" + without_dashes(error.get_option_name());
    throw UsageError(error.kind() == po::invalid_syntax::extra_parameter ? name + " takes no value"
                                                                         : name + " needs a value");
  } catch (const po::too_many_positional_options_error&) {
    throw UsageError("too many arguments");
  }
  return occurrences;
}

bool Options::parse(const Values& arguments) {
  for (const std::string& argument : arguments) {
    if (argument == "--help" || argument == "-h") {
      std::cout << help();
      return false;
    }
  }
  Occurrences occurrences = parse_command_line(arguments);
  for (const auto& [name, values] : occurrences) {
    if (name != "config") continue;
    if (!given_.insert(name).second) throw UsageError("--config is given twice");
    parse_ini(read_text(values.at(0)), values.at(0));
  }
  std::erase_if(occurrences, [](auto& occurrence) { return occurrence.first == "config"; });
  apply(occurrences, "");
  return true;
}

void Options::parse_ini(const std::string& text, const std::string& where) {
  std::istringstream stream(text);
  Occurrences occurrences;
  try {
    const po::options_description none;
    for (const auto& option : po::parse_config_file(stream, none, true).options) {
      if (!section_.empty() && option.string_key.starts_with(section_ + ".")) {
        apply_section(option.string_key.substr(section_.size() + 1), option.value, where);
      } else {
        occurrences.emplace_back(option.string_key, option.value);
      }
    }
  } catch (const po::invalid_config_file_syntax& error) {
    throw UsageError(where + ": a line must be name = value, got \"" + error.tokens() + "\"");
  } catch (const po::error& error) {
    throw UsageError(where + ": " + error.what());
  }
  apply(occurrences, where + ": ");
}

void Options::apply_section(const std::string& key, const Values& values,
                            const std::string& where) {
  const size_t dot = key.find('.');
  if (dot == std::string::npos)
    throw UsageError(where + ": " + section_ + "." + key + " must be [" + section_ + ".NAME]");
  const std::string name = key.substr(dot + 1);
  if (!entry(sections_, key.substr(0, dot)).emplace(name, values.at(0)).second)
    throw UsageError(where + ": [" + section_ + "." + key.substr(0, dot) + "] gives " + name +
                     " twice");
}

void Options::apply(const Occurrences& occurrences, const std::string& where) try {
  std::vector<std::pair<std::string, Values>> merged;
  for (const auto& [name, values] : occurrences) {
    const Option& option = find(name);
    const bool command_line_only = option.kind == Kind::flag || option.positional > 0;
    if (!where.empty() && command_line_only)
      throw UsageError(name + " belongs on the command line");
    Values& all = entry(merged, name);
    if (option.kind == Kind::value && !all.empty())
      throw UsageError("--" + name + " is given twice");
    all.insert(all.end(), values.begin(), values.end());
  }
  for (const auto& [name, values] : merged) set(name, values);
} catch (const UsageError& error) {
  throw UsageError(where + error.what());
}

}  // namespace retain
