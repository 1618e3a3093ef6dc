#include <c10/util/Exception.h>
#include <retain/envs/vectorize.h>

#include <cstring>
#include <string>

// The bytes of a driver: mark, then named fields that must agree, then seed, counters, the current
// steps, the worlds themselves and a hash of all that. Little-endian, as every machine this runs
// on.

namespace retain {
namespace {

constexpr char kMark[] = "retain environments 2";

/// FNV-1a, 64 bits: one changed byte always shows.
uint64_t hash_of(const uint8_t* bytes, size_t size) {
  uint64_t hash = 0xcbf29ce484222325;
  for (size_t i = 0; i < size; ++i) hash = (hash ^ bytes[i]) * 0x100000001b3;
  return hash;
}

class ByteWriter {
 public:
  void raw(const void* data, size_t size) {
    const auto* bytes = static_cast<const uint8_t*>(data);
    bytes_.insert(bytes_.end(), bytes, bytes + size);
  }
  void number(uint64_t value) { raw(&value, sizeof value); }
  void block(const void* data, size_t size) {
    number(size);
    raw(data, size);
  }
  void text(const std::string& value) { block(value.data(), value.size()); }
  void seal() { number(hash_of(bytes_.data(), bytes_.size())); }
  std::vector<uint8_t> take() { return std::move(bytes_); }

 private:
  std::vector<uint8_t> bytes_;
};

class ByteReader {
 public:
  ByteReader(const uint8_t* data, size_t size, std::string who)
      : next_(data), end_(data + size), who_(std::move(who)) {}

  const uint8_t* raw(size_t size) {
    TORCH_CHECK(size <= static_cast<size_t>(end_ - next_), who_, ".load: the bytes are truncated");
    const uint8_t* here = next_;
    next_ += size;
    return here;
  }
  uint64_t number() {
    uint64_t value;
    std::memcpy(&value, raw(sizeof value), sizeof value);
    return value;
  }
  std::pair<const uint8_t*, size_t> block() {
    const size_t size = number();
    return {raw(size), size};
  }
  std::string text() {
    const auto [data, size] = block();
    return {reinterpret_cast<const char*>(data), size};
  }
  /// What seal() wrote over the bytes from `begin` to here.
  void check_seal(const uint8_t* begin) {
    const uint64_t hash = hash_of(begin, next_ - begin);
    TORCH_CHECK(number() == hash, who_, ".load: the bytes are damaged");
  }
  void finish() const {
    TORCH_CHECK(next_ == end_, who_, ".load: ", end_ - next_, " bytes too many");
  }

 private:
  const uint8_t* next_;
  const uint8_t* end_;
  std::string who_;
};

template <class T>
void agree(const std::string& who, const char* what, const T& here, const T& saved) {
  TORCH_CHECK(here == saved, who, ".load: ", what, ": ", here, " here, ", saved, " saved");
}

std::vector<Tensor*> parts(TimeSteps& steps) {
  std::vector<Tensor*> all = {&steps.observation, &steps.reward, &steps.discount, &steps.step_type};
  if (steps.legal_actions.defined()) all.push_back(&steps.legal_actions);
  return all;
}

}  // namespace

std::vector<uint8_t> BatchDriver::save() const {
  ByteWriter out;
  out.raw(kMark, sizeof kMark);
  out.text(spec_.name);
  out.text(spec_.options);
  out.number(num_envs_);
  out.number(spec_.observation_size);
  out.number(seed_);
  out.number(first_environment_);
  out.number(step_);
  TimeSteps steps = current_;
  for (const Tensor* part : parts(steps)) out.block(part->const_data_ptr(), part->nbytes());
  const std::vector<uint8_t> worlds = save_worlds();
  out.block(worlds.data(), worlds.size());
  out.seal();
  return out.take();
}

void BatchDriver::load(const std::vector<uint8_t>& bytes) {
  const std::string& who = spec_.name;
  ByteReader in(bytes.data(), bytes.size(), who);
  const bool marked =
      bytes.size() >= sizeof kMark && std::memcmp(in.raw(sizeof kMark), kMark, sizeof kMark) == 0;
  TORCH_CHECK(marked, who, ".load: these are not the bytes of saved environments");
  agree(who, "the world differs", spec_.name, in.text());
  agree(who, "the options differ", spec_.options, in.text());
  agree(who, "num_envs differs", static_cast<uint64_t>(num_envs_), in.number());
  agree(who, "observation_size differs", static_cast<uint64_t>(spec_.observation_size),
        in.number());
  const uint64_t seed = in.number(), first_environment = in.number(), step = in.number();
  std::vector<const uint8_t*> saved;
  for (const Tensor* part : parts(current_)) {
    const auto [data, size] = in.block();
    agree(who, "the size of the current steps differs", part->nbytes(), size);
    saved.push_back(data);
  }
  const auto [worlds, size] = in.block();
  in.check_seal(bytes.data());
  in.finish();
  load_worlds(worlds, size);  // the last thing that can refuse
  seed_ = seed;
  first_environment_ = static_cast<int64_t>(first_environment);
  step_ = step;
  for (size_t i = 0; i < saved.size(); ++i) {
    Tensor& part = *parts(current_)[i];
    if (part.nbytes() > 0) std::memcpy(part.data_ptr(), saved[i], part.nbytes());
  }
}

void BatchDriver::check_size(size_t size, size_t world_size) const {
  agree(spec_.name, "the size of the worlds differs", world_size * num_envs_, size);
}

namespace {

/// A virtual Environment in the clothes of a plain world.
struct EnvironmentBox {
  using Action = retain::Action;
  std::unique_ptr<Environment> environment;

