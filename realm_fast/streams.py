"""Work on a GPU beside the training step: a stream of its own, and the order between the two.

    side = side_stream(device)            # on a CPU: the same calls, and nothing that needs an order
    with training_stream(device):         # the trainer: its kernels go first
        mark = side.mark()                # all that the trainer has queued so far
    with side.after(mark):                # any thread: queued on the side stream, behind the mark
        rows = embedder.block_rows(batch)
    side.finish()                         # that thread waits until the side stream has done it
    side.hand_over([rows])                # the trainer, who uses `rows` from now on

CUDA knows no priority below the default: 0 is the lowest, and negative numbers come first. So it is the
trainer that leaves the default stream for one that comes first, and the side stream has priority 0.
A priority orders thread blocks that wait for a multiprocessor; nothing that runs is stopped for it.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch

TRAINING_PRIORITY = -1
SIDE_PRIORITY = 0  # the lowest there is


class SideStream(Protocol):
    """A queue of device work beside the caller's."""

    def mark(self) -> Any:
        """Everything the calling thread has queued so far."""

    def after(self, mark: Any) -> AbstractContextManager[None]:
        """What is queued inside goes to the side stream, and runs after what `mark` saw (None: at once)."""

    def finish(self) -> None:
        """Waits until the side stream is empty."""

    def hand_over(self, tensors: Iterable[torch.Tensor]) -> None:
        """The calling thread's stream may use `tensors`, made on the side stream, from here on.

        Their memory goes back to the side stream only when that use is over.
        """


class NoStream:
    """For a CPU: every call has finished when it returns."""

    def mark(self) -> None:
        return None

    def after(self, mark: None) -> AbstractContextManager[None]:
        return nullcontext()

    def finish(self) -> None:
        pass

    def hand_over(self, tensors: Iterable[torch.Tensor]) -> None:
        pass


class CudaStream:
    """A CUDA stream of the lowest priority."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device, priority=SIDE_PRIORITY)

    def mark(self) -> torch.cuda.Event:
        return torch.cuda.current_stream(self._device).record_event()

    @contextmanager
    def after(self, mark: torch.cuda.Event | None) -> Iterator[None]:
        if mark is not None:
            self._stream.wait_event(mark)
        with torch.cuda.stream(self._stream):  # of this thread alone; also makes the device current
            yield

    def finish(self) -> None:
        self._stream.synchronize()

    def hand_over(self, tensors: Iterable[torch.Tensor]) -> None:
        user = torch.cuda.current_stream(self._device)
        user.wait_stream(self._stream)
        for tensor in tensors:
            # Without it the allocator would give the memory of a dropped tensor to the side stream at once,
            # while the user's stream still reads it.
            tensor.record_stream(user)


def side_stream(device: torch.device) -> SideStream:
    return CudaStream(device) if device.type == "cuda" else NoStream()


@contextmanager
def training_stream(device: torch.device) -> Iterator[None]:
    """On a GPU, the calling thread's work goes to a stream whose kernels go before those of side streams."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.current_stream(device)
    stream = torch.cuda.Stream(device, priority=TRAINING_PRIORITY)
    stream.wait_stream(before)  # the weights were put there by it
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        before.wait_stream(stream)
