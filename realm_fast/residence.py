"""Where a run searches its index: in the host's memory, or in that of the GPU it trains on.

    residence = Residence(config.index.residence, device, copies=2, most_blocks=2048)
    index = residence.place(open_snapshot(path).index)        # a MipsIndex, or its copy on the device
    refresher = residence.beside(make_refresher(...))         # poll() gives snapshots that are placed already

Snapshots are files that a MipsIndex maps, whoever made them (inline, thread, process, an earlier run), so
there is one way onto the device for all: its rows go through pinned memory to a DeviceIndex, on a stream of
the lowest priority. Both give the same answers; what differs is where the queries go. The choice is made
once, at the first index, and holds for the run.
"""

import dataclasses
import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from realm_fast import _native
from realm_fast.device_index import WORKING_BYTES, DeviceIndex
from realm_fast.embedder import Embedder
from realm_fast.errors import ConfigError
from realm_fast.index import Index, MipsIndex
from realm_fast.ops._cuda import device_reasons
from realm_fast.refresh import Refresher, ShouldStop
from realm_fast.snapshot import IndexSnapshot
from realm_fast.streams import side_stream

# Of the device memory that is free when a run opens its first index (the weights are there already;
# gradients, optimizer state and activations are not), `auto` gives this share to indexes.
AUTO_SHARE = 0.5
log = logging.getLogger(__name__)


class Residence:
    """The choice between host and device, and the way to the device.

    Args:
        setting: "host"; "device": there or an error that says why not; "auto": on the device where all of it
            is possible and takes at most AUTO_SHARE of its free memory.
        device: of the run.
        copies: indexes held at once: 2 where a refresh replaces them (the new one arrives while the old one
            is searched).
        most_blocks: the largest k of a search.
    """

    def __init__(self, setting: str, device: torch.device, *, copies: int, most_blocks: int) -> None:
        self._setting, self._device = setting, device
        self._copies, self._most_blocks = copies, most_blocks
        self._on_device: bool | None = None  # not chosen yet
        self._side = side_stream(device)

    def place(self, index: Index) -> Index:
        """`index`, or its copy on the device; the caller's stream may search it from here on.

        Raises:
            ConfigError: the setting is "device" and cannot be met.
        """
        if isinstance(index, DeviceIndex):  # placed before; the caller may be on another stream by now
            return self.receive(index)
        if self._on_device is None:
            self._on_device = self._choose(index)
        return self.receive(self.move(index)) if self._on_device else index

    @property
    def on_device(self) -> bool:
        """Whether `place` moves indexes."""
        assert self._on_device is not None, "place() the first index before"
        return self._on_device

    def beside(self, refresher: Refresher, *, waits: bool = False) -> Refresher:
        """`refresher`, with its snapshots placed before `poll` returns them.

        Args:
            waits: place them inside of `poll`, so that the step they arrive at does not depend on timing.
        """
        return ResidentRefresher(refresher, self, waits=waits)

    def move(self, index: Index) -> DeviceIndex:
        """A copy on the device, made on the side stream, in any thread; complete when this returns."""
        assert isinstance(index, MipsIndex)
        with self._side.after(None):
            moved = DeviceIndex.from_index(index, self._device)
        self._side.finish()
        moved.held = index  # a snapshot that is open is not deleted, and a checkpoint may still name it
        return moved

    def receive(self, moved: DeviceIndex) -> DeviceIndex:
        """For the thread that will search what `move` made."""
        self._side.hand_over(moved.tensors())
        return moved

    def _choose(self, index: Index) -> bool:
        if self._setting == "host" or (self._setting == "auto" and self._device.type != "cuda"):
            return False
        reasons = self._reasons(index)
        if not reasons:
            log.info("the index of %d blocks is searched on %s", len(index), self._device)
            return True
        if self._setting == "auto":
            log.info("the index is searched on the host: %s", "; ".join(reasons))
            return False
        lines = "".join(f"\n  - {reason}" for reason in reasons)
        raise ConfigError(f"index.residence: got device, which cannot be had:{lines}\nSay host or auto.")

    def _reasons(self, index: Index) -> list[str]:
        """Every reason why searches cannot run on the device."""
        if self._device.type != "cuda":
            return [f"the run is on {self._device}, which has no memory of its own"]
        reasons = device_reasons(self._device)
        if not isinstance(index, MipsIndex):
            return [*reasons, "only indexes of index.backend=mips can be moved to a device"]
        if not reasons and self._most_blocks > _native.MAX_CUDA_K:
            reasons.append(
                f"searches for {self._most_blocks} blocks are asked for (finetune.retriever_beam, "
                f"evaluate.recall_at, ...), the CUDA kernels give {_native.MAX_CUDA_K} at most"
            )
        needed = self._copies * DeviceIndex.bytes_needed(index.dtype, index.dim, len(index)) + WORKING_BYTES
        share = AUTO_SHARE if self._setting == "auto" else 1.0
        free = free_bytes(self._device)
        if needed > share * free:
            copies = "" if self._copies == 1 else f", {self._copies} copies while one replaces the other"
            of_free = "" if share == 1.0 else f"; auto takes {share:.0%} of that at most"
            what = f"{len(index)} x {index.dim} {index.dtype}{copies}"
            reasons.append(
                f"it needs {_gb(needed)} ({what}), and {_gb(free)} of {self._device} are free{of_free}"
            )
        return reasons


