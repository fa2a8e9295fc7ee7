"""Metrics of a run: one JSON object a line, appended as training goes, mirrored to TensorBoard.

    with MetricsLog(run.pretrain_dir / "metrics.jsonl", run.pretrain_dir / "tensorboard") as log:
        log.truncate_after(checkpoint_step)      # on resume: what was logged after the checkpoint comes again
        log.write({"step": 10, "loss": 3.2, "skipped": {"no_span": 4}})

A line is written in one piece, so a process killed at any moment leaves at most its last line torn. Opening
the file for more removes a torn last line; reading passes over it. A malformed line elsewhere is an error.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from realm_fast.errors import CorruptArtifactError, DataError, UserError
from realm_fast.files import atomic_file, disk_errors


class MetricsLog:
    """Appends records to a jsonl file, each a mapping with a whole number "step".

    Args:
        path: the file; made, with its folder, if it is not there. An existing one is continued.
        tensorboard_dir: numbers are also written here as TensorBoard scalars (nested ones as "outer/inner"),
            if the tensorboard package is installed; `tensorboard` says whether they are.
    """

    def __init__(self, path: str | Path, tensorboard_dir: str | Path | None = None) -> None:
        self.path = Path(path)
        self._tensorboard_dir = Path(tensorboard_dir) if tensorboard_dir is not None else None
        self._purge_step: int | None = None
        self._writer: Any = None
        self.tensorboard = self._tensorboard_dir is not None and _has_tensorboard()
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _mend_last_line(self.path)
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed by close)

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record. Numbers may be NumPy's or tensors; NaN and infinities become null.

        Raises:
            UserError: the record has no whole number "step".
            DiskFullError: no space is left; the file keeps every earlier line.
        """
        plain = {str(name): _plain(value) for name, value in record.items()}
        step = plain.get("step")
        if not isinstance(step, int) or isinstance(step, bool):
            raise UserError(f'{self.path}: a record needs a whole number "step", got {record.get("step")!r}')
        line = json.dumps(plain, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        with disk_errors(self.path):
            whole_bytes = os.fstat(self._file.fileno()).st_size
            try:
                while line:  # a write may come up short; the next one then says why
                    line = line[self._file.write(line) :]
            except OSError:
                with contextlib.suppress(OSError):
                    self._file.truncate(whole_bytes)
                raise
        if self.tensorboard:
            for name, value in _scalars(plain):
                if name != "step":
                    self._tensorboard().add_scalar(name, value, step)

    def truncate_after(self, step: int) -> int:
        """Drops the records of later steps, from the file at once and from what TensorBoard shows.

        Returns:
            how many records were dropped.
        """
        records = read_metrics(self.path)
        kept = [record for record in records if record["step"] <= step]
        if len(kept) < len(records):
            self._file.close()
            with atomic_file(self.path, "w") as file:
                for record in kept:
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        self._purge_step = step + 1
        if self._writer is not None:  # events already written for later steps: a new writer purges them
            self._writer.close()
            self._writer = None
        return len(records) - len(kept)

    def flush(self) -> None:
        """Puts everything written so far on disk."""
        os.fsync(self._file.fileno())
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _tensorboard(self) -> Any:
        if self._writer is None:  # opened late, so that truncate_after can set the step to purge from
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._tensorboard_dir), purge_step=self._purge_step)
        return self._writer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Every record of a metrics file, in the order written; a torn last line is passed over.

    Raises:
        DataError: the file does not exist.
        CorruptArtifactError: a line is no JSON object with a whole number "step"; the message has its number.
    """
    records = read_jsonl(path, "the metrics")
    for number, record in enumerate(records, start=1):
        step = record.get("step")
        if not isinstance(step, int) or isinstance(step, bool):
            raise CorruptArtifactError(
                f'{path}:{number}: the metrics: expected a whole number "step", got {step!r}.'
            )
    return records


def read_jsonl(path: str | Path, what: str) -> list[dict[str, Any]]:
    """Every object of a jsonl file that is appended to; `what` names its role in error messages.

    Raises:
        DataError: the file does not exist.
        CorruptArtifactError: a line other than a torn last one is no JSON object; the message has its number.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: {what} does not exist.") from None
    *lines, tail = content.split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        records.append(_parse(line, f"{path}:{number}", what))
    if (last := _as_object(tail)) is not None:  # complete but for its newline
        records.append(last)
    return records


def write_evaluations(path: Path, when: str, lines: Sequence[Mapping[str, Any]]) -> None:
    """Adds lines about the moment `when` ("before", "after") to an evaluations.jsonl, or replaces them."""
    earlier = read_jsonl(path, "the evaluations") if path.exists() else []
    kept = [line for line in earlier if line["when"] != when]
    with atomic_file(path, "w") as file:
        for line in [*kept, *({"when": when, **line} for line in lines)]:
            file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")


def _parse(line: bytes, where: str, what: str) -> dict[str, Any]:
    record = _as_object(line)
    if record is None:
        shown = line[:60].decode("utf-8", "replace") + ("…" if len(line) > 60 else "")
        raise CorruptArtifactError(f"{where}: {what}: expected a JSON object on this line, got {shown!r}.")
    return record


def _as_object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:  # JSONDecodeError and UnicodeDecodeError
        return None
    return value if isinstance(value, dict) else None


def _mend_last_line(path: Path) -> None:
    """Ends the file at a line's end: a torn last line is cut off, one that only lacks its newline gets it."""
    if not path.exists():
        return
    with open(path, "r+b") as file:
        content = file.read()
        tail_start = content.rfind(b"\n") + 1
        tail = content[tail_start:]
        if not tail:
            return
        if _as_object(tail) is not None:
            file.write(b"\n")
        else:
            file.truncate(tail_start)


def _plain(value: Any) -> Any:
    """JSON's own types: one-element tensors and NumPy numbers as numbers, NaN and infinities as None."""
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if hasattr(value, "item") and not isinstance(value, str | bytes):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _scalars(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield prefix + name, value


def _has_tensorboard() -> bool:
    import importlib.util

    return importlib.util.find_spec("tensorboard") is not None
