#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace retain {

/// What stands before the HDF5 part of every retain file: 512 bytes, an HDF5 user block, so that
/// every HDF5 tool opens the file as it is. Little-endian, the same place in every format version:
///
///   0   char[12]  kMagic
///   12  uint32    format version
///   16  uint64    size of the payload, the bytes after this header
///   24  uint32    CRC-32 of the payload
///   32  char[32]  kind, zero-padded: "checkpoint", "state", "run"
///   508 uint32    CRC-32 of bytes 0 … 507; what is not named above is zero
inline constexpr int64_t kHeaderSize = 512;
inline constexpr std::string_view kMagic{"\x89retain\r\n\x1a\n\0", 12};
inline constexpr uint32_t kFormatVersion = 1;

/// Writes header and payload, whole or not at all. Throws as write_file() does.
void write_sealed(const std::string& path, std::string_view kind, std::string_view payload);

struct SealedFile {
  std::string kind;
  std::string bytes;  ///< Header and payload.
  std::string_view payload() const { return std::string_view(bytes).substr(kHeaderSize); }
};

/// Reads and checks every byte. Throws std::runtime_error that says which of these the file is:
/// missing, empty, foreign, truncated, of a newer format version, damaged.
SealedFile read_sealed(const std::string& path);

}  // namespace retain
