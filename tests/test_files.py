"""Artifacts are complete or absent, whatever interrupts the writing."""

import errno
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from realm_fast.errors import CorruptArtifactError, DataError, DiskFullError
from realm_fast.files import (
    STAGING_PREFIX,
    atomic_dir,
    atomic_file,
    disk_errors,
    read_json,
    remove_staging,
    sha256_file,
    write_json,
)


def test_an_error_leaves_the_old_file_and_no_debris(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})
    with pytest.raises(RuntimeError), atomic_file(path) as file:  # noqa: PT012
        file.write(b"half")
        raise RuntimeError
    assert read_json(path, "a") == {"x": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_an_error_leaves_no_folder(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_dir(tmp_path / "out") as staging:  # noqa: PT012
        (staging / "x").write_text("half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []
    with atomic_dir(tmp_path / "out") as staging:
        (staging / "sub").mkdir()
        (staging / "sub" / "x").write_text("whole")
    assert (tmp_path / "out" / "sub" / "x").read_text() == "whole"


def test_a_file_has_the_permissions_the_umask_says(tmp_path):
    old = os.umask(0o027)
    try:
        write_json(tmp_path / "a.json", 1)
    finally:
        os.umask(old)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o640


def test_killed_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})
    script = textwrap.dedent(f"""
        import os, signal
        from realm_fast.files import atomic_file
        with atomic_file({str(path)!r}) as file:
            file.write(b"half"); file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    assert read_json(path, "a") == {"x": 1}
    assert [name for name in os.listdir(tmp_path) if name.startswith(STAGING_PREFIX)]
    remove_staging(tmp_path)
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_full_disk_is_named(tmp_path):
    with pytest.raises(DiskFullError, match=r"big.bin: no space left"), disk_errors(tmp_path / "big.bin"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_really_full_disk(tmp_path):
    # /dev/full fails every write with ENOSPC, as a full disk does.
    with (
        pytest.raises(DiskFullError),
        disk_errors(tmp_path / "x"),
        open("/dev/full", "wb", buffering=0) as file,
    ):
        file.write(b"x")


def test_json_errors_name_the_file_and_its_role(tmp_path):
    with pytest.raises(DataError, match=r"no.json: the manifest does not exist"):
        read_json(tmp_path / "no.json", "the manifest")
    (tmp_path / "bad.json").write_text('{"x": ')
    with pytest.raises(CorruptArtifactError, match=r"bad.json: the manifest is not valid JSON"):
        read_json(tmp_path / "bad.json", "the manifest")
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "nan.json", float("nan"))
    assert not (tmp_path / "nan.json").exists()


def test_sha256(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_file(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
