#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace retain {
using at::Tensor;

/// Writes one HDF5 file of named tensors, strings and numbers, whole or not at all.
///
/// Names are paths: "model/core.layers.0.in_proj.weight" makes the group "model". commit() writes a temporary
/// file beside `path`, syncs it and renames it, so that `path` holds the old content or the new, never a piece.
/// Without commit() nothing is written. The file carries a format version and a checksum of every byte.
class CheckpointWriter {
 public:
  explicit CheckpointWriter(std::string path);
  ~CheckpointWriter();
  CheckpointWriter(const CheckpointWriter&) = delete;
  CheckpointWriter& operator=(const CheckpointWriter&) = delete;

  void write(const std::string& name, const Tensor& tensor);  ///< Any device, any strides; bit-exact, dtype kept.
  void write(const std::string& name, const std::string& text);
  void write(const std::string& name, const char* text) { write(name, std::string(text)); }
  void write(const std::string& name, int64_t value);
  void write(const std::string& name, double value);
  void write(const std::string& name, const std::vector<uint8_t>& bytes);
  void commit();  ///< Throws, and leaves `path` as it was, if the disk is full or the folder cannot be written.

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// Reads what CheckpointWriter wrote. The constructor throws, and says which it is, for a file that is missing,
/// truncated, foreign (no retain file), of a newer format version, or damaged (checksum).
class CheckpointReader {
 public:
  explicit CheckpointReader(const std::string& path);
  ~CheckpointReader();
  CheckpointReader(const CheckpointReader&) = delete;
  CheckpointReader& operator=(const CheckpointReader&) = delete;

  bool contains(const std::string& name) const;
  std::vector<std::string> names(const std::string& group = "") const;  ///< Full names of every entry under group, in order written.
  Tensor tensor(const std::string& name) const;  ///< On the CPU. Each reader throws if there is no such entry.
  std::string text(const std::string& name) const;
  int64_t integer(const std::string& name) const;
  double number(const std::string& name) const;
  std::vector<uint8_t> bytes(const std::string& name) const;
  const std::string& path() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// A person's view of a file: every entry with its type, shape and size, text in full.
std::string describe(const std::string& path);

}  // namespace retain
