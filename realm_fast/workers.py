"""A handful of worker processes for long, coarse tasks: tokenising a shard, tagging a slice of blocks.

Each worker is a fresh interpreter that imports one function and answers over its own pipe. Unlike
`multiprocessing`, it never runs the caller's main module again (no `if __name__ == "__main__"` needed,
works from a notebook or standard input), a worker ends when its parent is gone however that died, and
Ctrl-C reaches the parent alone, which ends the workers.
"""

import contextlib
import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

from realm_fast.errors import RealmFastError

# The package's own __init__ loads torch, seconds and hundreds of megabytes that most workers have no use
# for: an empty stand-in with the same path lets them import just the modules they need.
_BOOTSTRAP = """
import json, sys, types
sys.path[:], package_path = json.loads(sys.argv[2])
package = types.ModuleType("realm_fast")
package.__path__ = package_path
sys.modules["realm_fast"] = package
from realm_fast.workers import serve
serve(int(sys.argv[1]))
"""


def default_num_workers() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def map_unordered(
    setup: str, argument: Any, tasks: Iterable[Any], *, num_workers: int, what: str
) -> Iterator[tuple[Any, Any]]:
    """Yields (task, result) as tasks finish; no more tasks than workers, and the next, are in memory.

    Args:
        setup: "module:function"; called once in each worker with `argument`, returns the function that
            does one task.
        argument: anything picklable.
        tasks: picklable; taken from the iterable as workers become free.
        num_workers: 1 works in this process.
        what: what a worker does, for error messages ("tokenise").

    Raises:
        RealmFastError: a worker died. What a task itself raised is raised here.
    """
    if num_workers <= 1:
        do = _resolve(setup)(argument)
        for task in tasks:
            yield task, do(task)
        return
    workers: list[_Worker] = []
    try:
        # A task goes only to an idle worker: two sides that both send more than a pipe holds would block.
        for task in tasks:
            if len(workers) < num_workers:
                workers.append(_Worker(setup, argument, what))
                workers[-1].send(task)
            else:
                idle = [w for w in workers if w.pending is _NOTHING]
                if not idle:
                    ready = wait([w.connection for w in workers])
                    idle = [w for w in workers if w.connection in ready]
                    for worker in idle:
                        yield worker.receive()
                idle[0].send(task)
        while busy := {w.connection: w for w in workers if w.pending is not _NOTHING}:
            for connection in wait(list(busy)):
                yield busy[connection].receive()  # type: ignore[index]
    finally:
        for worker in workers:
            worker.stop()


_NOTHING = object()


class _Worker:
    def __init__(self, setup: str, argument: Any, what: str) -> None:
        self.what = what
        self.pending: Any = _NOTHING  # the task it works on
        self.connection, theirs = Pipe()
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        paths = [sys.path, [str(Path(__file__).resolve().parent)]]
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _BOOTSTRAP, str(theirs.fileno()), json.dumps(paths)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # Ctrl-C is the parent's to handle
            )
        self._send((setup, argument))

    def send(self, task: Any) -> None:
        self.pending = task
        self._send(task)

    def _send(self, value: Any) -> None:
        try:
            self.connection.send(value)
        except OSError:
            self._died()

    def receive(self) -> tuple[Any, Any]:
        try:
            kind, value = self.connection.recv()
        except (EOFError, OSError):
            self._died()
        if kind == "error":
            error, text = value
            error.add_note(f"in a process that was to {self.what}:\n{text}")
            raise error
        task, self.pending = self.pending, _NOTHING
        return task, value

    def _died(self) -> None:
        self.connection.close()
        code = self.process.wait()
        reason = f"signal {-code}" if code < 0 else f"exit code {code}"
        if code == -9:
            reason += ", often: out of memory"
        raise RealmFastError(
            f"a process that was to {self.what} died ({reason}). What was finished is kept; "
            "run the same command again, with fewer workers if memory is short."
        ) from None

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.close()
        if self.pending is not _NOTHING:
            self.process.terminate()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def serve(fd: int) -> None:
    """The worker's side: set up once, then answer tasks until the parent closes the pipe."""
    with Connection(fd) as connection, contextlib.suppress(EOFError, BrokenPipeError, ConnectionError):
        try:
            setup, argument = connection.recv()
            do = _resolve(setup)(argument)
        except EOFError:
            return
        except Exception as error:
            do = None
            failure: Exception | None = error
        while True:
            task = connection.recv()
            try:
                if do is None:
                    raise failure  # type: ignore[misc]
                answer = ("result", do(task))
            except Exception as error:
                answer = ("error", (_portable(error), traceback.format_exc()))
            connection.send(answer)


def _portable(error: Exception) -> Exception:
    """The exception itself where its kind survives a pipe, else one of ours that tells it."""
    if isinstance(error, RealmFastError | OSError | MemoryError):
        return error
    return RealmFastError(f"{type(error).__name__}: {error}")


def _resolve(name: str) -> Any:
    module, function = name.split(":")
    return getattr(importlib.import_module(module), function)
