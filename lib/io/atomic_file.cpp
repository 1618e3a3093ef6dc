#include <retain/lib/io/atomic_file.h>

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <stdexcept>
#include <system_error>
#include <utility>

namespace retain {
namespace {

[[noreturn]] void fail(const char* verb, const std::string& path, const std::string& reason) {
  throw std::runtime_error(std::string("cannot ") + verb + " \"" + path + "\": " + reason);
}

[[noreturn]] void fail_errno(const char* verb, const std::string& path) {
  fail(verb, path, std::generic_category().message(errno));
}

std::string folder_of(const std::string& path) {
  const auto folder = std::filesystem::path(path).parent_path().string();
  return folder.empty() ? "." : folder;
}

/// Where to write: `path`, or what it links to. Never a folder, a device or a pipe, which rename()
/// would replace.
std::string checked_target(const std::string& path) {
  namespace fs = std::filesystem;
  std::error_code error;
  if (path.empty()) fail("write", path, "the path is empty");
  const auto status = fs::status(path, error);
  if (fs::is_directory(status)) fail("write", path, "it is a folder");
  if (fs::exists(status) && !fs::is_regular_file(status))
    fail("write", path, "it is not a regular file");
  if (!fs::is_directory(folder_of(path), error)) {
    fail("write", path, "there is no folder \"" + folder_of(path) + "\"");
  }
  return fs::exists(status) ? fs::canonical(path).string() : path;
}

class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() { close(); }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }
  bool close() {
    const int fd = std::exchange(fd_, -1);
    return fd < 0 || ::close(fd) == 0;
  }

 private:
  int fd_;
};

bool write_all(int fd, std::string_view data) {
  constexpr size_t kLargestWrite = size_t{1} << 30;
  while (!data.empty()) {
    const ssize_t written = ::write(fd, data.data(), std::min(data.size(), kLargestWrite));
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return false;
    data.remove_prefix(static_cast<size_t>(written));
  }
  return true;
}

/// Opens the temporary file and holds its lock. A file that a killed process left is taken over.
int open_locked(const std::string& temporary) {
  for (;;) {
    const int fd = ::open(temporary.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0666);
    if (fd < 0) return -1;
    while (::flock(fd, LOCK_EX) != 0 && errno == EINTR) {
    }
    // The writer that we waited for has renamed this file: it is no longer ours to write.
    struct stat held, named;
    if (::fstat(fd, &held) == 0 && ::stat(temporary.c_str(), &named) == 0 &&
        held.st_ino == named.st_ino && held.st_dev == named.st_dev) {
      return fd;
    }
    ::close(fd);
  }
}

bool sync_folder(const std::string& folder) {
  Descriptor fd(::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (fd.get() < 0) return errno == EACCES;  // a folder may be writable and not readable
  return ::fsync(fd.get()) == 0 || errno == EINVAL;
}

}  // namespace

void write_file(const std::string& path, std::initializer_list<std::string_view> pieces) {
  const std::string target = checked_target(path), temporary = target + ".tmp";
  Descriptor file(open_locked(temporary));
  if (file.get() < 0) fail_errno("write", path);
  bool good = ::ftruncate(file.get(), 0) == 0;
  for (const auto piece : pieces) good = good && write_all(file.get(), piece);
  good = good && ::fsync(file.get()) == 0 && ::rename(temporary.c_str(), target.c_str()) == 0;
  if (!good) {
    const int reason = errno;
    ::unlink(temporary.c_str());
    errno = reason;
    fail_errno("write", path);
  }
  if (!file.close() || !sync_folder(folder_of(target))) fail_errno("write", path);
}

void append_file(const std::string& path, std::string_view text) {
  Descriptor file(::open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666));
  struct stat before;
  if (file.get() < 0 || ::fstat(file.get(), &before) != 0) fail_errno("write", path);
  if (!write_all(file.get(), text)) {
    const int reason = errno;
    if (::ftruncate(file.get(), before.st_size) == 0) errno = reason;
    fail_errno("write", path);
  }
  if (!file.close()) fail_errno("write", path);
}

std::string read_file(const std::string& path) {
  Descriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  struct stat status;
  if (file.get() < 0 || ::fstat(file.get(), &status) != 0) fail_errno("read", path);
  if (S_ISDIR(status.st_mode)) fail("read", path, "it is a folder");
  if (!S_ISREG(status.st_mode)) fail("read", path, "it is not a regular file");
  std::string content(static_cast<size_t>(status.st_size), '\0');
  size_t filled = 0;
  while (filled < content.size()) {
    const ssize_t got = ::read(file.get(), content.data() + filled, content.size() - filled);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail_errno("read", path);
    if (got == 0) break;
    filled += static_cast<size_t>(got);
  }
  content.resize(filled);
  return content;
}

}  // namespace retain
