#pragma once

#include <c10/core/ScalarType.h>

#include <string>

namespace retain {

/// A dtype as it is written outside C++, such as "float32".
inline std::string dtype_name(c10::ScalarType dtype) { return c10::getDtypeNames(dtype).first; }

}  // namespace retain
