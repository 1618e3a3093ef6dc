#include <retain/lib/io/atomic_file.h>
#include <retain/lib/io/sealed_file.h>
#include <zlib.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <stdexcept>

namespace retain {
namespace {

static_assert(std::endian::native == std::endian::little, "retain files are little-endian");

constexpr size_t kVersionAt = 12, kSizeAt = 16, kPayloadSumAt = 24, kKindAt = 32,
                 kHeaderSumAt = 508;
constexpr size_t kKindSize = 32;

uint32_t checksum(std::string_view bytes) {
  return static_cast<uint32_t>(
      ::crc32_z(0, reinterpret_cast<const unsigned char*>(bytes.data()), bytes.size()));
}

template <typename T>
void put(std::string& header, size_t at, T value) {
  std::memcpy(header.data() + at, &value, sizeof(T));
}

template <typename T>
T get(std::string_view header, size_t at) {
  T value;
  std::memcpy(&value, header.data() + at, sizeof(T));
  return value;
}

[[noreturn]] void refuse(const std::string& path, const std::string& why) {
  throw std::runtime_error("cannot read \"" + path + "\": " + why);
}

void check_header(const std::string& path, std::string_view file) {
  if (file.empty()) refuse(path, "it is empty");
  const size_t seen = std::min(file.size(), kMagic.size());
  if (file.substr(0, seen) != kMagic.substr(0, seen)) refuse(path, "it is not a retain file");
  if (file.size() < kHeaderSize) refuse(path, "it is truncated: even its header is incomplete");
  if (get<uint32_t>(file, kHeaderSumAt) != checksum(file.substr(0, kHeaderSumAt))) {
    refuse(path, "it is damaged: the checksum of its header does not match");
  }
  const auto version = get<uint32_t>(file, kVersionAt);
  if (version > kFormatVersion) {
    refuse(path, "it has format version " + std::to_string(version) +
                     ", and this program reads up to " + std::to_string(kFormatVersion));
  }
}

void check_payload(const std::string& path, std::string_view file) {
  const auto expected = get<uint64_t>(file, kSizeAt) + kHeaderSize;
  const auto sizes = std::to_string(expected) + " bytes were written, " +
                     std::to_string(file.size()) + " are there";
  if (file.size() < expected) refuse(path, "it is truncated: " + sizes);
  if (file.size() > expected) refuse(path, "it is damaged: " + sizes);
  if (get<uint32_t>(file, kPayloadSumAt) != checksum(file.substr(kHeaderSize))) {
    refuse(path, "it is damaged: its checksum does not match");
  }
}

}  // namespace

void write_sealed(const std::string& path, std::string_view kind, std::string_view payload) {
  if (kind.empty() || kind.size() >= kKindSize) {
    throw std::invalid_argument("write_sealed: kind must have 1 to 31 characters, got \"" +
                                std::string(kind) + "\"");
  }
  std::string header(kHeaderSize, '\0');
  kMagic.copy(header.data(), kMagic.size());
  put(header, kVersionAt, kFormatVersion);
  put(header, kSizeAt, static_cast<uint64_t>(payload.size()));
  put(header, kPayloadSumAt, checksum(payload));
  kind.copy(header.data() + kKindAt, kind.size());
  put(header, kHeaderSumAt, checksum(std::string_view(header).substr(0, kHeaderSumAt)));
  write_file(path, {header, payload});
}

SealedFile read_sealed(const std::string& path) {
  std::string file = read_file(path);
  check_header(path, file);
  check_payload(path, file);
  const std::string kind(file.data() + kKindAt, ::strnlen(file.data() + kKindAt, kKindSize));
  return {kind, std::move(file)};
}

}  // namespace retain
