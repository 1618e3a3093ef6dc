#include <retain/experiments/commands.h>
#include <retain/experiments/options.h>
#include <retain/experiments/text.h>
#include <retain/lib/io/checkpoint.h>

#include <cstring>
#include <iostream>

namespace retain {
namespace {

/// Options and wall time are no part of what a run computes.
bool counts(const std::string& name) { return name != "config" && !name.ends_with("_seconds"); }

bool bit_equal(const Tensor& a, const Tensor& b) {
  return a.scalar_type() == b.scalar_type() && a.sizes() == b.sizes() &&
         std::memcmp(a.contiguous().const_data_ptr(), b.contiguous().const_data_ptr(),
                     a.nbytes()) == 0;
}

/// "" if the entry is the same in both.
std::string difference(const CheckpointReader& a, const CheckpointReader& b,
                       const std::string& name) {
  if (!a.contains(name)) return "only in " + b.path();
  if (!b.contains(name)) return "only in " + a.path();
  if (a.is_text(name) || b.is_text(name)) {
    return a.is_text(name) && b.is_text(name) && a.text(name) == b.text(name) ? "" : "text differs";
  }
  const Tensor x = a.tensor(name), y = b.tensor(name);
  if (bit_equal(x, y)) return "";
  if (x.scalar_type() != y.scalar_type() || x.sizes() != y.sizes()) return "type or shape differs";
  const auto bytes = [](const Tensor& z) {
    return z.contiguous().view({-1}).view(at::kByte).view({z.numel(), -1});
  };
  const int64_t elements = bytes(x).ne(bytes(y)).any(1).sum().item<int64_t>();
  return std::to_string(elements) + " of " + std::to_string(x.numel()) + " numbers differ";
}

}  // namespace

int compare_command(const Arguments& arguments) {
  Options options(
      "retain compare A B",
      "Compares two files of retain entry by entry, bit for bit, leaving out the options "
      "(config) and wall time (*_seconds). Exits 0 if they are identical, 1 if not.");
  Arguments files;
  options.add_positional("FILE", files, 2, "Two such files.");
  if (!options.parse(arguments)) return 0;
  if (files.size() != 2) throw UsageError("which two files?");
  const CheckpointReader a(files[0], ""), b(files[1], "");
  std::vector<std::string> names = a.names();
  for (const std::string& name : b.names()) {
    if (!a.contains(name)) names.push_back(name);
  }
  std::erase_if(names, [](const std::string& name) { return !counts(name); });
  std::vector<std::vector<std::string>> rows;
  for (const std::string& name : names) {
    const std::string text = difference(a, b, name);
    if (!text.empty()) rows.push_back({"  " + name, text});
  }
  if (rows.empty()) {
    std::cout << "identical: " << names.size() << " entries, bit for bit\n";
    return 0;
  }
  std::cout << "different: " << rows.size() << " of " << names.size() << " entries\n"
            << table(rows, 2);
  return 1;
}

}  // namespace retain
