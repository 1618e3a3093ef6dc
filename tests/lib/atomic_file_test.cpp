#include <gmock/gmock.h>
#include <grp.h>
#include <gtest/gtest.h>
#include <retain/lib/io/atomic_file.h>
#include <retain/lib/io/checkpoint.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <thread>

#include "support/errors.h"
#include "support/files.h"
#include "support/random_tensors.h"

namespace retain {
namespace {

using ::testing::ElementsAre;
using testing::error_of;
using ::testing::HasSubstr;
using testing::read_bytes;
using testing::TemporaryFolder;
using testing::write_bytes;

/// Runs `function` in a process of its own, whose limits and rights it may change, and hands back
/// what it returns.
template <typename Function>
std::string in_child(const Function& function) {
  int ends[2];
  if (::pipe(ends) != 0) return "no pipe";
  const pid_t child = ::fork();
  if (child == 0) {
    const std::string result = function();
    const bool sent =
        ::write(ends[1], result.data(), result.size()) == static_cast<ssize_t>(result.size());
    ::_exit(sent ? 0 : 1);
  }
  ::close(ends[1]);
  std::string result;
  char buffer[512];
  for (ssize_t got; (got = ::read(ends[0], buffer, sizeof(buffer))) > 0;)
    result.append(buffer, got);
  ::close(ends[0]);
  int status = 0;
  ::waitpid(child, &status, 0);
  return status == 0 ? result : "child ended with status " + std::to_string(status);
}

TEST(WriteFile, JoinsThePieces) {
  TemporaryFolder folder;
  const std::string zeros("\0\n", 2);
  write_file(folder / "a", {"head ", "", zeros, "tail"});
  EXPECT_EQ(read_file(folder / "a"), "head " + zeros + "tail");
  write_file(folder / "a", {});
  EXPECT_EQ(read_file(folder / "a"), "");
  EXPECT_THAT(folder.files(), ElementsAre("a"));
}

TEST(WriteFile, TakesOverWhatAKilledProcessLeft) {
  TemporaryFolder folder;
  write_bytes(folder / "a.tmp", std::string(1000, 'x'));
  write_file(folder / "a", {"short"});
  EXPECT_EQ(read_file(folder / "a"), "short");
  EXPECT_THAT(folder.files(), ElementsAre("a"));
}

TEST(WriteFile, WritesThroughALink) {
  TemporaryFolder folder;
  write_file(folder / "target", {"old"});
  std::filesystem::create_symlink("target", folder / "link");
  write_file(folder / "link", {"new"});
  EXPECT_TRUE(std::filesystem::is_symlink(folder / "link"));
  EXPECT_EQ(read_file(folder / "target"), "new");
}

TEST(WriteFile, RefusesWhatIsNoFile) {
  TemporaryFolder folder;
  std::filesystem::create_directory(folder / "folder");
  ASSERT_EQ(::mkfifo((folder / "pipe").c_str(), 0600), 0);
  EXPECT_THAT(error_of([&] { write_file(folder / "folder", {"x"}); }),
              HasSubstr("folder\": it is a folder"));
  EXPECT_THAT(error_of([&] { write_file(folder / "pipe", {"x"}); }),
              HasSubstr("pipe\": it is not a regular file"));
  EXPECT_EQ(
      error_of([&] { write_file(folder / "no/a", {"x"}); }),
      "cannot write \"" + (folder / "no/a") + "\": there is no folder \"" + (folder / "no") + "\"");
  EXPECT_EQ(error_of([] { write_file("", {"x"}); }), "cannot write \"\": the path is empty");
  EXPECT_THAT(folder.files(), ElementsAre("folder", "pipe"));
}

TEST(WriteFile, AReadOnlyFolderKeepsTheOldFile) {
  TemporaryFolder folder;
  write_file(folder / "a", {"old"});
  ASSERT_EQ(::chmod(folder.path().c_str(), 0555), 0);
  const auto error = in_child([&] {
    if (::getuid() == 0 &&
        (::setgroups(0, nullptr) != 0 || ::setgid(65534) != 0 || ::setuid(65534) != 0)) {
      return std::string("cannot give up root's rights");
    }
    return error_of([&] { write_file(folder / "a", {"new"}); });
  });
  ASSERT_EQ(::chmod(folder.path().c_str(), 0755), 0);
  EXPECT_EQ(error, "cannot write \"" + (folder / "a") + "\": Permission denied");
  EXPECT_EQ(read_file(folder / "a"), "old");
  EXPECT_THAT(folder.files(), ElementsAre("a"));
}

TEST(WriteFile, AFileSizeLimitKeepsTheOldFile) {
  TemporaryFolder folder;
  write_file(folder / "a", {"old"});
  const std::string large(1 << 20, 'x');
  const auto error = in_child([&] {
    std::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{100'000, 100'000};
    ::setrlimit(RLIMIT_FSIZE, &limit);
    return error_of([&] { write_file(folder / "a", {large}); });
  });
  EXPECT_EQ(error, "cannot write \"" + (folder / "a") + "\": File too large");
  EXPECT_EQ(read_file(folder / "a"), "old");
  EXPECT_THAT(folder.files(), ElementsAre("a"));
}

TEST(WriteFile, AFullDiskKeepsTheOldCheckpoint) {
  TemporaryFolder folder;
  const auto path = folder / "a.h5";
  CheckpointWriter small(path), large(path);
  small.write("x", int64_t{1});
  large.write("x", testing::randn({1 << 18}, 1));
  const auto result = in_child([&]() -> std::string {
    // A file system of this process alone, too small for the second file.
    if (::unshare(CLONE_NEWNS) != 0 ||
        ::mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0 ||
        ::mount("tmpfs", folder.path().c_str(), "tmpfs", 0, "size=256k") != 0) {
      return "cannot mount";
    }
    small.commit();
    const auto before = read_bytes(path);
    auto error = error_of([&] { large.commit(); });
    if (read_bytes(path) != before) error += " and the old file changed";
    if (folder.files() != std::vector<std::string>{"a.h5"})
      error += " and a temporary file was left";
    return error;
  });
  if (result == "cannot mount") GTEST_SKIP() << "no right to mount a small disk";
  EXPECT_EQ(result, "cannot write \"" + path + "\": No space left on device");
}

TEST(WriteFile, AReaderSeesOneWriterOrTheOtherNeverAMix) {
  TemporaryFolder folder;
  const std::string a(200'000, 'a'), b(300'000, 'b');
  write_file(folder / "x", {a});
  std::atomic<int> running{2};
  const auto write = [&](const std::string& content) {
    for (int i = 0; i < 20; ++i) write_file(folder / "x", {content});
    --running;
  };
  std::thread first(write, a), second(write, b);
  while (running > 0) {
    const auto seen = read_file(folder / "x");
    EXPECT_TRUE(seen == a || seen == b) << seen.size();
  }
  first.join();
  second.join();
  EXPECT_THAT(folder.files(), ElementsAre("x"));
}

TEST(WriteFile, AKilledWriterLeavesAWholeFile) {
  TemporaryFolder folder;
  const std::string a(2'000'000, 'a'), b(1'000'000, 'b');
  write_file(folder / "x", {a});
  for (int round = 0; round < 8; ++round) {
    const pid_t child = ::fork();
    if (child == 0) {
      ::alarm(30);  // should the test die before it kills this
      for (;;) {
        write_file(folder / "x", {b});
        write_file(folder / "x", {a});
      }
    }
    ::usleep(static_cast<useconds_t>(3000 * (round + 1)));
    ::kill(child, SIGKILL);
    ::waitpid(child, nullptr, 0);
    const auto seen = read_file(folder / "x");
    EXPECT_TRUE(seen == a || seen == b) << seen.size();
  }
  write_file(folder / "x", {"end"});
  EXPECT_THAT(folder.files(), ElementsAre("x"));
}

TEST(AppendFile, AddsAtTheEnd) {
  TemporaryFolder folder;
  append_file(folder / "a", "one\n");
  append_file(folder / "a", "two\n");
  EXPECT_EQ(read_file(folder / "a"), "one\ntwo\n");
  EXPECT_THAT(error_of([&] { append_file(folder / "no/a", "x"); }),
              HasSubstr("No such file or directory"));
}

TEST(AppendFile, TakesBackAPieceThatDidNotFit) {
  TemporaryFolder folder;
  append_file(folder / "a", "one\n");
  const auto error = in_child([&] {
    std::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{10, 10};
    ::setrlimit(RLIMIT_FSIZE, &limit);
    return error_of([&] { append_file(folder / "a", "a line that is too long\n"); });
  });
  EXPECT_EQ(error, "cannot write \"" + (folder / "a") + "\": File too large");
  EXPECT_EQ(read_file(folder / "a"), "one\n");
}

TEST(ReadFile, NamesWhatCannotBeRead) {
  TemporaryFolder folder;
  ASSERT_EQ(::mkfifo((folder / "pipe").c_str(), 0600), 0);
  EXPECT_EQ(error_of([&] { read_file(folder / "a"); }),
            "cannot read \"" + (folder / "a") + "\": No such file or directory");
  EXPECT_THAT(error_of([&] { read_file(folder.path()); }), HasSubstr("it is a folder"));
  EXPECT_THAT(error_of([&] { read_file(folder / "pipe"); }), HasSubstr("it is not a regular file"));
}

}  // namespace
}  // namespace retain
