"""Checkpoints that are complete or absent, and that continue training bit for bit.

    FOLDER/step-00000200/{embedder/,reader/,optimizer.safetensors,state.json}
    FOLDER/latest.json                                               {"name": "step-00000200"}

A checkpoint is staged beside its place, synced and renamed: a kill at any moment leaves the one before.
state.json comes with the size and SHA-256 of every other file, and with the run's identity (the settings and
hashes that shape the trajectory), which a resume compares setting by setting.

    save_checkpoint(folder, step, modules={"reader": reader}, optimizer=optimizer,
                    state={"skipped": 3}, identity=identity_of(config, ["pretrain"]), keep=2)
    checkpoint = newest_checkpoint(folder)          # None if there is none
    checkpoint.check_identity(identity)
    reader = Reader.load(checkpoint.module_folder("reader"))
    checkpoint.load_optimizer(optimizer)
"""

import contextlib
import errno
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from realm_fast.config import Config
from realm_fast.errors import ConfigError, CorruptArtifactError, DataError, ProvenanceError
from realm_fast.files import (
    STAGING_PREFIX,
    atomic_dir,
    fsync_dir,
    read_json,
    remove_staging,
    sha256_file,
    write_json,
)

FORMAT_VERSION = 1
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
LATEST_FILE = "latest.json"
_NAME = re.compile(r"step-(\d{8,})")
_log = logging.getLogger(__name__)

# Settings that may differ between a run and its continuation: they change what is watched or kept, where
# and how fast it is computed, not what is computed.
FREE_SETTINGS = frozenset(
    {
        "device",
        "num_threads",
        "corpus.num_workers",
        "index.residence",
        "ict.checkpoint_every_steps",
        "ict.keep_checkpoints",
        "ict.log_every_steps",
        "warmup.checkpoint_every_steps",
        "warmup.keep_checkpoints",
        "warmup.log_every_steps",
        "pretrain.checkpoint_every_steps",
        "pretrain.keep_checkpoints",
        "pretrain.log_every_steps",
        "pretrain.illustrations",
        "refresh.num_threads",
        "refresh.cpu_affinity",
        "refresh.device",
        "refresh.keep_snapshots",
        "refresh.max_restarts",
        "finetune.checkpoint_every_steps",
        "finetune.keep_checkpoints",
        "finetune.log_every_steps",
    }
)


