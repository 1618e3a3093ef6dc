#pragma once

#include <initializer_list>
#include <string>
#include <string_view>

namespace retain {

/// Replaces the file `path` by `pieces`, one after the other, whole or not at all: they are written
/// to "<path>.tmp", synced, and renamed. Two writers of one path take turns. Throws
/// std::runtime_error naming the path and the reason; `path` is then as it was, and no temporary is
/// left.
void write_file(const std::string& path, std::initializer_list<std::string_view> pieces);

/// Adds `text` at the end of `path`, which is made if need be, with one write. Throws as
/// write_file() does, and takes back what was written of it.
void append_file(const std::string& path, std::string_view text);

/// The whole of a regular file. Throws std::runtime_error naming the path and the reason.
std::string read_file(const std::string& path);

}  // namespace retain
