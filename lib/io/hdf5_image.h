#pragma once

#include <c10/core/ScalarType.h>
#include <hdf5.h>

#include <mutex>
#include <string>
#include <string_view>
#include <utility>

namespace retain::hdf5 {

/// Held by every function that calls HDF5: one thread at a time (HDF5 may be built without thread
/// safety), and no error stack on stderr.
class Lock {
 public:
  Lock();
  ~Lock();
  Lock(const Lock&) = delete;
  Lock& operator=(const Lock&) = delete;

 private:
  std::lock_guard<std::recursive_mutex> lock_;
  H5E_auto2_t print_ = nullptr;
  void* print_data_ = nullptr;
};

/// An HDF5 identifier that closes itself.
class Handle {
 public:
  Handle() = default;
  /// Throws std::runtime_error naming `what` (the call that gave `id`) if the call failed.
  Handle(hid_t id, herr_t (*close)(hid_t), const char* what);
  Handle(Handle&& other) noexcept : id_(std::exchange(other.id_, -1)), close_(other.close_) {}
  Handle& operator=(Handle&& other) noexcept;
  ~Handle() { reset(); }
  void reset();
  operator hid_t() const { return id_; }  // NOLINT: HDF5 calls take the plain identifier

 private:
  hid_t id_ = -1;
  herr_t (*close_)(hid_t) = nullptr;
};

/// Throws std::runtime_error naming `what` if `result` says that the call failed.
void check(herr_t result, const char* what);

/// A new file that lives in memory only.
Handle create_image();
/// A file from the bytes that image_bytes() gave. Read-only.
Handle open_image(std::string_view bytes);
std::string image_bytes(hid_t file);

/// The group under `parent`, made if need be; its entries keep the order of their creation.
Handle open_group(hid_t parent, const std::string& name);

/// The HDF5 type that holds `dtype` bit for bit. bfloat16 and bool have none of their own: they lie
/// in uint16 and uint8, and the attribute "dtype" tells them apart.
Handle datatype(c10::ScalarType dtype);

void write_attribute(hid_t object, const char* name, const std::string& text);
std::string read_attribute(hid_t object, const char* name);  ///< "" if there is none.

}  // namespace retain::hdf5