class ResidentRefresher:
    """A refresher whose snapshots are on the device before `poll` returns them.

    They are moved by a thread of their own, one at a time. The next move begins in a poll that returns
    nothing: by then the trainer has let go of the index that the last one replaced, so that there never is a
    third copy.
    """

    def __init__(self, refresher: Refresher, residence: Residence, *, waits: bool) -> None:
        self._refresher, self._residence, self._waits = refresher, residence, waits
        self.failures = refresher.failures  # one list: moves that fail are failures like others
        self._thread = ThreadPoolExecutor(1, "realm_fast index mover")
        self._newest: IndexSnapshot | None = None  # finished, and still to be moved
        self._moving: tuple[IndexSnapshot, Future[DeviceIndex]] | None = None

    def submit(self, step: int, embedder: Embedder, *, shard_order: Sequence[int] | None = None) -> None:
        self._refresher.submit(step, embedder, shard_order=shard_order)

    def make_now(
        self, step: int, embedder: Embedder, *, should_stop: ShouldStop | None = None, progress: bool = False
    ) -> IndexSnapshot:
        """As its refresher makes it: on the host. The first one decides where the others go (`place`)."""
        return self._refresher.make_now(step, embedder, should_stop=should_stop, progress=progress)

    def poll(self) -> IndexSnapshot | None:
        if not self._residence.on_device:
            return self._refresher.poll()
        self._newest = self._refresher.poll() or self._newest
        if self._moving is None and self._newest is not None:
            snapshot, self._newest = self._newest, None
            self._moving = snapshot, self._thread.submit(self._residence.move, snapshot.index)
            if not self._waits:
                return None
        if self._moving is None or not (self._waits or self._moving[1].done()):
            return None
        (snapshot, moved), self._moving = self._moving, None
        try:
            return dataclasses.replace(snapshot, index=self._residence.receive(moved.result()))
        except Exception as error:  # like a failed refresh, it costs staleness, never the run
            self.failures.append(f"moving the index of step {snapshot.step} to the device: {error}")
            return None

    def is_busy(self) -> bool:
        return self._moving is not None or self._newest is not None or self._refresher.is_busy()

    def close(self, *, is_done: bool = False) -> None:
        self._refresher.close(is_done=is_done)
        self._thread.shutdown(cancel_futures=True)
        self._newest = self._moving = None


def free_bytes(device: torch.device) -> int:
    """Device memory that torch could still hand out: the driver's, and its allocator's own reserve."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
