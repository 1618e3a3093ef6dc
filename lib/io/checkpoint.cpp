#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <retain/lib/dtype_name.h>
#include <retain/lib/io/checkpoint.h>
#include <retain/lib/io/hdf5_image.h>
#include <retain/lib/io/sealed_file.h>

#include <array>
#include <cstring>
#include <stdexcept>

namespace retain {
namespace {

using hdf5::check;
using hdf5::Handle;
using hdf5::Lock;

constexpr std::array kDtypes{at::kDouble, at::kFloat, at::kHalf, at::kBFloat16, at::kLong,
                             at::kInt,    at::kShort, at::kChar, at::kByte,     at::kBool};

std::string in_quotes(const std::string& text) { return "\"" + text + "\""; }

/// Runs `body`; what it throws is thrown again with `context` before it.
template <typename Body>
auto with_context(const std::string& context, const Body& body) {
  try {
    return body();
  } catch (const c10::Error& error) {
    throw std::runtime_error(context + ": " + error.what_without_backtrace());
  } catch (const std::exception& error) {
    throw std::runtime_error(context + ": " + error.what());
  }
}

std::vector<std::string> components(const std::string& name) {
  std::vector<std::string> result(1);
  for (const char c : name) {
    if (c == '/') {
      result.emplace_back();
    } else {
      result.back() += c;
    }
  }
  for (const auto& part : result) {
    if (part.empty() || part == "." || part == ".." || part.find('\0') != std::string::npos) {
      throw std::runtime_error("a name is one or more words joined by \"/\"");
    }
  }
  return result;
}

bool is_group(hid_t object) { return H5Iget_type(object) == H5I_GROUP; }

}  // namespace

struct CheckpointWriter::Impl {
  std::string path, kind;
  Handle file;

  std::string context(const std::string& name) const {
    return "cannot write " + in_quotes(name) + " to " + in_quotes(path);
  }
  Handle create(const std::string& name, hid_t type, hid_t space);
};

Handle CheckpointWriter::Impl::create(const std::string& name, hid_t type, hid_t space) {
  const auto words = components(name);
  Handle group(H5Gopen2(file, "/", H5P_DEFAULT), H5Gclose, "H5Gopen");
  for (size_t i = 0; i + 1 < words.size(); ++i) group = hdf5::open_group(group, words[i]);
  if (H5Lexists(group, words.back().c_str(), H5P_DEFAULT) > 0)
    throw std::runtime_error("the name is taken");
  const Handle creation(H5Pcreate(H5P_DATASET_CREATE), H5Pclose, "H5Pcreate");
  check(H5Pset_obj_track_times(creation, false),
        "H5Pset_obj_track_times");  // equal content, equal bytes
  return {H5Dcreate2(group, words.back().c_str(), type, space, H5P_DEFAULT, creation, H5P_DEFAULT),
          H5Dclose, "H5Dcreate"};
}

CheckpointWriter::CheckpointWriter(std::string path, std::string kind)
    : impl_(new Impl{std::move(path), std::move(kind), {}}) {
  const Lock lock;
  impl_->file = hdf5::create_image();
}

CheckpointWriter::~CheckpointWriter() {
  const Lock lock;
  impl_.reset();
}

void CheckpointWriter::write(const std::string& name, const Tensor& tensor) {
  const Lock lock;
  with_context(impl_->context(name), [&] {
    if (!tensor.defined()) throw std::runtime_error("the tensor is undefined");
    const auto host = tensor.detach().to(at::kCPU).resolve_neg().contiguous();
    const Handle type = hdf5::datatype(host.scalar_type());
    const std::vector<hsize_t> sizes(host.sizes().begin(), host.sizes().end());
    const Handle space(H5Screate_simple(static_cast<int>(sizes.size()), sizes.data(), nullptr),
                       H5Sclose, "H5Screate_simple");
    const Handle dataset = impl_->create(name, type, space);
    hdf5::write_attribute(dataset, "dtype", dtype_name(host.scalar_type()));
    if (host.numel() > 0) {
      check(H5Dwrite(dataset, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, host.const_data_ptr()),
            "H5Dwrite");
    }
  });
}

void CheckpointWriter::write(const std::string& name, const std::string& text) {
  const Lock lock;
  with_context(impl_->context(name), [&] {
    const Handle type(H5Tcopy(H5T_C_S1), H5Tclose, "H5Tcopy");
    check(H5Tset_cset(type, H5T_CSET_UTF8), "H5Tset_cset");
    check(H5Tset_size(type, text.size() + 1), "H5Tset_size");
    const Handle space(H5Screate(H5S_SCALAR), H5Sclose, "H5Screate");
    const Handle dataset = impl_->create(name, type, space);
    check(H5Dwrite(dataset, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, text.c_str()), "H5Dwrite");
  });
}

void CheckpointWriter::write(const std::string& name, int64_t value) {
  write(name, at::scalar_tensor(value, at::kLong));
}

void CheckpointWriter::write(const std::string& name, double value) {
  auto tensor = at::empty({}, at::kDouble);
  *tensor.mutable_data_ptr<double>() = value;
  write(name, tensor);
}

void CheckpointWriter::write(const std::string& name, const std::vector<uint8_t>& bytes) {
  auto tensor = at::empty({static_cast<int64_t>(bytes.size())}, at::kByte);
  if (!bytes.empty()) std::memcpy(tensor.mutable_data_ptr(), bytes.data(), bytes.size());
  write(name, tensor);
}

void CheckpointWriter::commit() {
  const auto image = with_context("cannot write " + in_quotes(impl_->path), [&] {
    const Lock lock;
    return hdf5::image_bytes(impl_->file);
  });
  write_sealed(impl_->path, impl_->kind, image);
}

struct CheckpointReader::Impl {
  std::string path, kind;
  Handle file;

