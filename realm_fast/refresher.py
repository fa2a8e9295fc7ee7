"""The refresher's side: makes the snapshots that a trainer wants, for as long as it wants any.

The same loop serves a child process of the trainer (`child_main`) and `realm-fast refresher RUN`, which may
run on another machine that shares the run's file system. Whoever runs it owns the snapshots folder, so a
second one by mistake is told so. Killed at any moment it leaves finished shards, from which the next goes on.
"""

import contextlib
import itertools
import json
import logging
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from realm_fast.config import Config, IndexConfig, RefreshConfig
from realm_fast.device import resolve_device
from realm_fast.embedding import EmbeddingStopped
from realm_fast.errors import (
    ConfigError,
    CorruptArtifactError,
    DataError,
    DiskFullError,
    ProvenanceError,
    RealmFastError,
    RefreshError,
    UserError,
)
from realm_fast.handover import Handover, Order, Status
from realm_fast.ownership import Ownership, TakenError, own
from realm_fast.refresh import OWNER_PATIENCE_S, REFRESHER, TRAINER, RefreshTask
from realm_fast.run_folder import RunFolder
from realm_fast.signals import stop_on_signal
from realm_fast.token_store import TokenStore

NICENESS = 5  # the trainer's threads come first
LOOK_EVERY_S = 0.2
RETRY_AFTER_S, RETRY_AFTER_AT_MOST_S = 1.0, 60.0  # doubled after each failure in a row
log = logging.getLogger(__name__)


def run_refresher(
    run: RunFolder,
    config: Config,
    *,
    corpus: str | Path | None = None,
    once: bool = False,
    progress: bool = False,
) -> None:
    """Follows a run whose refresh.mode is "follow" until the run is done.

    Args:
        config: how to work here: refresh.token_budget, num_threads, cpu_affinity, device. What to make is
            the trainer's to say.
        corpus: the token store, where it has another path on this machine.
        once: make the snapshot that is wanted now, then end.

    Raises:
        ProvenanceError: store, weights and run do not belong together.
        UserError: the run refreshes itself, another refresher is at work, or nothing is wanted (once).
        Interrupted: SIGINT or SIGTERM came; finished shards are kept.
    """
    mode = run.config().refresh.mode
    if mode != "follow":
        raise UserError(
            f"{run.path}: its refresh.mode is {mode}, so it needs no refresher beside it. "
            "Train with --set refresh.mode=follow to have one."
        )
    recorded = Path(run.manifest["corpus"])
    if corpus is None and not recorded.exists():
        raise DataError(
            f"{recorded}: the run's corpus is not there on this machine; say where with --corpus CORPUS."
        )
    store = TokenStore.open(corpus or recorded)
    run.check_store(store)
    use_budget(config.refresh)
    task = RefreshTask(run.snapshots_dir, store, config.index, config.refresh)
    with stop_on_signal() as stop:
        follow(Handover(run.handover_dir), task, should_stop=lambda: bool(stop), once=once, progress=progress)
        if stop:
            stop.raise_interrupted("the refresher stopped; finished shards are kept for the next one")


def follow(
    handover: Handover,
    task: RefreshTask,
    *,
    should_stop: Callable[[], bool],
    once: bool = False,
    patience_s: float = 0.0,
    progress: bool = False,
) -> None:
    """Makes every snapshot that is wanted, the newest first, until told to stop or until the run is done.

    What may pass (a full disk, a file system that is away) is tried again with back-off; weights that cannot
    be used (NaN) are reported, and the next ones waited for.

    Args:
        patience_s: how long to wait for another refresher to go before calling it a mistake.

    Raises:
        UserError: it cannot get better: the wrong corpus or tokenizer, a folder that is read-only.
        RefreshError: another process took over while this one was suspended.
    """
    with contextlib.ExitStack() as stack:
        owner = _own_when_free(stack, task.folder, should_stop, patience_s)
        served: tuple[int, str, str] | None = None
        speaker = _Speaker(handover)
        back_off_s = RETRY_AFTER_S
        while owner is not None and not should_stop():
            order = None
            try:
                order = handover.wanted()
                if order is not None and order.key != served:
                    speaker.say(order, "embedding")
                    _serve(order, handover, task, owner, should_stop, progress=progress)
                    speaker.say(order, "published")
                    served, back_off_s = order.key, RETRY_AFTER_S
                elif order is not None and (once or order.is_last):
                    return
                elif once:
                    raise DataError(f"{handover.folder}: no snapshot is wanted yet.")
                else:
                    time.sleep(LOOK_EVERY_S)
            except EmbeddingStopped:
                continue
            except RefreshError:
                raise
            except (OSError, DiskFullError, CorruptArtifactError) as error:
                speaker.say(order, "retrying", error)
                _pause(back_off_s, should_stop)
                back_off_s = min(2 * back_off_s, RETRY_AFTER_AT_MOST_S)
            except UserError as error:
                speaker.say(order, "failed", error)
                raise
            except RealmFastError as error:
                speaker.say(order, "failed", error)
                served = None if order is None else order.key


