#!/usr/bin/env bash
# Builds the native tests under address+undefined and under thread sanitizers, and runs them; then once more
# with the AVX-512 and AMX levels emulated (emulated_avx512.h, emulated_amx.h) under the address sanitizer, so that
# they run on any AVX2 CPU, and so that somebody watches the loads of tiles, which no sanitizer sees as instructions.
#   tests/native/run_sanitizers.sh [builds...]      e.g. thread; default: address,undefined thread emulated
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
build=${BUILD_DIR:-$root/build/sanitize}
python=${PYTHON:-python3}
jobs=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}
generator=()
if command -v ninja >/dev/null; then generator=(-G Ninja); fi
if [ $# -eq 0 ]; then set -- address,undefined thread emulated; fi
for build_name in "$@"; do
  options=(-DSANITIZE="$build_name" -DREALM_FAST_EMULATED_AVX512=OFF)
  if [ "$build_name" = emulated ]; then
    if ! echo '#include <simde/x86/avx512.h>' | "${CXX:-c++}" -x c++ -mavx2 -E - >/dev/null 2>&1; then
      echo "== native tests, AVX-512 emulated: skipped, no simde/x86/avx512.h (Debian: libsimde-dev)"
      continue
    fi
    options=(-DSANITIZE=address -DREALM_FAST_EMULATED_AVX512=ON)
  fi
  echo "== native tests, $build_name"
  cmake -S "$root" -B "$build/$build_name" "${generator[@]}" -DCMAKE_BUILD_TYPE=RelWithDebInfo \
    "${options[@]}" -DREALM_FAST_NATIVE_TESTS=ON -DREALM_FAST_CUDA=OFF \
    -DPython_EXECUTABLE="$(command -v "$python")" \
    -Dpybind11_DIR="$("$python" -c 'import pybind11; print(pybind11.get_cmake_dir())')" >/dev/null
  cmake --build "$build/$build_name" --target native_tests --parallel "$jobs"
  UBSAN_OPTIONS=print_stacktrace=1 ASAN_OPTIONS=detect_stack_use_after_return=1 \
    TSAN_OPTIONS=halt_on_error=1 "$build/$build_name/native_tests"
done
