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
/// Names are paths: "model/core.layers.0.in_proj.weight" makes the group "model". commit() writes a
/// temporary file beside `path`, syncs it and renames it, so that `path` holds the old content or
/// the new, never a piece. Without commit() nothing is written. The file carries a format version
/// and a checksum of every byte (sealed_file.h); h5py, h5dump and the like open it as it is. Equal
/// content gives equal bytes.
///
/// Errors of writer and reader are std::runtime_error whose what() is one line that names the file.
class CheckpointWriter {
 public:
  /// `kind` says what the file is, and a reader refuses another kind: "checkpoint", "state", "run".
  explicit CheckpointWriter(std::string path, std::string kind = "checkpoint");
  ~CheckpointWriter();
  CheckpointWriter(const CheckpointWriter&) = delete;
  CheckpointWriter& operator=(const CheckpointWriter&) = delete;

  /// Any device, any strides; bit-exact. float64, float32, float16, bfloat16, int64, int32, int16,
  /// int8, uint8, bool.
  void write(const std::string& name, const Tensor& tensor);
  void write(const std::string& name, const std::string& text);
  void write(const std::string& name, const char* text) { write(name, std::string(text)); }
  void write(const std::string& name, int64_t value);  ///< A tensor [] of int64.
  void write(const std::string& name, double value);   ///< A tensor [] of float64.
  /// A tensor [n] of uint8.
  void write(const std::string& name, const std::vector<uint8_t>& bytes);
  void commit();  ///< Throws, and leaves `path` as it was, if the disk is full or the folder cannot
                  ///< be written.

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// Reads what CheckpointWriter wrote. The constructor throws, and says which it is, for a file that
/// is missing, truncated, foreign (no retain file), of a newer format version, damaged (checksum),
/// or of another kind.
class CheckpointReader {
 public:
  /// kind "" = any.
  explicit CheckpointReader(const std::string& path, const std::string& kind = "checkpoint");
  ~CheckpointReader();
  CheckpointReader(const CheckpointReader&) = delete;
  CheckpointReader& operator=(const CheckpointReader&) = delete;

  bool contains(const std::string& name) const;  ///< An entry; a group is none.
  bool is_text(const std::string& name) const;
  /// Full names of every entry under `group`, groups and entries in the order written; none if
  /// there is no such group.
  std::vector<std::string> names(const std::string& group = "") const;
  /// On the CPU. Each reader throws if there is no such entry.
  Tensor tensor(const std::string& name) const;
  std::string text(const std::string& name) const;
  int64_t integer(const std::string& name) const;
  double number(const std::string& name) const;
  std::vector<uint8_t> bytes(const std::string& name) const;
  const std::string& path() const;
  const std::string& kind() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// A person's view of a file of any kind: every entry with its type, shape and size, numbers and
/// text in full.
std::string describe(const std::string& path);

}  // namespace retain
