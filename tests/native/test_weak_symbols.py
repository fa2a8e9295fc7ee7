"""Code for one CPU level must not leak into the others.

A template or inline function with external linkage becomes a weak symbol in every object that uses it, and
the linker keeps one copy: perhaps the one compiled for AVX-512, which an older CPU cannot run. So the sources
of a CPU level may define no weak symbols. Their names say which they are (CMakeLists.txt).
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512cd"],
    "avx512bf16": ["-mavx512bf16"],
    "avx512vnni": ["-mavx512vnni"],
    "amx": ["-mavx512bf16", "-mavx512vnni", "-mamx-tile", "-mamx-bf16", "-mamx-int8"],
}
SOURCES = sorted(
    p for p in ROOT.glob("csrc/*/*.cpp") if re.search(r"_(avx2|avx512(bf16|vnni)?|amx)\.cpp$", p.name)
)


def flags_of(source: Path) -> list[str]:
    level = source.stem.rsplit("_", 1)[1]
    flags = [*FLAGS["avx2"]]
    if level != "avx2":
        flags += FLAGS["avx512"] + FLAGS.get(level, [])
    return flags


def weak_symbols(source: Path, folder: Path) -> list[str]:
    # Without optimisation nothing is inlined away: whatever could be emitted is.
    command = ["c++", "-std=c++20", "-O0", "-DREALM_FAST_X86=1", "-I", str(ROOT / "csrc"), *flags_of(source)]
    target = folder / (source.stem + ".o")
    subprocess.run(
        [*command, "-c", str(source), "-o", str(target)], check=True, capture_output=True, text=True
    )
    names = subprocess.run(["nm", "-C", str(target)], check=True, capture_output=True, text=True).stdout
    return [line for line in names.splitlines() if re.match(r"[0-9a-f]+ [WVu] ", line)]


@pytest.mark.skipif(
    shutil.which("c++") is None or shutil.which("nm") is None or not SOURCES, reason="needs c++ and nm"
)
class TestWeakSymbols:
    @pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.name)
    def test_sources_of_a_cpu_level_define_none(self, source, tmp_path):
        assert weak_symbols(source, tmp_path) == []

    def test_the_test_sees_them(self, tmp_path):
        source = tmp_path / "planted_avx512.cpp"
        source.write_text("#include <algorithm>\nint largest(int a, int b) { return std::max(a, b); }\n")
        assert any("std::max" in line or "max<int>" in line for line in weak_symbols(source, tmp_path))
