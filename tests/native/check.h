// The smallest test runner: TEST registers, CHECK counts; main.cpp runs. For the native tests that the
// sanitizers see.
#pragma once

#include <cstdio>
#include <functional>
#include <string>
#include <vector>

namespace native_tests {

struct Test {
  const char* name;
  void (*body)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}
inline int& failures() {
  static int count = 0;
  return count;
}

struct Register {
  Register(const char* name, void (*body)()) { tests().push_back({name, body}); }
};

}  // namespace native_tests

#define TEST(name)                                                  \
  static void name();                                               \
  static const native_tests::Register register_##name(#name, name); \
  static void name()

#define CHECK(condition)                                                        \
  do {                                                                          \
    if (!(condition)) {                                                         \
      ++native_tests::failures();                                               \
      std::printf("%s:%d: CHECK(%s) failed\n", __FILE__, __LINE__, #condition); \
    }                                                                           \
  } while (false)