class SavesItself(Protocol):
    """A module that writes itself into a new folder (Embedder, Reader, SpanReader)."""

    def save(self, folder: Path) -> Any: ...


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def identity_of(config: Config, sections: Sequence[str], **more: Any) -> dict[str, Any]:
    """What a resume compares: the seed, `sections` of the settings less FREE_SETTINGS, `more` (hashes)."""
    values = config.to_dict()
    chosen = {"seed": values["seed"], **{name: values[name] for name in sections}}
    flat = {name: value for name, value in _flatten(chosen).items() if name not in FREE_SETTINGS}
    return {**flat, **more}


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    step: int
    state: dict[str, Any]  # what the trainer gave to save_checkpoint
    identity: dict[str, Any]
    files: dict[str, dict[str, Any]]  # relative path -> {"bytes", "sha256"}

    def check_identity(self, identity: Mapping[str, Any], *, way_out: str = "") -> None:
        """Raises ConfigError naming each setting in which the two differ, with both values."""
        ours, theirs = _flatten(identity), _flatten(self.identity)
        names = [*theirs, *(name for name in ours if name not in theirs)]
        lines = [
            f"  {name}: the checkpoint has {theirs.get(name)!r}, now it is {ours.get(name)!r}"
            for name in names
            if name not in ours or name not in theirs or ours[name] != theirs[name]
        ]
        if lines:
            way_out = (
                way_out or "Use the checkpoint's settings to go on, or another run folder to start anew."
            )
            raise ConfigError("\n".join([f"{self.path}: cannot resume from it:", *lines, way_out]))

    def verify(self, prefix: str = "") -> None:
        """Compares the files under `prefix` with their recorded hashes.

        Raises:
            CorruptArtifactError: names the file, and what to do.
        """
        for name, recorded in self.files.items():
            if name.startswith(prefix) and sha256_file(self.path / name) != recorded["sha256"]:
                raise CorruptArtifactError(
                    f"{self.path / name}: not as it was written (SHA-256 differs). "
                    f"Delete {self.path} to go on from the checkpoint before it."
                )

    def module_folder(self, name: str) -> Path:
        """The verified folder of a module, for its class's `load`."""
        folder = self.path / name
        if not folder.is_dir():
            held = sorted({file.split("/")[0] for file in self.files if "/" in file})
            raise DataError(f"{self.path}: holds no {name}, only {', '.join(held) or 'nothing'}.")
        self.verify(name + "/")
        return folder

    def load_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Gives `optimizer` (optim.build_optimizer over the restored modules) its state back, bit for bit.

        Raises:
            ProvenanceError: it updates other parameters than the checkpoint's did.
        """
        self.verify(OPTIMIZER_FILE)
        _read_optimizer(self.path / OPTIMIZER_FILE, optimizer)


def save_checkpoint(
    folder: str | Path,
    step: int,
    *,
    modules: Mapping[str, SavesItself],
    optimizer: torch.optim.Optimizer | None,
    state: Mapping[str, Any],
    identity: Mapping[str, Any],
    keep: int,
    protect: Iterable[int] = (),
) -> Path:
    """Writes step `step`'s checkpoint, makes it the latest, then prunes.

    Args:
        folder: holds the checkpoints of one stage.
        step: updates made so far.
        modules: name -> module; each is saved into a folder of its name.
        optimizer: as built by optim.build_optimizer, or None.
        state: JSON values that the loop wants back.
        identity: what `check_identity` compares on resume; see `identity_of`.
        keep, protect: see `prune_checkpoints`.

    Returns:
        The checkpoint's folder. If anything fails, a full disk included, older checkpoints are untouched.
    """
    folder = Path(folder)
    path = folder / checkpoint_name(step)
    replaced: Path | None = None
    try:
        with atomic_dir(path) as staging, _safetensors_errors():
            for name, module in modules.items():
                module.save(staging / name)
            if optimizer is not None:
                _write_optimizer(staging / OPTIMIZER_FILE, optimizer)
            files = {
                file.relative_to(staging).as_posix(): {
                    "bytes": file.stat().st_size,
                    "sha256": sha256_file(file),
                }
                for file in sorted(staging.rglob("*"))
                if file.is_file()
            }
            write_json(
                staging / STATE_FILE,
                {
                    "format_version": FORMAT_VERSION,
                    "step": step,
                    "state": dict(state),
                    "identity": dict(identity),
                    "files": files,
                },
            )
            if path.exists():  # the same step, reached again after a resume from an older checkpoint
                replaced = Path(tempfile.mkdtemp(prefix=f"{STAGING_PREFIX}replaced.", dir=folder))
                os.rename(path, replaced / path.name)
    except BaseException:
        if replaced is not None and not path.exists():
            os.rename(replaced / path.name, path)
            replaced.rmdir()
        raise
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)
    write_json(folder / LATEST_FILE, {"name": path.name})
    prune_checkpoints(folder, keep, protect=protect)
    return path


def newest_checkpoint(folder: str | Path) -> Checkpoint | None:
    """The complete checkpoint with the most steps, or None. Incomplete ones are passed over with a warning.

    Hashes are compared when a part is loaded; here only presence and sizes are. Changes nothing on disk.
    """
    for step, path in sorted(_checkpoint_paths(Path(folder)), reverse=True):
        try:
            return read_checkpoint(path)
        except (CorruptArtifactError, DataError) as error:
            _log.warning("passing over checkpoint %d: %s", step, error)
    return None


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Opens one checkpoint folder.

    Raises:
        DataError: it does not exist or was written by another format version.
        CorruptArtifactError: a file of it is missing or has the wrong size.
    """
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"{path}: no such checkpoint.")
    record = read_json(path / STATE_FILE, "the checkpoint's state")
    version = record.get("format_version") if isinstance(record, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path}: checkpoint format {version!r}; "
            f"this version of realm_fast reads format {FORMAT_VERSION}."
        )
    for name, recorded in record["files"].items():
        file = path / name
        if not file.is_file():
            raise CorruptArtifactError(f"{file}: missing from its checkpoint.")
        if file.stat().st_size != recorded["bytes"]:
            raise CorruptArtifactError(
                f"{file}: {file.stat().st_size} bytes, but {recorded['bytes']} were written; "
                "it is truncated or changed."
            )
    return Checkpoint(path, record["step"], record["state"], record["identity"], record["files"])


