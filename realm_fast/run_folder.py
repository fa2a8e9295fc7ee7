"""One run, one folder: where each artifact of a run lies, and who may write there.

RUN/config.json            the resolved configuration
RUN/run.json               which corpus and tokenizer the run belongs to
RUN/stages.jsonl           one line a finished stage: time, memory, command
RUN/ict/, RUN/warmup/      metrics.jsonl, evaluations.jsonl, checkpoints/, tensorboard/
RUN/pretrain/              metrics.jsonl, refreshes.jsonl, evaluations.jsonl, illustrations.json,
                               checkpoints/, snapshots/, refresher/, tensorboard/
RUN/finetune/              metrics.jsonl, evaluations.jsonl, trainable.json, dev.json,
                               checkpoints/, snapshots/, tensorboard/
RUN/evaluate/              results.json, predictions.jsonl
RUN/corpora/               indexes of other corpora that questions were answered from
RUN/report.html
"""

import contextlib
import datetime
import fcntl
import json
import os
import platform
import resource
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from realm_fast.config import Config
from realm_fast.errors import DataError, Interrupted, ProvenanceError, UserError
from realm_fast.files import disk_errors, read_json, remove_staging, write_json
from realm_fast.token_store import TokenStore

FORMAT_VERSION = 1


class RunFolder:
    """An existing run. `RunFolder.create` makes one; `RunFolder.open_or_create` does what is needed."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise DataError(
                f"{self.path}: no such run; `realm-fast pretrain {self.path} --corpus CORPUS` makes it."
            )
        if not self.manifest_path.is_file():
            raise DataError(f"{self.path}: not a run folder (run.json is missing).")
        self.manifest: dict[str, Any] = read_json(self.manifest_path, "the run's manifest")
        if self.manifest.get("format_version") != FORMAT_VERSION:
            raise DataError(
                f"{self.manifest_path}: run format {self.manifest.get('format_version')!r}; "
                f"this version of realm_fast reads format {FORMAT_VERSION}."
            )

    @classmethod
    def create(cls, path: str | Path, config: Config, store: TokenStore) -> "RunFolder":
        import realm_fast

        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        write_json(path / "config.json", config.to_dict())
        write_json(
            path / "run.json",
            {
                "format_version": FORMAT_VERSION,
                "corpus": str(store.path.resolve()),
                "corpus_hash": store.corpus_hash,
                "tokenizer_hash": store.tokenizer_hash,
                "realm_fast": realm_fast.__version__,
                "created": now_iso(),
                "machine": describe_machine(),
            },
        )
        run = cls(path)
        built = corpus_stages_path(store.path)
        if built.is_file():  # what making the corpus took belongs to the whole
            run.stages_path.write_text(built.read_text(encoding="utf-8"), encoding="utf-8")
        return run

    @classmethod
    def open_or_create(cls, path: str | Path, config: Config, store: TokenStore) -> "RunFolder":
        """Opens the run if it exists and belongs to `store`; otherwise creates it."""
        if (Path(path) / "run.json").exists():
            run = cls(path)
            run.check_store(store)
            return run
        return cls.create(path, config, store)

    @property
    def manifest_path(self) -> Path:
        return self.path / "run.json"

    @property
    def pretrain_dir(self) -> Path:
        return self.path / "pretrain"

    @property
    def snapshots_dir(self) -> Path:
        return self.pretrain_dir / "snapshots"

    @property
    def handover_dir(self) -> Path:
        """What the trainer and a refresher in another process exchange."""
        return self.pretrain_dir / "refresher"

    @property
    def finetune_dir(self) -> Path:
        return self.path / "finetune"

    @property
    def evaluate_dir(self) -> Path:
        return self.path / "evaluate"

    @property
    def report_path(self) -> Path:
        return self.path / "report.html"

    @property
    def stages_path(self) -> Path:
        return self.path / "stages.jsonl"

    def config(self) -> Config:
        where = self.path / "config.json"
        return Config.from_dict(read_json(where, "the run's configuration"), where=str(where))

    def save_config(self, config: Config) -> None:
        """Makes `config` the run's own; a stage does so once it has accepted it."""
        write_json(self.path / "config.json", config.to_dict())

    def store(self) -> TokenStore:
        """The token store the run was made from; refused if it has changed since."""
        store = TokenStore.open(self.manifest["corpus"])
        self.check_store(store)
        return store

    def check_store(self, store: TokenStore) -> None:
        if store.corpus_hash != self.manifest["corpus_hash"]:
            raise ProvenanceError(
                f"run {self.path} belongs to corpus {self.manifest['corpus_hash'][:16]} "
                f"({self.manifest['corpus']}), but {store.path} holds corpus {store.corpus_hash[:16]}. "
                "Give the run its own corpus, or start a new run folder."
            )

    @contextlib.contextmanager
    def lock(self, purpose: str) -> Iterator[None]:
        """Keeps a second writer out of the run. The lock dies with the process that holds it."""
        lock_path = self.path / f".lock-{purpose}"
        with open(lock_path, "a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise UserError(
                    f"{self.path}: another process ({file.read().strip() or 'unknown'}) is at work on its "
                    f"{purpose}. Wait for it, or stop it first."
                ) from None
            file.truncate(0)
            file.write(f"pid {os.getpid()} on {platform.node()}")
            file.flush()
            yield

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Times a stage and, when it ends well, adds its line to stages.jsonl.

        Yields a dictionary for details worth keeping (counts, rates).
        """
        with record_stage(self.stages_path, name) as details:
            yield details

    def clean(self) -> None:
        """Removes what killed processes left unfinished."""
        for folder in (
            self.path, self.pretrain_dir, self.pretrain_dir / "checkpoints", self.snapshots_dir,
            self.finetune_dir, self.finetune_dir / "checkpoints", self.evaluate_dir,
        ):  # fmt: skip
            if folder.is_dir():
                remove_staging(folder)


def corpus_stages_path(store_path: Path) -> Path:
    """Where `realm-fast corpus build` notes what it took: a file beside the store."""
    return store_path.with_name(f"{store_path.name}.stages.jsonl")


@contextlib.contextmanager
def record_stage(path: Path, name: str) -> Iterator[dict[str, Any]]:
    """Adds a line about what was done inside to `path`, if it ended well or was asked to stop.

    Yields details to fill in. Its peak memory is that of the stage where the system can count anew from its
    beginning (Linux), else that of the process so far.
    """
    details: dict[str, Any] = {}
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # 5: forgets the peak
    started, begin = now_iso(), time.monotonic()
    interrupted: Interrupted | None = None
    try:
        yield details
    except Interrupted as error:
        interrupted = error
        details["interrupted"] = str(error)
    record = {
        "stage": name,
        "seconds": round(time.monotonic() - begin, 3),
        "started": started,
        "command": shlex.join([_program_name(), *sys.argv[1:]]),
        "peak_rss_bytes": peak_rss_bytes(),
        "details": details,
    }
    with disk_errors(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
    if interrupted is not None:
        raise interrupted


def _program_name() -> str:
    name = Path(sys.argv[0]).name
    return "realm-fast" if name == "__main__.py" else name  # python -m realm_fast


def now_iso() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def peak_rss_bytes() -> int:
    """The largest resident memory of this process or of any child it has waited for."""
    usage = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return usage * 1024


def describe_machine() -> dict[str, Any]:
    import torch

    from realm_fast.build import build_info, cpu_features

    cpu = "unknown"
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    features = cpu_features()
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "cpu_levels": features["levels"],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "native": build_info(),
    }