  std::string context(const std::string& name) const {
    return "cannot read " + in_quotes(name) + " from " + in_quotes(path);
  }
  Handle find(
      const std::string& name) const;  ///< Entry or group; an empty handle if there is neither.
  Handle dataset(const std::string& name) const;  ///< Throws if there is no such entry.
};

Handle CheckpointReader::Impl::find(const std::string& name) const {
  Handle object(H5Gopen2(file, "/", H5P_DEFAULT), H5Gclose, "H5Gopen");
  if (name.empty()) return object;
  for (const auto& word : components(name)) {
    if (!is_group(object) || H5Lexists(object, word.c_str(), H5P_DEFAULT) <= 0) return {};
    object = Handle(H5Oopen(object, word.c_str(), H5P_DEFAULT), H5Oclose, "H5Oopen");
  }
  return object;
}

Handle CheckpointReader::Impl::dataset(const std::string& name) const {
  Handle object = find(name);
  if (object < 0) throw std::runtime_error("there is no such entry");
  if (H5Iget_type(object) != H5I_DATASET) throw std::runtime_error("it is a group");
  return object;
}

CheckpointReader::CheckpointReader(const std::string& path, const std::string& kind) {
  const auto sealed = read_sealed(path);
  if (!kind.empty() && kind != sealed.kind) {
    throw std::runtime_error("cannot read " + in_quotes(path) + ": it is a " + sealed.kind +
                             " file, not a " + kind + " file");
  }
  const Lock lock;
  impl_.reset(new Impl{path, sealed.kind, {}});
  impl_->file = with_context("cannot read " + in_quotes(path),
                             [&] { return hdf5::open_image(sealed.payload()); });
}

CheckpointReader::~CheckpointReader() {
  const Lock lock;
  impl_.reset();
}

const std::string& CheckpointReader::path() const { return impl_->path; }
const std::string& CheckpointReader::kind() const { return impl_->kind; }

bool CheckpointReader::contains(const std::string& name) const {
  const Lock lock;
  return with_context(impl_->context(name), [&] {
    const Handle object = impl_->find(name);
    return object >= 0 && H5Iget_type(object) == H5I_DATASET;
  });
}

bool CheckpointReader::is_text(const std::string& name) const {
  const Lock lock;
  return with_context(impl_->context(name), [&] {
    const Handle dataset = impl_->dataset(name);
    const Handle type(H5Dget_type(dataset), H5Tclose, "H5Dget_type");
    return H5Tget_class(type) == H5T_STRING;
  });
}

namespace {

void list(hid_t group, const std::string& prefix, std::vector<std::string>& names) {
  H5G_info_t info;
  check(H5Gget_info(group, &info), "H5Gget_info");
  for (hsize_t i = 0; i < info.nlinks; ++i) {
    char buffer[4096];
    const ssize_t length = H5Lget_name_by_idx(group, ".", H5_INDEX_CRT_ORDER, H5_ITER_INC, i,
                                              buffer, sizeof(buffer), H5P_DEFAULT);
    if (length < 0 || length >= static_cast<ssize_t>(sizeof(buffer))) {
      throw std::runtime_error("H5Lget_name_by_idx failed");
    }
    const std::string name = prefix + buffer;
    const Handle object(H5Oopen(group, buffer, H5P_DEFAULT), H5Oclose, "H5Oopen");
    if (is_group(object)) {
      list(object, name + "/", names);
    } else {
      names.push_back(name);
    }
  }
}

at::ScalarType dtype_of(hid_t dataset) {
  const auto wanted = hdf5::read_attribute(dataset, "dtype");
  const Handle type(H5Dget_type(dataset), H5Tclose, "H5Dget_type");
  for (const auto dtype : kDtypes) {
    if (wanted == dtype_name(dtype) && H5Tequal(type, hdf5::datatype(dtype)) > 0) return dtype;
  }
  throw std::runtime_error("it is no tensor");
}

}  // namespace

std::vector<std::string> CheckpointReader::names(const std::string& group) const {
  const Lock lock;
  return with_context(impl_->context(group), [&] {
    std::vector<std::string> result;
    const Handle object = impl_->find(group);
    if (object >= 0 && is_group(object)) list(object, group.empty() ? "" : group + "/", result);
    return result;
  });
}

Tensor CheckpointReader::tensor(const std::string& name) const {
  const Lock lock;
  return with_context(impl_->context(name), [&] {
    const Handle dataset = impl_->dataset(name);
    const auto dtype = dtype_of(dataset);
    const Handle space(H5Dget_space(dataset), H5Sclose, "H5Dget_space");
    std::vector<hsize_t> sizes(static_cast<size_t>(H5Sget_simple_extent_ndims(space)));
    H5Sget_simple_extent_dims(space, sizes.data(), nullptr);
    auto result = at::empty(std::vector<int64_t>(sizes.begin(), sizes.end()), dtype);
    if (result.numel() > 0) {
      const Handle type = hdf5::datatype(dtype);
      check(H5Dread(dataset, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, result.mutable_data_ptr()),
            "H5Dread");
    }
    return result;
  });
}

std::string CheckpointReader::text(const std::string& name) const {
  const Lock lock;
  if (!is_text(name)) throw std::runtime_error(impl_->context(name) + ": it is no text");
  return with_context(impl_->context(name), [&] {
    const Handle dataset = impl_->dataset(name);
    const Handle type(H5Dget_type(dataset), H5Tclose, "H5Dget_type");
    std::string result(H5Tget_size(type), '\0');
    check(H5Dread(dataset, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, result.data()), "H5Dread");
    result.pop_back();  // the terminating zero
    return result;
  });
}

int64_t CheckpointReader::integer(const std::string& name) const {
  const auto value = tensor(name);
  if (value.dim() != 0 || value.scalar_type() != at::kLong) {
    throw std::runtime_error(impl_->context(name) + ": it is no integer");
  }
  return value.item<int64_t>();
}

double CheckpointReader::number(const std::string& name) const {
  const auto value = tensor(name);
  if (value.dim() != 0 || value.scalar_type() != at::kDouble) {
    throw std::runtime_error(impl_->context(name) + ": it is no number");
  }
  return value.item<double>();
}

std::vector<uint8_t> CheckpointReader::bytes(const std::string& name) const {
  const auto value = tensor(name);
  if (value.dim() != 1 || value.scalar_type() != at::kByte) {
    throw std::runtime_error(impl_->context(name) + ": it is no row of bytes");
  }
  const auto* data = value.const_data_ptr<uint8_t>();
  return {data, data + value.numel()};
}

}  // namespace retain