  void reset(Rng& rng, float* observation) { environment->reset(rng, observation); }
  Outcome step(const Action& action, Rng& rng, float* observation) {
    return environment->step(action, rng, observation);
  }
  void legal_actions(bool* legal) const { environment->legal_actions(legal); }
};

}  // namespace

template <>
std::vector<uint8_t> WorldVectorEnv<EnvironmentBox>::save_worlds() const {
  ByteWriter out;
  for (const EnvironmentBox& world : worlds_) {
    const std::vector<uint8_t> bytes = world.environment->save();
    out.block(bytes.data(), bytes.size());
  }
  return out.take();
}

template <>
void WorldVectorEnv<EnvironmentBox>::load_worlds(const uint8_t* bytes, size_t size) {
  ByteReader in(bytes, size, spec().name);
  std::vector<std::vector<uint8_t>> blocks(worlds_.size());
  for (std::vector<uint8_t>& block : blocks) {
    const auto [data, length] = in.block();
    block.assign(data, data + length);
  }
  in.finish();
  const std::vector<uint8_t> before = save_worlds();
  try {
    for (size_t e = 0; e < worlds_.size(); ++e) worlds_[e].environment->load(blocks[e]);
  } catch (...) {
    load_worlds(before.data(), before.size());
    throw;
  }
}

namespace {

/// Whether one driver can step both.
bool alike(const EnvironmentSpec& a, const EnvironmentSpec& b) {
  return a.name == b.name && a.options == b.options && a.observation_size == b.observation_size &&
         a.passive == b.passive && a.action.kind == b.action.kind &&
         a.action.num_values == b.action.num_values && a.action.size == b.action.size &&
         a.action.masked == b.action.masked;
}

}  // namespace

std::unique_ptr<VectorEnv> vectorize(
    const std::function<std::unique_ptr<Environment>(int64_t index)>& make, int64_t num_envs,
    uint64_t seed, int64_t first_environment) {
  check_num_envs(num_envs);
  std::vector<EnvironmentBox> worlds(num_envs);
  for (int64_t e = 0; e < num_envs; ++e) {
    worlds[e].environment = make(first_environment + e);
    TORCH_CHECK_VALUE(worlds[e].environment, "vectorize: make(", first_environment + e,
                      ") gave no environment");
  }
  EnvironmentSpec spec = worlds[0].environment->spec();
  for (int64_t e = 1; e < num_envs; ++e) {
    const EnvironmentSpec other = worlds[e].environment->spec();
    TORCH_CHECK_VALUE(alike(spec, other), "vectorize: make(", first_environment + e, ") gave ",
                      other.name, " with ", other.observation_size, " observations and options \"",
                      other.options, "\", make(", first_environment, ") ", spec.name, " with ",
                      spec.observation_size, " and \"", spec.options, "\": all must have one spec");
  }
  return std::make_unique<WorldVectorEnv<EnvironmentBox>>(std::move(worlds), std::move(spec), seed,
                                                          first_environment);
}

}  // namespace retain
