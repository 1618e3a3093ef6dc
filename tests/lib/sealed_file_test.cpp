#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <retain/lib/io/checkpoint.h>
#include <retain/lib/io/sealed_file.h>

#include <cstring>

#include "support/errors.h"
#include "support/files.h"

namespace retain {
namespace {

using ::testing::EndsWith;
using testing::error_of;
using ::testing::HasSubstr;
using testing::read_bytes;
using testing::TemporaryFolder;
using testing::write_bytes;

std::string checkpoint_bytes(const TemporaryFolder& folder) {
  CheckpointWriter writer(folder / "good.h5");
  writer.write("model/w", at::arange(12, at::kFloat).view({3, 4}));
  writer.write("config", "text");
  writer.commit();
  return read_bytes(folder / "good.h5");
}

std::string refusal(const TemporaryFolder& folder, const std::string& bytes) {
  write_bytes(folder / "bad.h5", bytes);
  return error_of([&] { CheckpointReader(folder / "bad.h5"); });
}

/// CRC-32 as IEEE 802.3 defines it, a bit at a time.
uint32_t crc32(const std::string& bytes) {
  uint32_t sum = 0xffffffffu;
  for (const char byte : bytes) {
    sum ^= static_cast<unsigned char>(byte);
    for (int bit = 0; bit < 8; ++bit) sum = (sum >> 1) ^ (sum & 1 ? 0xedb88320u : 0);
  }
  return ~sum;
}

/// Sets the version and makes the header's checksum right again.
std::string with_version(std::string bytes, uint32_t version) {
  std::memcpy(bytes.data() + 12, &version, 4);
  const uint32_t sum = crc32(bytes.substr(0, 508));
  std::memcpy(bytes.data() + 508, &sum, 4);
  return bytes;
}

TEST(SealedFile, ReturnsKindAndPayload) {
  TemporaryFolder folder;
  for (const std::string& payload :
       {std::string(), std::string("\0x", 2), std::string(70'000, 'y')}) {
    write_sealed(folder / "a", "run", payload);
    const auto file = read_sealed(folder / "a");
    EXPECT_EQ(file.kind, "run");
    EXPECT_EQ(file.payload(), payload);
  }
  EXPECT_THAT(error_of([&] { write_sealed(folder / "b", "", "x"); }),
              HasSubstr("kind must have 1 to 31"));
  EXPECT_THAT(error_of([&] { write_sealed(folder / "b", std::string(32, 'k'), "x"); }),
              HasSubstr("1 to 31"));
}

/// A file of a few bytes behind its header, so that each of them can be tried.
std::string small_file(const TemporaryFolder& folder) {
  write_sealed(folder / "small", "checkpoint", "a payload of a few bytes");
  return read_bytes(folder / "small");
}

void expect_flip_refused(const TemporaryFolder& folder, std::string bytes, size_t i) {
  bytes[i] = static_cast<char>(bytes[i] ^ (1 << (i % 8)));
  const auto error = refusal(folder, bytes);
  ASSERT_THAT(error, HasSubstr(i < kMagic.size() ? "it is not a retain file" : "it is damaged: "))
      << i;
  ASSERT_THAT(error, HasSubstr("cannot read \"" + (folder / "bad.h5") + "\": ")) << i;
}

TEST(SealedFile, RefusesEveryFlippedByte) {
  TemporaryFolder folder;
  const auto small = small_file(folder), checkpoint = checkpoint_bytes(folder);
  for (size_t i = 0; i < small.size(); ++i) expect_flip_refused(folder, small, i);
  for (size_t i = kHeaderSize; i < checkpoint.size(); i += 37)
    expect_flip_refused(folder, checkpoint, i);
}

TEST(SealedFile, RefusesEveryTruncation) {
  TemporaryFolder folder;
  const auto small = small_file(folder), checkpoint = checkpoint_bytes(folder);
  EXPECT_THAT(refusal(folder, ""), EndsWith("bad.h5\": it is empty"));
  for (size_t length = 1; length < small.size(); ++length) {
    ASSERT_THAT(refusal(folder, small.substr(0, length)), HasSubstr("it is truncated: ")) << length;
  }
  for (size_t length = kHeaderSize; length < checkpoint.size(); length += 97) {
    ASSERT_THAT(refusal(folder, checkpoint.substr(0, length)), HasSubstr("it is truncated: "))
        << length;
  }
  EXPECT_THAT(refusal(folder, checkpoint + "x"), HasSubstr("it is damaged: "));
}

TEST(SealedFile, RefusesForeignFiles) {
  TemporaryFolder folder;
  const auto good = checkpoint_bytes(folder);
  const auto plain_hdf5 = good.substr(kHeaderSize);
  ASSERT_EQ(plain_hdf5.substr(1, 3), "HDF");
  for (const auto& bytes : {plain_hdf5, std::string("x"), std::string(4096, '\0'),
                            std::string("PK\x03\x04 a zip file")}) {
    EXPECT_THAT(refusal(folder, bytes), EndsWith("it is not a retain file"));
  }
}

TEST(SealedFile, RefusesANewerFormatVersion) {
  TemporaryFolder folder;
  const auto good = checkpoint_bytes(folder);
  EXPECT_THAT(refusal(folder, with_version(good, 2)),
              EndsWith("it has format version 2, and this program reads up to 1"));
  EXPECT_EQ(with_version(good, kFormatVersion), good);
}

TEST(SealedFile, RefusesAMissingFileAndAFolder) {
  TemporaryFolder folder;
  EXPECT_EQ(error_of([&] { CheckpointReader(folder / "no.h5"); }),
            "cannot read \"" + (folder / "no.h5") + "\": No such file or directory");
  EXPECT_EQ(error_of([&] { CheckpointReader(folder.path()); }),
            "cannot read \"" + folder.path() + "\": it is a folder");
}

TEST(SealedFile, RefusesASealedPayloadThatIsNoHdf5) {
  TemporaryFolder folder;
  write_sealed(folder / "a.h5", "checkpoint", "not HDF5");
  EXPECT_THAT(error_of([&] { CheckpointReader(folder / "a.h5"); }),
              HasSubstr("a.h5\": H5Fopen failed"));
}

}  // namespace
}  // namespace retain