def checkpoint_steps(folder: str | Path) -> list[int]:
    """The steps that have a checkpoint folder, ascending."""
    return sorted(step for step, _ in _checkpoint_paths(Path(folder)))


def prune_checkpoints(folder: str | Path, keep: int, *, protect: Iterable[int] = ()) -> None:
    """Deletes all but the `keep` newest checkpoints, sparing the steps in `protect`."""
    if keep < 1:
        raise ValueError(f"keep: expected >= 1, got {keep}")
    spared = set(protect)
    for step, path in sorted(_checkpoint_paths(Path(folder)))[:-keep]:
        if step not in spared:
            # Renamed first: a kill amid the deletion leaves a staging leftover, not half a checkpoint.
            doomed = Path(tempfile.mkdtemp(prefix=f"{STAGING_PREFIX}pruned.", dir=folder))
            os.rename(path, doomed / path.name)
            fsync_dir(Path(folder))
            shutil.rmtree(doomed, ignore_errors=True)


def clean_checkpoints(folder: str | Path) -> None:
    """Deletes what killed writers left; only the one process that writes into `folder` may call it."""
    if Path(folder).is_dir():
        remove_staging(folder)


def _checkpoint_paths(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    matches = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir())
    return [(int(match[1]), path) for match, path in matches if match]


def _write_optimizer(path: Path, optimizer: torch.optim.Optimizer) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in _named_parameters(optimizer):
        for key, value in optimizer.state.get(parameter, {}).items():
            # contiguous copies on the CPU: safetensors refuses views and shared storage
            tensors[f"{key}/{name}"] = value.detach().to("cpu", copy=True).contiguous()
    names = "\n".join(name for name, _ in _named_parameters(optimizer))
    # one entry: safetensors writes several in no fixed order, and equal states shall be equal bytes
    save_file(tensors, str(path), metadata={"parameters": names})


def _read_optimizer(path: Path, optimizer: torch.optim.Optimizer) -> None:
    named = _named_parameters(optimizer)
    with safe_open(str(path), framework="pt", device="cpu") as file:
        saved = file.metadata()["parameters"].split("\n")
        if saved != [name for name, _ in named]:
            odd = sorted(set(saved).symmetric_difference(name for name, _ in named))
            which = f"they differ in {', '.join(odd[:3])}" if odd else "their order differs"
            raise ProvenanceError(
                f"{path}: holds the state of {len(saved)} parameters, "
                f"the models here have {len(named)}; {which}."
            )
        by_name: dict[str, dict[str, torch.Tensor]] = {}
        for key in file.keys():  # noqa: SIM118 (not a dictionary)
            kind, _, name = key.partition("/")
            by_name.setdefault(name, {})[kind] = file.get_tensor(key)
    for name, parameter in named:
        for kind, tensor in by_name.get(name, {}).items():
            if tensor.dim() > 0 and tensor.shape != parameter.shape:
                raise ProvenanceError(
                    f"{path}: {kind} of {name} is {list(tensor.shape)}, "
                    f"the parameter is {list(parameter.shape)}."
                )
    # torch's own loader puts each tensor on its parameter's device; the groups stay as they were built
    current = optimizer.state_dict()
    optimizer.load_state_dict(
        {
            "state": {i: by_name[name] for i, (name, _) in enumerate(named) if name in by_name},
            "param_groups": current["param_groups"],
        }
    )


def _named_parameters(optimizer: torch.optim.Optimizer) -> list[tuple[str, torch.nn.Parameter]]:
    pairs: list[tuple[str, torch.nn.Parameter]] = []
    for group in optimizer.param_groups:
        if "param_names" not in group:
            raise ValueError("optimizer: expected named parameters (build it with optim.build_optimizer)")
        pairs += zip(group["param_names"], group["params"], strict=True)
    return pairs


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


@contextlib.contextmanager
def _safetensors_errors() -> Iterator[None]:
    """safetensors reports a failed write as its own error; gives it back the operating system's number."""
    try:
        yield
    except SafetensorError as error:
        match = re.search(r"os error (\d+)", str(error))
        if match is None:
            raise
        number = int(match[1])
        raise OSError(number, errno.errorcode.get(number, str(error))) from error
