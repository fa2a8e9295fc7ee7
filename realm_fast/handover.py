"""Weights on their way from a trainer to a refresher in another process: a folder that both can see.

    FOLDER/wanted.json                              the newest order: which weights, and how to index them
    FOLDER/weights-step-00000500-1f0c9a2be4d7/      the embedder, saved as everywhere
    FOLDER/status.json                              what the refresher says about its work

Each is complete or absent. The trainer writes the weights, then `wanted.json` over the order before it, then
deletes the weights that nobody needs any more; only the newest order counts. For a child process the folder
is in shared memory, for a refresher elsewhere it is in the run's folder.
"""

import contextlib
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from realm_fast.config import IndexConfig
from realm_fast.embedder import Embedder
from realm_fast.errors import CorruptArtifactError, DataError
from realm_fast.files import read_json, remove_staging, write_json
from realm_fast.snapshot import snapshot_name

FORMAT_VERSION = 2
ORDER_FILE, STATUS_FILE = "wanted.json", "status.json"


@dataclass(frozen=True)
class Order:
    """A snapshot that the trainer wants."""

    format_version: int
    step: int
    encoder_hash: str  # of the weights; what is read must have it, so weights half-written are never used
    corpus_hash: str
    index: IndexConfig
    shard_blocks: int
    publish_every_shards: int
    shard_order: tuple[int, ...] | None
    number: str  # another one each time it is asked for: the same weights may be wanted again
    is_last: bool = False  # the run is done; nothing will be wanted after this

    @property
    def key(self) -> tuple[int, str, str]:
        return self.step, self.encoder_hash, self.number

    @property
    def weights_name(self) -> str:
        return f"weights-{snapshot_name(self.step)}-{self.encoder_hash[:12]}"


@dataclass(frozen=True)
class Status:
    """What a refresher last said. `number` grows with each thing said, `speaker` tells refreshers apart."""

    speaker: str
    number: int
    step: int
    encoder_hash: str
    state: str  # "embedding", "published", "failed" (it waits for other weights), "retrying"
    error: str = ""


class Handover:
    """One such folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    # --- the trainer's side

    def publish(self, order: Order, embedder: Embedder) -> None:
        """Makes `embedder`'s weights the ones that are wanted."""
        weights = self.folder / order.weights_name
        if not weights.exists():
            embedder.save(weights)
        self._write(order)
        for old in self.folder.glob("weights-*"):
            if old != weights:  # a refresher may be reading it; it finds the new order then
                shutil.rmtree(old, ignore_errors=True)

    def holds(self, order: Order) -> bool:
        """Whether the order and its weights are there (nobody deleted them)."""
        return (self.folder / order.weights_name).exists() and (self.folder / ORDER_FILE).exists()

    def clear(self) -> None:
        """Nothing is wanted; what was on its way is deleted."""
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_staging(self.folder)
        for name in (ORDER_FILE, STATUS_FILE):
            (self.folder / name).unlink(missing_ok=True)
        for old in self.folder.glob("weights-*"):
            shutil.rmtree(old, ignore_errors=True)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def end(self) -> None:
        """Tells the refresher that nothing more will be wanted."""
        order = self.wanted()
        if order is not None:
            self._write(Order(**{**vars(order), "is_last": True}))

    def status(self) -> Status | None:
        with contextlib.suppress(DataError, CorruptArtifactError, TypeError):
            return Status(**read_json(self.folder / STATUS_FILE, "the refresher's status"))
        return None

    # --- the refresher's side

    def wanted(self) -> Order | None:
        """The newest order, or None.

        Raises:
            CorruptArtifactError: what lies there is none, or one of another version.
        """
        file = self.folder / ORDER_FILE
        if not file.exists():
            return None
        try:
            values: dict[str, Any] = read_json(file, "the refresher's order")
        except DataError:  # deleted at this very moment
            return None
        try:
            if values["format_version"] != FORMAT_VERSION:
                raise ValueError(f"format {values['format_version']!r}, expected {FORMAT_VERSION}")
            shard_order: Sequence[int] | None = values["shard_order"]
            return Order(
                **{
                    **values,
                    "index": IndexConfig(**values["index"]),
                    "shard_order": None if shard_order is None else tuple(shard_order),
                }
            )
        except (TypeError, KeyError, ValueError) as error:
            raise CorruptArtifactError(f"{file}: not an order for a refresher ({error}).") from error

    def load(self, order: Order) -> Embedder:
        """The weights of an order.

        Raises:
            DataError, CorruptArtifactError: they are not there (any more), or are not those of the order.
        """
        embedder = Embedder.load(self.folder / order.weights_name)
        if (found := embedder.hash()) != order.encoder_hash:
            raise CorruptArtifactError(
                f"{self.folder / order.weights_name}: holds encoder {found[:12]}, "
                f"expected {order.encoder_hash[:12]}."
            )
        return embedder

    def say(self, status: Status) -> None:
        write_json(self.folder / STATUS_FILE, asdict(status))

    def _write(self, order: Order) -> None:
        write_json(self.folder / ORDER_FILE, asdict(order))
