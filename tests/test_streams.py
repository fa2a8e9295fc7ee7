"""The order between the trainer's work and that of a side stream.

torch.cuda's streams and events are replaced by ones that write down what is asked of them: what is tested is
the order, which is all that these functions add.
"""

import contextlib
import threading

import pytest
import torch

from realm_fast.device import HostCopy, to_device, to_host
from realm_fast.streams import CudaStream, NoStream, side_stream, training_stream

GPU = torch.device("cuda:0")


class Recorder:
    """torch.cuda's streams, as far as realm_fast.streams uses them; `log` is what they were told, in order."""

    def __init__(self):
        self.log, self.priorities, self._current = [], {}, threading.local()

    def make(self, device, priority):
        name = f"stream{len(self.priorities)}"
        self.priorities[name] = priority
        return Stream(self, name)

    def current(self, device):
        return getattr(self._current, "stream", None) or Stream(self, "default")

    @contextlib.contextmanager
    def use(self, stream):
        before, self._current.stream = self.current(None), stream
        try:
            yield
        finally:
            self._current.stream = before


class Stream:
    def __init__(self, recorder, name):
        self.recorder, self.name = recorder, name

    def record_event(self):
        self.recorder.log.append(f"{self.name} records")
        return f"event of {self.name}"

    def wait_event(self, event):
        self.recorder.log.append(f"{self.name} waits for {event}")

    def wait_stream(self, other):
        self.recorder.log.append(f"{self.name} waits for {other.name}")

    def synchronize(self):
        self.recorder.log.append(f"the host waits for {self.name}")


class Memory:
    """A tensor, as far as its memory goes."""

    def __init__(self, recorder):
        self.recorder = recorder

    def record_stream(self, stream):
        self.recorder.log.append(f"memory is kept for {stream.name}")


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(torch.cuda, "Stream", recorder.make)
    monkeypatch.setattr(torch.cuda, "current_stream", recorder.current)
    monkeypatch.setattr(torch.cuda, "stream", recorder.use)
    return recorder


def test_work_runs_on_the_side_behind_the_mark_and_is_handed_over(recorder):
    side = side_stream(GPU)
    assert isinstance(side, CudaStream)
    mark = side.mark()
    with side.after(mark):
        assert torch.cuda.current_stream(GPU).name == "stream0"
    assert torch.cuda.current_stream(GPU).name == "default"
    side.finish()
    side.hand_over([Memory(recorder), Memory(recorder)])
    assert recorder.log == [
        "default records",
        "stream0 waits for event of default",
        "the host waits for stream0",
        "default waits for stream0",
        "memory is kept for default",
        "memory is kept for default",
    ]


def test_the_trainer_comes_first_and_the_side_last(recorder):
    side = side_stream(GPU)
    with training_stream(GPU):
        assert torch.cuda.current_stream(GPU).name == "stream1"
        mark = side.mark()
    with side.after(mark):
        pass
    assert recorder.priorities == {"stream0": 0, "stream1": -1}  # CUDA: lower numbers first, 0 the lowest
    assert recorder.log == [
        "stream1 waits for default",  # the weights were put there on it
        "stream1 records",
        "default waits for stream1",
        "stream0 waits for event of stream1",
    ]


def test_the_side_stream_is_current_for_its_thread_alone(recorder):
    side, inside, done = side_stream(GPU), threading.Event(), threading.Event()

    def work():
        with side.after(None):
            inside.set()
            done.wait(20)

    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(20)
    assert torch.cuda.current_stream(GPU).name == "default"
    done.set()
    thread.join()
    assert recorder.log == []  # no mark: nothing to wait for


def test_an_error_leaves_the_side_stream(recorder):
    side = side_stream(GPU)
    with pytest.raises(KeyError), side.after(None):
        raise KeyError
    assert torch.cuda.current_stream(GPU).name == "default"


def test_an_error_in_training_leaves_the_streams_in_order(recorder):
    with pytest.raises(KeyError), training_stream(GPU):
        raise KeyError
    assert recorder.log == ["stream0 waits for default", "default waits for stream0"]


def test_on_a_cpu_there_is_nothing_to_order():
    side = side_stream(torch.device("cpu"))
    assert isinstance(side, NoStream)
    with training_stream(torch.device("cpu")), side.after(side.mark()):
        rows = torch.ones(3)
    side.finish()
    side.hand_over([rows])


def test_copies_on_the_host_are_what_they_were():
    tensor = torch.randn(3, 2, requires_grad=True)
    assert to_device(tensor, "cpu") is tensor
    (copy,) = to_host(tensor)
    assert torch.equal(copy, tensor.detach())
    assert not copy.requires_grad
    assert torch.equal(HostCopy(tensor).wait(), tensor.detach())


def test_copies_from_a_gpu_are_queued_together_and_waited_for_after(monkeypatch):
    """The order of what HostCopy asks of torch, by tensors that write it down."""
    log = []

    class OnGpu(torch.Tensor):
        is_cuda = True

    class Pinned:
        def copy_(self, source, non_blocking):
            log.append(f"copy, host waits: {not non_blocking}")

    class Event:
        def synchronize(self):
            log.append("wait")

    class Current:
        def record_event(self):
            return Event()

    monkeypatch.setattr("realm_fast.device.torch.empty", lambda *a, pin_memory, **k: Pinned())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Current())
    tensors = [torch.zeros(2).as_subclass(OnGpu) for _ in range(2)]
    assert all(isinstance(copy, Pinned) for copy in to_host(*tensors))
    assert log == ["copy, host waits: False"] * 2 + ["wait"] * 2
