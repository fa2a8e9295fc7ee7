// native_tests [part of a name]: runs the tests whose name contains it.
#include <cstdio>
#include <cstring>

#include "check.h"

int main(int argc, char** argv) {
  int run = 0;
  for (const auto& test : native_tests::tests()) {
    if (argc > 1 && std::strstr(test.name, argv[1]) == nullptr) continue;
    const int before = native_tests::failures();
    test.body();
    std::printf("%s %s\n", native_tests::failures() == before ? "ok    " : "FAILED", test.name);
    ++run;
  }
  std::printf("%d tests, %d failed checks\n", run, native_tests::failures());
  return run > 0 && native_tests::failures() == 0 ? 0 : 1;
}