def _serve(
    order: Order,
    handover: Handover,
    task: RefreshTask,
    owner: Ownership,
    should_stop: Callable[[], bool],
    *,
    progress: bool,
) -> None:
    if order.corpus_hash != task.store.corpus_hash:
        raise ProvenanceError(
            f"{handover.folder}: the trainer uses corpus {order.corpus_hash[:16]}, "
            f"but {task.store.path} holds corpus {task.store.corpus_hash[:16]}."
        )
    look_at_s = time.monotonic()

    def stop() -> bool:
        nonlocal look_at_s
        if should_stop():
            return True
        if time.monotonic() < look_at_s:
            return False
        look_at_s = time.monotonic() + LOOK_EVERY_S
        owner.check()
        newest = (
            handover.wanted()
        )  # later weights wait until this is done; earlier ones: the trainer went back
        return newest is not None and newest.key != order.key and newest.step <= order.step

    try:
        embedder = handover.load(order)
    except (DataError, CorruptArtifactError) as error:
        newest = handover.wanted()
        if newest is None or newest.key != order.key:
            raise EmbeddingStopped("other weights took the place of these.") from error
        raise CorruptArtifactError(str(error)) from error  # a shared file system may need a moment
    refresh = replace(
        task.refresh, shard_blocks=order.shard_blocks, publish_every_shards=order.publish_every_shards
    )
    replace(task, index=order.index, refresh=refresh).write(
        order.step,
        embedder.to(resolve_device(task.refresh.device)),
        shard_order=order.shard_order,
        should_stop=stop,
        progress=progress,
    )


def _own_when_free(
    stack: contextlib.ExitStack, folder: Path, should_stop: Callable[[], bool], patience_s: float
) -> Ownership | None:
    """Owns the folder until `stack` closes. Waits while the trainer makes an index itself."""
    said = False
    while not should_stop():
        try:
            return stack.enter_context(own(folder, REFRESHER, wait_s=patience_s))
        except TakenError as error:
            if error.what != TRAINER:
                raise
            if not said:
                log.info("%s The refresher begins when that is done.", error)
            said = True
    return None


class _Speaker:
    """Tells the trainer, and the log, how the work goes."""

    def __init__(self, handover: Handover) -> None:
        self._handover = handover
        self._name = secrets.token_hex(4)
        self._numbers = itertools.count()

    def say(self, order: Order | None, state: str, error: Exception | None = None) -> None:
        if error is not None:
            log.warning("%s: %s", state, error)
        elif order is not None:
            log.info("step %d: %s", order.step, state)
        if order is None:
            return
        status = Status(
            self._name, next(self._numbers), order.step, order.encoder_hash, state, str(error or "")
        )
        with contextlib.suppress(OSError, RealmFastError):  # a full disk: the snapshots are what counts
            self._handover.say(status)


def _pause(seconds: float, should_stop: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not should_stop():
        time.sleep(min(LOOK_EVERY_S, seconds))


def use_budget(refresh: RefreshConfig) -> None:
    """Restricts this process to its share of the machine.

    Raises:
        ConfigError: refresh.cpu_affinity is no list of processors of this machine.
    """
    cpus = parse_cpus(refresh.cpu_affinity)
    if cpus:
        try:
            os.sched_setaffinity(0, cpus)
        except OSError as error:
            raise ConfigError(
                f"refresh.cpu_affinity: expected processors among {sorted(os.sched_getaffinity(0))}, "
                f"got {refresh.cpu_affinity!r}"
            ) from error
    torch.set_num_threads(refresh.num_threads)


def parse_cpus(text: str) -> set[int]:
    """The processors of a list like "0-3,8"; empty: any."""
    cpus: set[int] = set()
    for part in filter(None, text.replace(" ", "").split(",")):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ConfigError(f"refresh.cpu_affinity: expected numbers and ranges like 0-3,8, got {text!r}")
        cpus |= set(range(int(first), int(last if dash else first) + 1))
    return cpus


def child_main() -> None:
    """The child of refresh.ProcessRefresher: its settings on standard input, which closes when it shall end.

    So it does not outlive a trainer that was killed.
    """
    os.nice(NICENESS)
    logging.basicConfig(format="%(message)s")  # standard error is the log file
    settings = json.loads(sys.stdin.readline())
    closed = threading.Event()

    def listen() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        closed.set()

    threading.Thread(target=listen, daemon=True).start()
    handover = Handover(Path(settings["handover"]))
    try:
        refresh = RefreshConfig(**settings["refresh"])
        use_budget(refresh)
        task = RefreshTask(
            Path(settings["folder"]),
            TokenStore.open(settings["store"]),
            IndexConfig(**settings["index"]),
            refresh,
        )
        follow(handover, task, should_stop=closed.is_set, patience_s=OWNER_PATIENCE_S)
    except RealmFastError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    finally:
        if closed.is_set():  # also when the trainer was killed: what it left in shared memory
            handover.remove()
