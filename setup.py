"""Builds `realm_fast._native` with CMake; everything else about the package is in pyproject.toml.

Environment:
    REALM_FAST_CUDA   AUTO (default: CUDA kernels wherever nvcc is found), ON (fail without nvcc), OFF
    SANITIZE          e.g. "address,undefined" or "thread": a build for the sanitizers
    CMAKE_ARGS        more arguments for the configure step
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        source_dir = Path(__file__).resolve().parent
        output_dir = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build_dir = Path(self.build_temp).resolve() / "cmake"
        build_dir.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(source_dir), "-B", str(build_dir),
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output_dir}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DREALM_FAST_CUDA={os.environ.get('REALM_FAST_CUDA', 'AUTO')}",
            f"-DSANITIZE={os.environ.get('SANITIZE', '')}",
        ]  # fmt: skip
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        subprocess.run(configure, check=True)
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
        subprocess.run(["cmake", "--build", str(build_dir), "--parallel", jobs], check=True)


setup(ext_modules=[Extension("realm_fast._native", sources=[])], cmdclass={"build_ext": CMakeBuild})
