"""Builds the CUDA sources for the emulated machine of this folder and runs them.

Two builds of every source: "hooks" (races, bounds, uninitialised reads, byte counts; see simt.h) and
"sanitizers" (the compiler's address and undefined-behaviour sanitizers). Objects are kept by a hash of what
they are made from, so that a second session compiles nothing. A run is a process of its own with one thread:
`in_parallel` keeps two cores busy.
"""

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
COMPILER = os.environ.get("CXX", "g++")

_COMMON = ["-std=c++20", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-DREALM_FAST_SIMT"]
_BUILDS = {
    # For kernels, for the harness itself, for linking.
    "hooks": (
        ["-O2", "-DSIMT_HOOKS", "-fsanitize=thread"],
        ["-O2", "-DSIMT_HOOKS"],
        [],
    ),
    "sanitizers": (
        ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
        ["-O1", "-fsanitize=address"],
        ["-fsanitize=address,undefined"],
    ),
}
# Device memory lives as long as the program.
ENVIRONMENT = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}


def unsupported_reason() -> str | None:
    """Why the harness cannot run here, or None."""
    if shutil.which(COMPILER) is None:
        return f"no C++ compiler: {COMPILER} was not found (set CXX)"
    version = subprocess.run([COMPILER, "--version"], capture_output=True, text=True).stdout
    if "Free Software Foundation" not in version:
        return f"the hooks are those of GCC's -fsanitize=thread; {COMPILER} is not GCC (set CXX=g++)"
    if os.uname().machine not in ("x86_64", "aarch64"):
        return f"no stack switch for {os.uname().machine}"
    return None


@dataclass(frozen=True)
class Run:
    """One run of a driver."""

    raised: str
    launches: list[dict[str, Any]]
    errors: list[dict[str, Any]]
    arrays: dict[str, np.ndarray]
    returncode: int
    stderr: str
    options: str

    @property
    def kinds(self) -> set[str]:
        """What was reported; "sanitizer" when a sanitizer ended the run."""
        kinds = {error["kind"] for error in self.errors}
        return kinds | ({"sanitizer"} if self.returncode else set())

    def total(self, count: str, kernel: str = "") -> int:
        return sum(launch[count] for launch in self.launches if kernel in launch["kernel"])


def in_parallel(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """[function(item) for item in items], two at a time."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        return list(pool.map(function, items))


class Harness:
    def __init__(self, cache: Path) -> None:
        self.cache = cache
        cache.mkdir(parents=True, exist_ok=True)
        headers = [*HERE.glob("*.h"), *(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cuh")]
        self._headers = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(headers))).hexdigest()

    def _precompiled(self, flags: list[str]) -> list[str]:
        """Options with which a kernel finds simt.h read already: a third of what compiling one takes."""
        key = hashlib.sha256(repr((COMPILER, flags, self._headers)).encode()).hexdigest()[:20]
        header = self.cache / f"simt-{key}.h"
        target = self.cache / f"simt-{key}.h.gch"
        if not target.exists():
            header.write_text(f'#include "{HERE / "simt.h"}"\n')
            partial = _unfinished(target)
            command = [COMPILER, *_COMMON, *flags, "-x", "c++-header", str(header), "-o", str(partial)]
            subprocess.run(command, check=True)
            partial.replace(target)
        return ["-include", str(header)]

    def _compile(self, source: Path, flags: list[str], include: list[Path]) -> Path:
        command = [COMPILER, *_COMMON, *flags, *(f"-I{path}" for path in include)]
        text = source.read_bytes()
        key = hashlib.sha256(repr((command, source.name, self._headers)).encode() + text)
        for path in include:  # a changed header in a folder of its own
            if ROOT not in path.parents:
                for header in sorted(path.rglob("*.cuh")):
                    key.update(header.read_bytes())
        target = self.cache / f"{source.stem}-{key.hexdigest()[:20]}.o"
        if not target.exists():
            partial = _unfinished(target)
            command += ["-x", "c++", "-c", str(source), "-o", str(partial)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")
            partial.replace(target)
        return target

    def build(
        self,
        driver: str,
        sources: list[Path],
        *,
        build: str = "hooks",
        changed: Path | None = None,
    ) -> Path:
        """Compiles kernels and driver and returns the program.

        `changed` is a folder like csrc with sources that were changed on purpose; sources in it see its headers,
        and are linked first, so that theirs are the inline functions that are kept.
        """
        kernel_flags, harness_flags, link_flags = _BUILDS[build]
        folders = [HERE, ROOT / "csrc"]
        kernel_flags = [*kernel_flags, *self._precompiled(kernel_flags)]
        jobs = []
        for path in sources:
            is_changed = changed is not None and changed in path.parents
            jobs.append((path, kernel_flags, [changed, *folders] if is_changed else folders))
        jobs.sort(key=lambda job: len(job[2]), reverse=True)
        jobs.append((HERE / "simt.cpp", harness_flags, [HERE]))
        if driver:
            jobs.append((HERE / driver, harness_flags, folders))
        objects = in_parallel(lambda job: self._compile(*job), jobs)
        name = hashlib.sha256("".join(path.name for path in objects).encode()).hexdigest()[:20]
        program = self.cache / f"run-{name}"
        if not program.exists():
            partial = _unfinished(program)
            command = [COMPILER, *link_flags, *map(str, objects), "-o", str(partial), "-ldl"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr[-4000:])
            partial.replace(program)
        return program

    def run(
        self,
        program: Path,
        *,
        inputs: dict[str, np.ndarray | None] | None = None,
        outputs: dict[str, tuple[tuple[int, ...], Any]] | None = None,
        timeout: float = 120,
        **options: Any,
    ) -> Run:
        """Runs a driver: arrays go in and come back as raw files, everything else as key=value."""
        words = [
            f"{key}={int(value) if isinstance(value, bool) else value}" for key, value in options.items()
        ]
        with tempfile.TemporaryDirectory() as folder:
            files = []
            for key, array in (inputs or {}).items():
                if array is not None:
                    path = Path(folder, f"{key}.in")
                    path.write_bytes(np.ascontiguousarray(array).tobytes())
                    files.append(f"{key}={path}")
            paths = {key: Path(folder, f"{key}.out") for key in outputs or {}}
            files += [f"{key}={path}" for key, path in paths.items()]
            done = subprocess.run(
                [str(program), *words, *files],
                capture_output=True,
                text=True,
                timeout=timeout,
                env=ENVIRONMENT,
            )
            if done.returncode:
                return Run("", [], [], {}, done.returncode, done.stderr[-6000:], " ".join(words))
            arrays = {}
            for key, (shape, dtype) in (outputs or {}).items():
                if paths[key].exists():
                    arrays[key] = np.frombuffer(paths[key].read_bytes(), dtype).reshape(shape)
        answer = json.loads(done.stdout)
        report = answer["report"]
        return Run(
            answer["raised"], report["launches"], report["errors"], arrays, 0, done.stderr, " ".join(words)
        )


def _unfinished(path: Path) -> Path:
    """A name of this thread's own, to be renamed when the file is whole."""
    return path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.tmp")
