#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

namespace retain {

/// The dispatcher's op of a name such as "retain::gru"; what looks it up keeps it.
template <typename Signature>
auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace retain
