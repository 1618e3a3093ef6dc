#include <ATen/ATen.h>
#include <retain/lib/dtype_name.h>
#include <retain/lib/io/checkpoint.h>
#include <retain/lib/ops/state_parts.h>
#include <retain/lib/state.h>

#include <cstring>

namespace retain {
namespace {

constexpr std::string_view kLayers = "layers.";

std::string names_of(const std::vector<State::Part>& parts) {
  std::string result;
  for (const auto& part : parts) result += (result.empty() ? "" : ", ") + part.first;
  return result.empty() ? "none" : result;
}

const Tensor& only_ssm(const char* where, const State& state) {
  const Tensor* found = nullptr;
  for (const auto& [name, part] : state.parts()) {
    const bool is_ssm =
        name == "ssm" || (name.size() > 4 && name.compare(name.size() - 4, 4, ".ssm") == 0);
    TORCH_CHECK(!is_ssm || !found, where,
                ": state has more than one part \"ssm\": ", names_of(state.parts()),
                "; pick one with layer()");
    if (is_ssm) found = &part;
  }
  TORCH_CHECK(
      found && found->dim() == 3, where,
      ": state has no part \"ssm\" [B, d_inner, d_state]; it has: ", names_of(state.parts()));
  return *found;
}

template <typename Function>
State map_parts(const State& state, int64_t batch_size, const Function& function) {
  std::vector<State::Part> parts;
  parts.reserve(state.parts().size());
  for (const auto& [name, part] : state.parts()) parts.emplace_back(name, function(part));
  return State(batch_size, std::move(parts));
}

void check_part(const std::string& where, const std::string& name, const Tensor& part,
                const Tensor& expected, at::IntArrayRef sizes) {
  TORCH_CHECK(part.sizes() == sizes, where, ": state part \"", name, "\" must be ", sizes, ", got ",
              part.sizes());
  TORCH_CHECK(part.scalar_type() == expected.scalar_type(), where, ": state part \"", name,
              "\" must be ", dtype_name(expected.scalar_type()), ", got ",
              dtype_name(part.scalar_type()));
  TORCH_CHECK(part.device() == expected.device(), where, ": state part \"", name, "\" must be on ",
              expected.device(), ", got ", part.device());
}

/// As check_state(), for a state of `batch_size` rows.
void check_rows(const std::string& where, const State& state, const State& expected,
                int64_t batch_size) {
  for (const auto& [name, part] : expected.parts()) {
    TORCH_CHECK(state.contains(name), where, ": state has no part \"", name,
                "\"; it has: ", names_of(state.parts()));
    auto sizes = part.sizes().vec();
    sizes[0] = batch_size;
    check_part(where, name, state.at(name), part, sizes);
  }
  for (const auto& part : state.parts()) {
    TORCH_CHECK(expected.contains(part.first), where, ": state has a part \"", part.first,
                "\" that does not belong here; its parts must be: ", names_of(expected.parts()));
  }
  TORCH_CHECK(state.batch_size() == batch_size, where, ": state must have batch size ", batch_size,
              ", got ", state.batch_size());
}

/// Row numbers are looked at where that needs no wait for a GPU; a GPU checks bounds itself.
void check_index(const char* where, const Tensor& index, int64_t batch_size, bool unique) {
  TORCH_CHECK(index.defined() && index.dim() == 1 && index.scalar_type() == at::kLong, where,
              ": index must be [M] int64, got ",
              index.defined() ? dtype_name(index.scalar_type()) : "undefined", " ",
              index.defined() ? index.sizes() : at::IntArrayRef());
  if (!index.is_cpu()) return;
  const auto rows = index.contiguous();
  std::vector<bool> seen(static_cast<size_t>(unique ? batch_size : 0));
  for (int64_t i = 0; i < rows.numel(); ++i) {
    const int64_t row = rows.const_data_ptr<int64_t>()[i];
    TORCH_CHECK(row >= 0 && row < batch_size, where, ": index must be in [0, ", batch_size,
                "), got ", row);
    if (!unique) continue;
    TORCH_CHECK(!seen[static_cast<size_t>(row)], where, ": index must name a row once, got ", row,
                " again");
    seen[static_cast<size_t>(row)] = true;
  }
}

bool same_bytes(const Tensor& a, const Tensor& b) {
  if (a.sizes() != b.sizes() || a.scalar_type() != b.scalar_type()) return false;
  const auto left = a.detach().to(at::kCPU).contiguous(),
             right = b.detach().to(at::kCPU).contiguous();
  return left.numel() == 0 ||
         std::memcmp(left.const_data_ptr(), right.const_data_ptr(), left.nbytes()) == 0;
}

}  // namespace

State::State(int64_t batch_size) : batch_size_(batch_size) {
  TORCH_CHECK(batch_size >= 0, "State: batch_size must be at least 0, got ", batch_size);
}

State::State(int64_t batch_size, std::vector<Part> parts) : State(batch_size) {
  for (auto& [name, part] : parts) insert(name, std::move(part));
}

int64_t State::dim() const { return only_ssm("State::dim", *this).size(1); }
int64_t State::d_state() const { return only_ssm("State::d_state", *this).size(2); }

int64_t State::num_bytes() const {
  int64_t total = 0;
  for (const auto& part : parts_)
    total += part.second.numel() * static_cast<int64_t>(part.second.element_size());
  return total;
}

bool State::contains(const std::string& name) const {
  return std::any_of(parts_.begin(), parts_.end(),
                     [&](const Part& part) { return part.first == name; });
}

const Tensor& State::at(const std::string& name) const {
  for (const auto& part : parts_) {
    if (part.first == name) return part.second;
  }
  TORCH_CHECK(false, "State::at: no part \"", name, "\"; there are: ", names_of(parts_));
}

void State::insert(const std::string& name, Tensor part) {
  TORCH_CHECK(!name.empty(), "State::insert: name must not be empty");
  TORCH_CHECK(!contains(name), "State::insert: there is a part \"", name, "\" already");
  TORCH_CHECK(part.defined(), "State::insert: part \"", name, "\" is undefined");
  TORCH_CHECK(part.dim() >= 1 && part.size(0) == batch_size_, "State::insert: part \"", name,
              "\" must be [", batch_size_, ", ...], got ", part.sizes());
  parts_.emplace_back(name, std::move(part));
}

State State::layer(int64_t index) const {
  const auto prefix = std::string(kLayers) + std::to_string(index) + ".";
  State result(batch_size_);
  for (const auto& [name, part] : parts_) {
    if (name.compare(0, prefix.size(), prefix) == 0)
      result.parts_.emplace_back(name.substr(prefix.size()), part);
  }
  return result;
}

void State::insert_layer(int64_t index, const State& state) {
  TORCH_CHECK(state.batch_size() == batch_size_, "State::insert_layer: layer ", index,
              " must have batch size ", batch_size_, ", got ", state.batch_size());
  const auto prefix = std::string(kLayers) + std::to_string(index) + ".";
  for (const auto& [name, part] : state.parts()) insert(prefix + name, part);
}

State State::to(at::Device device) const {
  return map_parts(*this, batch_size_, [&](const Tensor& part) { return part.to(device); });
}

State State::clone() const {
  return map_parts(*this, batch_size_,
                   [](const Tensor& part) { return part.clone(at::MemoryFormat::Contiguous); });
}

State State::detach() const {
  return map_parts(*this, batch_size_, [](const Tensor& part) { return part.detach(); });
}

State State::rows(const Tensor& index) const {
  check_index("State::rows", index, batch_size_, false);
  return map_parts(*this, index.size(0), [&](const Tensor& part) {
    return part.index_select(0, index.to(part.device()));
  });
}

void State::set_rows(const Tensor& index, const State& rows) {
  check_index("State::set_rows", index, batch_size_, true);
  check_rows("State::set_rows", rows, *this, index.size(0));
  for (auto& [name, part] : parts_) part.index_copy_(0, index.to(part.device()), rows.at(name));
}

void State::zero(const Tensor& mask) {
  if (!mask.defined()) {
    for (auto& [name, part] : parts_) part.zero_();
    return;
  }
  TORCH_CHECK(mask.scalar_type() == at::kBool, "State::zero: mask must be bool, got ",
              dtype_name(mask.scalar_type()));
  TORCH_CHECK(mask.dim() == 1 && mask.size(0) == batch_size_, "State::zero: mask must be [B] = [",
              batch_size_, "], got ", mask.sizes());
  std::vector<Tensor> values;
  for (auto& [name, part] : parts_) {
    TORCH_CHECK(mask.device() == part.device(), "State::zero: mask must be on ", part.device(),
                ", got ", mask.device());
    values.push_back(part);
  }
  zero_rows(values, mask);
}

void State::save(CheckpointWriter& writer, const std::string& group) const {
  writer.write(group + "/batch_size", batch_size_);
  for (const auto& [name, part] : parts_) writer.write(group + "/parts/" + name, part);
}

State State::load(const CheckpointReader& reader, const std::string& group) {
  State state(reader.integer(group + "/batch_size"));
  const auto prefix = group + "/parts/";
  for (const auto& name : reader.names(group + "/parts")) {
    state.insert(name.substr(prefix.size()), reader.tensor(name));
  }
  return state;
}

void State::save(const std::string& path) const {
  CheckpointWriter writer(path, "state");
  save(writer, "state");
  writer.commit();
}

State State::load(const std::string& path) {
  return load(CheckpointReader(path, "state"), "state");
}

void check_state(const std::string& where, const State& state, const State& expected) {
  check_rows(where, state, expected, expected.batch_size());
}

void copy_state(const State& from, State& to) {
  std::vector<Tensor> sources, targets;
  for (const auto& [name, part] : from.parts()) {
    sources.push_back(part);
    targets.push_back(to.at(name));
  }
  copy_parts(sources, targets);
}

bool equal(const State& a, const State& b) {
  if (a.batch_size() != b.batch_size() || a.parts().size() != b.parts().size()) return false;
  return std::all_of(a.parts().begin(), a.parts().end(), [&](const State::Part& part) {
    return b.contains(part.first) && same_bytes(part.second, b.at(part.first));
  });
}

}  // namespace retain
