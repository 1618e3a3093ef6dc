#include <retain/envs/catch.h>
#include <retain/envs/memory_chain.h>
#include <retain/envs/recall.h>
#include <retain/envs/registry.h>
#include <retain/envs/repeat_previous.h>
#include <retain/envs/rewrite.h>
#include <retain/envs/t_maze.h>
#include <retain/envs/vectorize.h>

#include <charconv>
#include <functional>
#include <stdexcept>

namespace retain {
namespace {

struct Entry {
  WorldInfo info;
  std::function<std::unique_ptr<VectorEnv>(const WorldOptions&, int64_t, uint64_t, int64_t)> make;
};

[[noreturn]] void unknown(const std::string& what, const std::string& name,
                          const std::vector<std::string>& valid) {
  std::string message = what + " \"" + name + "\"; valid:";
  for (const std::string& other : valid) message += (&other == &valid[0] ? " " : ", ") + other;
  throw std::invalid_argument(message);
}

[[noreturn]] void malformed(const std::string& option, const std::string& rule,
                            const std::string& text) {
  throw std::invalid_argument(option + " must be " + rule + ", got \"" + text + "\"");
}

void parse(const std::string& option, const std::string& text, int64_t& field) {
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, field);
  if (error != std::errc() || stop != end) malformed(option, "an integer", text);
}

void parse(const std::string& option, const std::string& text, bool& field) {
  if (text != "on" && text != "off") malformed(option, "on or off", text);
  field = text == "on";
}

void parse(const std::string& option, const std::string& text, Lengths& field) {
  for (Lengths value : {Lengths::fixed, Lengths::log_uniform}) {
    if (text != option_text(value)) continue;
    field = value;
    return;
  }
  malformed(option, "fixed or log_uniform", text);
}

template <class W>
W with_options(const std::string& name, W world, const WorldOptions& options) {
  const WorldOptions defaults = options_of(world);
  for (const auto& [option, text] : options) {
    if (defaults.count(option)) continue;
    std::vector<std::string> valid;
    for (const auto& entry : defaults) valid.push_back(entry.first);
    unknown(name + ": unknown option", option, valid);
  }
  world.visit_options([&](const char* option, auto& field) {
    const auto given = options.find(option);
    if (given != options.end()) parse(name + ": " + option, given->second, field);
  });
  return world;
}

template <class W>
Entry entry(const std::string& summary) {
  const std::string name = W{}.spec().name;
  const WorldOptions defaults = options_of(W{});
  return {{name, summary, {defaults.begin(), defaults.end()}},
          [name](const WorldOptions& options, int64_t num_envs, uint64_t seed, int64_t first) {
            return vectorize(with_options(name, W{}, options), num_envs, seed, first);
          }};
}

const std::vector<Entry>& entries() {
  static const std::vector<Entry> all = {
      entry<Catch>("catch a falling ball; needs no memory (bsuite)"),
      entry<MemoryChain>("keep bits along a chain and name the one asked for (bsuite)"),
      entry<Recall>("name at the end the cue shown at the start, after a gap of noise"),
      entry<RepeatPrevious>("repeat the suit of the card seen k - 1 steps before (POPGym)"),
      entry<Rewrite>("recall with cues that replace one another: only the last counts"),
      entry<TMaze>("walk a corridor and turn to the goal seen at its start (Ni et al. 2023)"),
  };
  return all;
}

}  // namespace

std::vector<WorldInfo> worlds() {
  std::vector<WorldInfo> infos;
  for (const Entry& entry : entries()) infos.push_back(entry.info);
  return infos;
}

std::unique_ptr<VectorEnv> make_vector_env(const std::string& world, const WorldOptions& options,
                                           int64_t num_envs, uint64_t seed,
                                           int64_t first_environment) {
  std::vector<std::string> valid;
  for (const Entry& entry : entries()) {
    if (entry.info.name == world) return entry.make(options, num_envs, seed, first_environment);
    valid.push_back(entry.info.name);
  }
  unknown("unknown world", world, valid);
}

}  // namespace retain
