#include <retain/lib/dtype_name.h>
#include <retain/lib/io/hdf5_image.h>

#include <atomic>
#include <stdexcept>

namespace retain::hdf5 {
namespace {

std::recursive_mutex& library_mutex() {
  static std::recursive_mutex mutex;
  return mutex;
}

/// HDF5 tells open files in memory apart by name. Nothing on disk can have this one.
std::string image_name() {
  static std::atomic<uint64_t> count{0};
  return "/dev/null/retain-" + std::to_string(count++);
}

Handle in_memory_access() {
  constexpr size_t kGrowth = size_t{1} << 20;
  Handle access(H5Pcreate(H5P_FILE_ACCESS), H5Pclose, "H5Pcreate");
  check(H5Pset_fapl_core(access, kGrowth, false), "H5Pset_fapl_core");
  check(H5Pset_fclose_degree(access, H5F_CLOSE_STRONG), "H5Pset_fclose_degree");
  return access;
}

Handle half_type() {
  Handle type(H5Tcopy(H5T_IEEE_F32LE), H5Tclose, "H5Tcopy");
  check(H5Tset_fields(type, 15, 10, 5, 0, 10), "H5Tset_fields");
  check(H5Tset_size(type, 2), "H5Tset_size");
  check(H5Tset_ebias(type, 15), "H5Tset_ebias");
  return type;
}

hid_t predefined(c10::ScalarType dtype) {
  switch (dtype) {
    case c10::kFloat:
      return H5T_IEEE_F32LE;
    case c10::kDouble:
      return H5T_IEEE_F64LE;
    case c10::kBFloat16:
      return H5T_STD_U16LE;
    case c10::kLong:
      return H5T_STD_I64LE;
    case c10::kInt:
      return H5T_STD_I32LE;
    case c10::kShort:
      return H5T_STD_I16LE;
    case c10::kChar:
      return H5T_STD_I8LE;
    case c10::kByte:
    case c10::kBool:
      return H5T_STD_U8LE;
    default:
      return -1;
  }
}

constexpr unsigned kKeepOrder = H5P_CRT_ORDER_TRACKED | H5P_CRT_ORDER_INDEXED;

}  // namespace

Lock::Lock() : lock_(library_mutex()) {
  H5Eget_auto2(H5E_DEFAULT, &print_, &print_data_);
  H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr);
}

Lock::~Lock() { H5Eset_auto2(H5E_DEFAULT, print_, print_data_); }

Handle::Handle(hid_t id, herr_t (*close)(hid_t), const char* what) : id_(id), close_(close) {
  if (id < 0) throw std::runtime_error(std::string(what) + " failed");
}

Handle& Handle::operator=(Handle&& other) noexcept {
  if (this != &other) {
    reset();
    id_ = std::exchange(other.id_, -1);
    close_ = other.close_;
  }
  return *this;
}

void Handle::reset() {
  if (id_ >= 0) close_(std::exchange(id_, -1));
}

void check(herr_t result, const char* what) {
  if (result < 0) throw std::runtime_error(std::string(what) + " failed");
}

Handle create_image() {
  const Handle access = in_memory_access();
  const Handle creation(H5Pcreate(H5P_FILE_CREATE), H5Pclose, "H5Pcreate");
  check(H5Pset_link_creation_order(creation, kKeepOrder), "H5Pset_link_creation_order");
  return {H5Fcreate(image_name().c_str(), H5F_ACC_TRUNC, creation, access), H5Fclose, "H5Fcreate"};
}

Handle open_image(std::string_view bytes) {
  const Handle access = in_memory_access();
  check(H5Pset_file_image(access, const_cast<char*>(bytes.data()), bytes.size()),
        "H5Pset_file_image");
  return {H5Fopen(image_name().c_str(), H5F_ACC_RDONLY, access), H5Fclose, "H5Fopen"};
}

std::string image_bytes(hid_t file) {
  check(H5Fflush(file, H5F_SCOPE_GLOBAL), "H5Fflush");
  const ssize_t size = H5Fget_file_image(file, nullptr, 0);
  std::string bytes(size < 0 ? 0 : static_cast<size_t>(size), '\0');
  if (size < 0 || H5Fget_file_image(file, bytes.data(), bytes.size()) != size) {
    throw std::runtime_error("H5Fget_file_image failed");
  }
  return bytes;
}

Handle open_group(hid_t parent, const std::string& name) {
  if (H5Lexists(parent, name.c_str(), H5P_DEFAULT) > 0) {
    return {H5Gopen2(parent, name.c_str(), H5P_DEFAULT), H5Gclose, "H5Gopen"};
  }
  const Handle creation(H5Pcreate(H5P_GROUP_CREATE), H5Pclose, "H5Pcreate");
  check(H5Pset_link_creation_order(creation, kKeepOrder), "H5Pset_link_creation_order");
  return {H5Gcreate2(parent, name.c_str(), H5P_DEFAULT, creation, H5P_DEFAULT), H5Gclose,
          "H5Gcreate"};
}

Handle datatype(c10::ScalarType dtype) {
  if (dtype == c10::kHalf) return half_type();
  const hid_t type = predefined(dtype);
  if (type < 0) throw std::runtime_error("HDF5 has no type for " + dtype_name(dtype));
  return {H5Tcopy(type), H5Tclose, "H5Tcopy"};
}

void write_attribute(hid_t object, const char* name, const std::string& text) {
  const Handle type(H5Tcopy(H5T_C_S1), H5Tclose, "H5Tcopy");
  check(H5Tset_size(type, text.size() + 1), "H5Tset_size");
  const Handle space(H5Screate(H5S_SCALAR), H5Sclose, "H5Screate");
  const Handle attribute(H5Acreate2(object, name, type, space, H5P_DEFAULT, H5P_DEFAULT), H5Aclose,
                         "H5Acreate");
  check(H5Awrite(attribute, type, text.c_str()), "H5Awrite");
}

std::string read_attribute(hid_t object, const char* name) {
  if (H5Aexists(object, name) <= 0) return {};
  const Handle attribute(H5Aopen(object, name, H5P_DEFAULT), H5Aclose, "H5Aopen");
  const Handle type(H5Aget_type(attribute), H5Tclose, "H5Aget_type");
  std::string text(H5Tget_size(type), '\0');
  check(H5Aread(attribute, type, text.data()), "H5Aread");
  return text.substr(0, text.find('\0'));
}

}  // namespace retain::hdf5
