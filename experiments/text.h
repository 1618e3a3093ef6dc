#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace retain {

/// 950, 41.2k, 2.73M, 1.10G.
std::string short_count(double count);
/// 7 s, 1:02, 2:10:05.
std::string short_time(double seconds);
/// 62 %; "-" for NaN.
std::string percent(double share);
/// Fixed decimals; "-" for NaN.
std::string fixed(double value, int decimals);

/// Columns a terminal needs for UTF-8 text without wide characters.
int64_t display_width(const std::string& text);

/// Rows below a header, columns two spaces apart; the first `left` columns flush left, the others
/// right. The last line ends in a newline.
std::string table(const std::vector<std::vector<std::string>>& rows, size_t left = 1);

/// Whether that is what LibTorch's CPU allocator says, in a long line about itself.
bool is_out_of_memory(const std::string& message);

}  // namespace retain
