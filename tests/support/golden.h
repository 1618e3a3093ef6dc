#pragma once

#include <ATen/ATen.h>
#include <hdf5.h>

#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace retain::testing {

/// Reads the datasets of a file that tests/golden/make_golden.py wrote.
class GoldenFile {
 public:
  explicit GoldenFile(const std::string& name)
      : file_(H5Fopen((std::string(RETAIN_GOLDEN_DIR "/") + name).c_str(), H5F_ACC_RDONLY,
                      H5P_DEFAULT)) {
    if (file_ < 0) throw std::runtime_error("cannot open the golden file " + name);
  }
  ~GoldenFile() { H5Fclose(file_); }
  GoldenFile(const GoldenFile&) = delete;
  GoldenFile& operator=(const GoldenFile&) = delete;

  at::Tensor tensor(const std::string& path) const {
    const hid_t dataset = H5Dopen2(file_, path.c_str(), H5P_DEFAULT);
    if (dataset < 0) throw std::runtime_error("the golden file has no " + path);
    const hid_t space = H5Dget_space(dataset), type = H5Dget_type(dataset);
    std::vector<hsize_t> extent(H5Sget_simple_extent_ndims(space));
    H5Sget_simple_extent_dims(space, extent.data(), nullptr);
    const std::vector<int64_t> sizes(extent.begin(), extent.end());
    auto result = at::empty(sizes, dtype(type));
    const auto status = H5Dread(dataset, native(result.scalar_type()), H5S_ALL, H5S_ALL,
                                H5P_DEFAULT, result.mutable_data_ptr());
    H5Tclose(type), H5Sclose(space), H5Dclose(dataset);
    if (status < 0) throw std::runtime_error("cannot read " + path);
    return result;
  }

  int64_t integer(const std::string& path) const { return tensor(path).item<int64_t>(); }

  /// The tensors of one group by their names in it.
  std::map<std::string, at::Tensor> group(const std::string& name) const {
    std::map<std::string, at::Tensor> result;
    H5G_info_t group_info;
    if (H5Gget_info_by_name(file_, name.c_str(), &group_info, H5P_DEFAULT) < 0) {
      throw std::runtime_error("the golden file has no group " + name);
    }
    for (hsize_t i = 0; i < group_info.nlinks; ++i) {
      char key[256];
      H5Lget_name_by_idx(file_, name.c_str(), H5_INDEX_NAME, H5_ITER_INC, i, key, sizeof(key),
                         H5P_DEFAULT);
      result.emplace(key, tensor(name + "/" + key));
    }
    return result;
  }

 private:
  static at::ScalarType dtype(hid_t type) {
    if (H5Tget_class(type) == H5T_FLOAT) return H5Tget_size(type) == 8 ? at::kDouble : at::kFloat;
    return H5Tget_size(type) == 1 ? at::kByte : at::kLong;
  }

  static hid_t native(at::ScalarType dtype) {
    if (dtype == at::kDouble) return H5T_NATIVE_DOUBLE;
    if (dtype == at::kFloat) return H5T_NATIVE_FLOAT;
    return dtype == at::kByte ? H5T_NATIVE_UINT8 : H5T_NATIVE_INT64;
  }

  hid_t file_;
};

}  // namespace retain::testing
