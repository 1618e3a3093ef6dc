#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace retain {
using at::Tensor;
class CheckpointReader;
class CheckpointWriter;

/// The memory of a recurrent core as a value: named tensors, batch first.
///
/// A Mamba layer holds "conv" [B, d_conv - 1, d_inner] and "ssm" [B, d_inner, d_state]; a GRU layer
/// "hidden" [B, d_model]; a stack prefixes its layers' parts with "layers.<i>.". A memoryless core
/// has no part, only a batch size. Copying a State shares its tensors, as copying a Tensor does;
/// clone() does not.
class State {
 public:
  using Part = std::pair<std::string, Tensor>;

  State() = default;
  explicit State(int64_t batch_size);  ///< At least 0.
  /// Throws if a part's first size is not batch_size.
  State(int64_t batch_size, std::vector<Part> parts);

  int64_t batch_size() const { return batch_size_; }
  /// d_inner of the only "ssm" part. Throws if there is none or more than one.
  int64_t dim() const;
  /// d_state of the only "ssm" part. Throws if there is none or more than one.
  int64_t d_state() const;
  int64_t num_bytes() const;

  const std::vector<Part>& parts() const& { return parts_; }
  std::vector<Part> parts() && { return std::move(parts_); }  ///< A loop over a temporary lives.
  bool contains(const std::string& name) const;
  /// Throws and lists the names if there is no such part.
  const Tensor& at(const std::string& name) const;
  /// Throws on a second part of that name or a wrong batch size.
  void insert(const std::string& name, Tensor part);

  State layer(int64_t index) const;  ///< The parts under "layers.<index>.", prefix removed.
  void insert_layer(int64_t index, const State& state);  ///< The reverse.

  State to(at::Device device) const;      ///< dtypes stay; parts that are there already are shared.
  State clone() const;                    ///< Own, contiguous storage; gradients flow through.
  State detach() const;                   ///< Shares the storage, cut from the graph.
  State rows(const Tensor& index) const;  ///< The batch rows that index [M] (int64) names.
  void set_rows(const Tensor& index, const State& rows);  ///< In place; index names no row twice.
  void zero(const Tensor& mask = {});  ///< In place; cuts gradients; mask [B] bool, undefined =
                                       ///< all rows. NaN is cleared too.

  /// One HDF5 file of kind "state", written whole or not at all. Errors as CheckpointWriter and
  /// -Reader throw them.
  void save(const std::string& path) const;
  static State load(const std::string& path);  ///< On the CPU, bit-equal to what was saved.

  /// The same as a group of a larger file: "<group>/batch_size" and "<group>/parts/<name>".
  void save(CheckpointWriter& writer, const std::string& group) const;
  static State load(const CheckpointReader& reader, const std::string& group);

 private:
  int64_t batch_size_ = 0;
  std::vector<Part> parts_;
};

/// Throws unless `state` has the parts, shapes (batch included), dtypes and device of `expected`;
/// `where` opens the message, as in "Mamba1: state has no part \"ssm\"; it has: hidden".
void check_state(const std::string& where, const State& state, const State& expected);

/// Copies the parts of `from` into those of `to`, which keep their storage.
void copy_state(const State& from, State& to);

/// Whether two states have the same parts with bit-equal values.
bool equal(const State& a, const State& b);

}  // namespace retain
