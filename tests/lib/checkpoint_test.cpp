#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <retain/lib/io/checkpoint.h>

#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "support/errors.h"
#include "support/files.h"
#include "support/random_tensors.h"

namespace retain {
namespace {

using ::testing::ElementsAre;
using testing::error_of;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::read_bytes;
using testing::TemporaryFolder;

/// Through one file, in order.
std::vector<Tensor> read_back(const std::vector<Tensor>& tensors) {
  TemporaryFolder folder;
  CheckpointWriter writer(folder / "a.h5");
  for (size_t i = 0; i < tensors.size(); ++i)
    writer.write("group/" + std::to_string(i), tensors[i]);
  writer.commit();
  const CheckpointReader reader(folder / "a.h5");
  std::vector<Tensor> result;
  for (const auto& name : reader.names("group")) result.push_back(reader.tensor(name));
  return result;
}

void expect_same_bits(const Tensor& got, const Tensor& expected) {
  ASSERT_EQ(got.scalar_type(), expected.scalar_type());
  ASSERT_EQ(got.sizes(), expected.sizes());
  const auto flat = expected.contiguous();
  EXPECT_TRUE(got.is_contiguous());
  if (flat.numel() == 0) return;
  EXPECT_EQ(std::memcmp(got.const_data_ptr(), flat.const_data_ptr(), flat.nbytes()), 0)
      << expected.scalar_type();
}

/// Every bit pattern is as likely as any other, NaN with payloads included.
Tensor random_bits(at::IntArrayRef sizes, at::ScalarType dtype, uint64_t seed) {
  auto tensor = at::empty(sizes, dtype);
  auto generator = at::detail::createCPUGenerator(seed);
  auto bytes = at::randint(256, {static_cast<int64_t>(tensor.nbytes())}, generator, at::kByte);
  if (dtype == at::kBool) bytes.bitwise_and_(1);
  if (tensor.nbytes() > 0)
    std::memcpy(tensor.mutable_data_ptr(), bytes.const_data_ptr(), tensor.nbytes());
  return tensor;
}

class CheckpointDtype : public ::testing::TestWithParam<at::ScalarType> {};

TEST_P(CheckpointDtype, ReturnsEveryBitForAnyShapeAndStride) {
  const auto base = random_bits({6, 5, 4}, GetParam(), 9);
  std::vector<Tensor> tensors{base.transpose(0, 2), base.slice(1, 1, 5, 2), base.select(2, 3),
                              base.select(0, 1).unsqueeze(1).expand({5, 3, 4}),
                              base.permute({1, 2, 0}).narrow(0, 2, 2)};
  for (const auto& sizes :
       std::vector<std::vector<int64_t>>{{}, {1}, {7}, {0}, {3, 0, 2}, {5, 3, 2}}) {
    tensors.push_back(random_bits(sizes, GetParam(), 1 + sizes.size()));
  }
  const auto read = read_back(tensors);
  ASSERT_EQ(read.size(), tensors.size());
  for (size_t i = 0; i < read.size(); ++i) expect_same_bits(read[i], tensors[i]);
}

INSTANTIATE_TEST_SUITE_P(All, CheckpointDtype,
                         ::testing::Values(at::kDouble, at::kFloat, at::kHalf, at::kBFloat16,
                                           at::kLong, at::kInt, at::kShort, at::kChar, at::kByte,
                                           at::kBool),
                         [](const auto& info) { return std::string(c10::toString(info.param)); });

TEST(Checkpoint, KeepsTheSignOfANegatedView) {
  const auto view = at::imag(at::complex(testing::randn({4}, 1), testing::randn({4}, 2)).conj());
  ASSERT_TRUE(view.is_neg());
  EXPECT_TRUE(at::equal(read_back({view}).at(0), view.resolve_neg()));
}

TEST(Checkpoint, KeepsTextNumbersAndBytes) {
  TemporaryFolder folder;
  const std::string zeros("a\0b\0", 4), multilingual = "γ = 0.99\nжизнь\n", large(300'000, 'x');
  const std::vector<uint8_t> bytes{0, 255, 10, 13, 26};
  CheckpointWriter writer(folder / "a.h5");
  writer.write("zeros", zeros);
  writer.write("text/multilingual", multilingual);
  writer.write("text/large", large);
  writer.write("text/empty", "");
  writer.write("least", std::numeric_limits<int64_t>::min());
  writer.write("tenth", 0.1);
  writer.write("nan", std::nan("17"));
  writer.write("bytes", bytes);
  writer.write("no bytes", std::vector<uint8_t>{});
  writer.commit();
  const CheckpointReader reader(folder / "a.h5");
  EXPECT_EQ(reader.text("zeros"), zeros);
  EXPECT_EQ(reader.text("text/multilingual"), multilingual);
  EXPECT_EQ(reader.text("text/large"), large);
  EXPECT_EQ(reader.text("text/empty"), "");
  EXPECT_EQ(reader.integer("least"), std::numeric_limits<int64_t>::min());
  EXPECT_EQ(reader.number("tenth"), 0.1);
  EXPECT_EQ(std::bit_cast<uint64_t>(reader.number("nan")), std::bit_cast<uint64_t>(std::nan("17")));
  EXPECT_EQ(reader.bytes("bytes"), bytes);
  EXPECT_THAT(reader.bytes("no bytes"), IsEmpty());
}

TEST(Checkpoint, ListsNamesInTheOrderWritten) {
  TemporaryFolder folder;
  CheckpointWriter writer(folder / "a.h5");
  for (const auto* name : {"z", "model/b", "model/a.0", "model/deep/er", "a"})
    writer.write(name, int64_t{1});
  for (int i = 19; i >= 0; --i) writer.write("many/" + std::to_string(i), int64_t{i});
  writer.commit();
  const CheckpointReader reader(folder / "a.h5");
  EXPECT_THAT(reader.names("model"), ElementsAre("model/b", "model/a.0", "model/deep/er"));
  EXPECT_THAT(reader.names("model/deep"), ElementsAre("model/deep/er"));
  EXPECT_THAT(reader.names("mod"), IsEmpty());
  EXPECT_THAT(reader.names("z"), IsEmpty());
  const auto all = reader.names();
  ASSERT_EQ(all.size(), 25u);
  EXPECT_EQ(all[0], "z");
  EXPECT_EQ(all[4], "a");
  EXPECT_EQ(all[5], "many/19");
  EXPECT_EQ(all[24], "many/0");
  EXPECT_TRUE(reader.contains("model/deep/er"));
  EXPECT_FALSE(reader.contains("model/deep"));
  EXPECT_FALSE(reader.contains("z/under"));
}

TEST(Checkpoint, EqualContentGivesEqualBytes) {
  TemporaryFolder folder;
  for (const auto* name : {"a.h5", "b.h5"}) {
    CheckpointWriter writer(folder / name);
    writer.write("model/w", testing::randn({33, 7}, 3));
    writer.write("config", "text");
    writer.commit();
  }
  EXPECT_EQ(read_bytes(folder / "a.h5"), read_bytes(folder / "b.h5"));
}

TEST(Checkpoint, TwoWritersAtOnceDoNotMix) {
  TemporaryFolder folder;
  CheckpointWriter a(folder / "a.h5"), b(folder / "b.h5");
  a.write("x", int64_t{1});
  b.write("x", int64_t{2});
  a.commit();
  b.commit();
  const CheckpointReader first(folder / "a.h5"), again(folder / "a.h5"), second(folder / "b.h5");
  EXPECT_EQ(first.integer("x"), 1);
  EXPECT_EQ(again.integer("x"), 1);
  EXPECT_EQ(second.integer("x"), 2);
}

TEST(Checkpoint, WithoutCommitNothingIsWritten) {
  TemporaryFolder folder;
  { CheckpointWriter(folder / "a.h5").write("x", int64_t{1}); }
  EXPECT_THAT(folder.files(), IsEmpty());
}

TEST(Checkpoint, AReaderIsNotTouchedByALaterWrite) {
  TemporaryFolder folder;
  const auto write = [&](int64_t value) {
    CheckpointWriter writer(folder / "a.h5");
    writer.write("x", value);
    writer.commit();
  };
  write(1);
  const CheckpointReader reader(folder / "a.h5");
  write(2);
  EXPECT_EQ(reader.integer("x"), 1);
  EXPECT_EQ(CheckpointReader(folder / "a.h5").integer("x"), 2);
  EXPECT_THAT(folder.files(), ElementsAre("a.h5"));
}

TEST(Checkpoint, WrongEntriesAreNamedWithTheirFile) {
  TemporaryFolder folder;
  const auto path = folder / "a.h5";
  CheckpointWriter writer(path);
  writer.write("config", "text");
  writer.write("model/w", at::ones({2, 2}));
  writer.write("progress/updates", int64_t{3});
  writer.commit();
  const CheckpointReader reader(path);
  const auto from = " from \"" + path + "\": ";
  EXPECT_EQ(error_of([&] { reader.tensor("model/v"); }),
            "cannot read \"model/v\"" + from + "there is no such entry");
  EXPECT_EQ(error_of([&] { reader.text("absent"); }),
            "cannot read \"absent\"" + from + "there is no such entry");
  EXPECT_EQ(error_of([&] { reader.tensor("model"); }),
            "cannot read \"model\"" + from + "it is a group");
  EXPECT_EQ(error_of([&] { reader.tensor("config"); }),
            "cannot read \"config\"" + from + "it is no tensor");
  EXPECT_EQ(error_of([&] { reader.text("model/w"); }),
            "cannot read \"model/w\"" + from + "it is no text");
  EXPECT_EQ(error_of([&] { reader.integer("model/w"); }),
            "cannot read \"model/w\"" + from + "it is no integer");
  EXPECT_EQ(error_of([&] { reader.number("progress/updates"); }),
            "cannot read \"progress/updates\"" + from + "it is no number");
  EXPECT_EQ(error_of([&] { reader.bytes("model/w"); }),
            "cannot read \"model/w\"" + from + "it is no row of bytes");
}

TEST(Checkpoint, WrongWritesAreRefusedAndNamed) {
  TemporaryFolder folder;
  CheckpointWriter writer(folder / "a.h5");
  writer.write("a", int64_t{1});
  EXPECT_THAT(error_of([&] { writer.write("a", int64_t{2}); }),
              HasSubstr("cannot write \"a\" to \""));
  EXPECT_THAT(error_of([&] { writer.write("a", int64_t{2}); }), HasSubstr("the name is taken"));
  EXPECT_THAT(error_of([&] { writer.write("a/b", int64_t{2}); }),
              HasSubstr("cannot write \"a/b\""));
  EXPECT_THAT(error_of([&] { writer.write("t", Tensor()); }), HasSubstr("undefined"));
  EXPECT_THAT(error_of([&] { writer.write("t", at::ones({2}, at::kComplexFloat)); }),
              HasSubstr("complex64"));
  EXPECT_THAT(error_of([&] { writer.write("t", at::ones({2}, at::kMeta)); }), HasSubstr("meta"));
  for (const auto* name : {"", "/", "/a", "b/", "b//c", "./b", "b/../c"}) {
    EXPECT_THAT(error_of([&] { writer.write(name, int64_t{2}); }), HasSubstr("a name is")) << name;
  }
  writer.commit();
  const CheckpointReader reader(folder / "a.h5");
  EXPECT_THAT(reader.names(), ElementsAre("a"));
  EXPECT_EQ(reader.integer("a"), 1);
}

TEST(Checkpoint, AnotherKindIsRefused) {
  TemporaryFolder folder;
  CheckpointWriter writer(folder / "a.h5", "state");
  writer.write("x", int64_t{1});
  writer.commit();
  EXPECT_THAT(error_of([&] { CheckpointReader(folder / "a.h5"); }),
              HasSubstr("a.h5\": it is a state file, not a checkpoint file"));
  EXPECT_EQ(CheckpointReader(folder / "a.h5", "state").integer("x"), 1);
  EXPECT_EQ(CheckpointReader(folder / "a.h5", "").kind(), "state");
}

TEST(Checkpoint, ErrorsArePrintedByNobody) {
  TemporaryFolder folder;
  ::testing::internal::CaptureStderr();
  {
    CheckpointWriter writer(folder / "a.h5");
    writer.write("a", int64_t{1});
    error_of([&] { writer.write("a/b", int64_t{1}); });
    writer.commit();
    error_of([&] { CheckpointReader(folder / "a.h5").tensor("b/c"); });
  }
  EXPECT_EQ(::testing::internal::GetCapturedStderr(), "");
}

/// checkpoint_h5py_test.py names the file and reads it with h5py.
TEST(Checkpoint, IsPlainHdf5BehindItsHeader) {
  TemporaryFolder folder;
  const char* named = std::getenv("RETAIN_SAMPLE");
  const std::string path = named ? named : folder / "sample.h5";
  CheckpointWriter writer(path);
  const auto ramp = at::arange(6, at::kFloat).view({2, 3});
  writer.write("config", "world = рекорд\n");
  writer.write("progress/updates", int64_t{12});
  writer.write("progress/best", 0.25);
  for (const auto dtype : {at::kDouble, at::kFloat, at::kHalf, at::kLong, at::kInt, at::kShort,
                           at::kChar, at::kByte, at::kBFloat16, at::kBool}) {
    writer.write("tensors/" + c10::getDtypeNames(dtype).first, ramp.to(dtype).t());
  }
  writer.write("tensors/empty", at::empty({0, 4}));
  writer.commit();
  EXPECT_EQ(read_bytes(path).substr(512, 8), "\x89HDF\r\n\x1a\n");
}

TEST(Describe, ShowsEveryEntryAligned) {
  TemporaryFolder folder;
  CheckpointWriter writer(folder / "a.h5");
  writer.write("config", "world = recall\nhorizon = 300\n");
  writer.write("model/core.weight", at::zeros({64, 4, 128}));
  writer.write("model/core.bias", at::zeros({128}, at::kBFloat16));
  writer.write("progress/updates", int64_t{12});
  writer.write("progress/best", 0.25);
  writer.write("progress/deep/note", "short");
  writer.commit();
  const auto text = describe(folder / "a.h5");
  EXPECT_EQ(text.substr(text.find("\n\n") + 2),
            "config         text                    29 B\n"
            "    | world = recall\n"
            "    | horizon = 300\n"
            "model/\n"
            "  core.weight  float32   [64, 4, 128]  128.0 KiB\n"
            "  core.bias    bfloat16  [128]         256 B\n"
            "progress/\n"
            "  updates      int64     12            8 B\n"
            "  best         float64   0.25          8 B\n"
            "  deep/\n"
            "    note       text      short         5 B\n");
  EXPECT_THAT(text, HasSubstr("a.h5: checkpoint file, format version 1, "));
}

}  // namespace
}  // namespace retain
