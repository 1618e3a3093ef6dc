#pragma once

#include <c10/util/Exception.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

namespace retain::testing {

/// What `function` throws, without a backtrace; "" and a failure if it throws nothing.
template <typename Function>
std::string error_of(const Function& function) {
  try {
    function();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  } catch (const std::exception& error) {
    return error.what();
  }
  ADD_FAILURE() << "nothing was thrown";
  return "";
}

/// Demands that `function` throws c10::Error and that its message contains every one of `words`.
template <typename Function>
void expect_error(Function function, std::initializer_list<const char*> words) {
  try {
    function();
    ADD_FAILURE() << "nothing was thrown; expected an error about " << *words.begin();
  } catch (const c10::Error& error) {
    for (const char* word : words) {
      EXPECT_THAT(std::string(error.what_without_backtrace()), ::testing::HasSubstr(word));
    }
  }
}

}  // namespace retain::testing
