#!/usr/bin/env bash
# Builds the native tests under address+undefined and under thread sanitizers, and runs them.
#   tests/native/run_sanitizers.sh [sanitizers...]      e.g. thread; default: both
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
build=${BUILD_DIR:-$root/build/sanitize}
python=${PYTHON:-python3}
jobs=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}
generator=()
if command -v ninja >/dev/null; then generator=(-G Ninja); fi
if [ $# -eq 0 ]; then set -- address,undefined thread; fi
for sanitize in "$@"; do
  echo "== native tests, -fsanitize=$sanitize"
  cmake -S "$root" -B "$build/$sanitize" "${generator[@]}" -DCMAKE_BUILD_TYPE=RelWithDebInfo \
    -DSANITIZE="$sanitize" -DREALM_FAST_NATIVE_TESTS=ON -DREALM_FAST_CUDA=OFF \
    -DPython_EXECUTABLE="$(command -v "$python")" \
    -Dpybind11_DIR="$("$python" -c 'import pybind11; print(pybind11.get_cmake_dir())')" >/dev/null
  cmake --build "$build/$sanitize" --target native_tests --parallel "$jobs"
  UBSAN_OPTIONS=print_stacktrace=1 ASAN_OPTIONS=detect_stack_use_after_return=1 \
    TSAN_OPTIONS=halt_on_error=1 "$build/$sanitize/native_tests"
done
