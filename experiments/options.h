#pragma once

#include <retain/experiments/values.h>

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace retain {

/// The options of one subcommand, each declared once: read from INI files and from the command line
/// (which wins), explained by --help, written to config.ini. A declaration binds a variable, whose
/// value is the default. Whatever is unknown, malformed, out of range or given twice throws
/// UsageError naming it.
class Options {
 public:
  using Values = std::vector<std::string>;

  Options(std::string synopsis, std::string summary);

  /// Options declared from here on stand under `title` in --help.
  void group(const std::string& title) { group_ = title; }
  void add(const std::string& name, int64_t& target, Range range, const std::string& help);
  void add(const std::string& name, uint64_t& target, const std::string& help);
  void add(const std::string& name, std::optional<int64_t>& target, Range range,
           const std::string& help);
  void add(const std::string& name, double& target, Range range, const std::string& help);
  void add(const std::string& name, bool& target, const std::string& help);
  void add(const std::string& name, std::string& target, const std::string& help);
  void add(const std::string& name, Values& target, const std::string& help);
  void add(const std::string& name, std::vector<int64_t>& target, Range range,
           const std::string& help);
  /// name=value pairs: each occurrence adds one; the last of a name wins.
  void add(const std::string& name, std::map<std::string, std::string>& target,
           const std::string& help);
  /// --name alone; no part of config.ini.
  void add_flag(const std::string& name, bool& target, const std::string& help);
  /// Arguments without a name.
  void add_positional(const std::string& name, Values& target, int count, const std::string& help);
  /// Belongs to the command and not to what it computes: no part of config.ini.
  void exclude_from_config(const std::string& name) { find(name).in_config = false; }

  /// Takes an option away again.
  void remove(const std::string& name);

  /// Adds --config FILE. Keys under [section.NAME] go to `sections`.
  void allow_config(const std::string& section = "") { config_ = true, section_ = section; }

  /// Reads the command line and the INI file it names. False if --help was asked for and printed.
  bool parse(const Values& arguments);
  void parse_ini(const std::string& text, const std::string& where);
  void set(const std::string& name, const Values& values);

  bool given(const std::string& name) const { return given_.count(name) > 0; }
  std::string value(const std::string& name) const { return find(name).get(); }
  std::vector<std::string> config_names() const;
  const std::vector<std::pair<std::string, std::map<std::string, std::string>>>& sections() const {
    return sections_;
  }

  /// Every option that has a value; parse_ini() reads it back to the same values.
  std::string ini() const;
  std::string help() const;

 private:
  enum class Kind { value, list, flag };
  struct Option {
    std::string name, group, help;
    Kind kind = Kind::value;
    std::function<std::string()> get;
    std::function<void(const Values&)> set;
    bool in_config = true;
    int positional = 0;
  };
  using Occurrences = std::vector<std::pair<std::string, Values>>;

  void declare(Option option);
  template <class T, class Parse>
  void add_scalar(const std::string& name, T& target, const std::string& help, Parse parse);
  const Option& find(const std::string& name) const;
  Option& find(const std::string& name);
  std::vector<std::string> names() const;
  Occurrences parse_command_line(const Values& arguments) const;
  void apply(const Occurrences& occurrences, const std::string& where);
  void apply_section(const std::string& key, const Values& values, const std::string& where);

  std::string synopsis_, summary_, group_, section_;
  bool config_ = false;
  std::vector<Option> options_;
  std::set<std::string> given_;
  std::vector<std::pair<std::string, std::map<std::string, std::string>>> sections_;
};

}  // namespace retain
