"""Breaks a refresh 200 times at random moments, and checks every answer that was served meanwhile.

    python refresh_faults.py FOLDER

Three processes: a trainer that hands over weights, picks up snapshots and searches them; a refresher that
follows it (`refresher.follow`, as in `realm-fast refresher`); and this one, which harms both and their files,
starts again what it killed, and judges. The weights of a step are a function of the step and of how often
the trainer was started, so an answer tells which weights made each shard: it must be what brute force finds
over the embeddings that the manifest of the served snapshot names, and that snapshot must be of the trainer's
own weights. Prints what was done; an assertion fails the process.
"""

import errno
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import qa_world
import torch

from realm_fast import ownership, refresh, refresher, snapshot_watch
from realm_fast.config import IndexConfig
from realm_fast.embedder import Embedder
from realm_fast.embedding import embed_blocks
from realm_fast.errors import CorruptArtifactError, DataError, DiskFullError, RefreshError
from realm_fast.files import read_json, write_json
from realm_fast.handover import Handover
from realm_fast.ownership import TakenError
from realm_fast.refresh import FollowedRefresher, RefreshTask
from realm_fast.snapshot import open_snapshot, prune_snapshots, published_snapshots, retire_snapshot
from realm_fast.snapshot_writer import BUILDING_PREFIX
from realm_fast.token_store import TokenStore

INJECTIONS = 200
BLOCKS, SHARD, TOP = 240, 48, 5
EVERY_STEPS = 2
PATIENCE_S = 180.0  # on a busy machine
TAKEN = 3  # exit code of a refresher that was told that another is at work


class World:
    """What all three processes know: paths, the corpus, and what weights are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.snapshots, self.handover = folder / "snapshots", folder / "handover"
        self.state, self.served = folder / "trainer.json", folder / "served.jsonl"
        self.weights_log = folder / "weights.jsonl"
        self.full, self.enough = folder / "disk-full", folder / "enough"
        self.store = TokenStore.open(folder / "store")
        self.settings = qa_world.settings(
            folder, "embedder.trunk=fresh:layers=1,hidden=16,heads=2,intermediate=16", "embedder.embedding_dim=8",
            "refresh.mode=follow", f"refresh.shard_blocks={SHARD}", "refresh.publish_every_shards=3",
        )  # fmt: skip
        self.task = RefreshTask(self.snapshots, self.store, IndexConfig(), self.settings.refresh)
        torch.manual_seed(0)
        self.embedder = Embedder.from_config(self.settings.embedder, self.store.tokenizer()).eval()
        self.queries = torch.randn(4, self.embedder.dim)

    def weights(self, life: int, step: int) -> Embedder:
        generator = torch.Generator().manual_seed(life * 1_000_000 + step)
        with torch.no_grad():
            for parameter in self.embedder.block_side.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        return self.embedder


def harmed(world: World) -> None:
    """Makes this process feel a full disk and a jumping clock, and be quick to try again."""
    torch.set_num_threads(1)
    real_fsync, real_time, chance = os.fsync, time.time, random.Random(os.getpid())

    def fsync(descriptor: int) -> None:
        if world.full.exists():
            raise OSError(errno.ENOSPC, "no space left (injected)")
        real_fsync(descriptor)

    os.fsync = fsync
    time.time = lambda: real_time() + chance.uniform(-1e8, 1e8)
    refresher.RETRY_AFTER_S = refresher.RETRY_AFTER_AT_MOST_S = 0.02
    refresher.LOOK_EVERY_S = snapshot_watch.LOOK_EVERY_S = refresh.WAIT_POLL_S = 0.005
    ownership._AT_LEAST_S = 0.1


def refresher_process(world: World) -> None:
    harmed(world)
    try:
        refresher.follow(Handover(world.handover), world.task, should_stop=lambda: False)
    except TakenError:
        sys.exit(TAKEN)


def until_it_works(attempt):
    while True:
        try:
            return attempt()
        except (OSError, DiskFullError, RefreshError):  # the disk is full; soon it will not be
            time.sleep(0.01)


def trainer_process(world: World) -> None:
    """As train.Pretrainer uses a refresher: first index, submit, poll, checkpoint, prune, resume."""
    harmed(world)
    state = {"life": 0, "step": 0, "snapshot": "none"}
    if world.state.exists():
        state = read_json(world.state, "the state")
    life, step, pinned = state["life"] + 1, state["step"], state["snapshot"]
    until_it_works(lambda: write_json(world.state, {**state, "life": life}))
    for one in published_snapshots(world.snapshots):
        if one.step > step:
            retire_snapshot(one.path, even_if_open=True)
    trainer = FollowedRefresher(world.task, world.handover)
    with open(world.weights_log, "a") as weights_log, open(world.served, "a") as served:

        def note(encoder_hash: str, seed: tuple[int, int] | None) -> None:
            weights_log.write(json.dumps({"life": life, "hash": encoder_hash, "seed": seed}) + "\n")
            weights_log.flush()

        def new_weights() -> Embedder:
            embedder = world.weights(life, step)
            note(embedder.hash(), (life, step))
            return embedder

        try:
            snapshot = open_snapshot(world.snapshots / pinned, verify=True)
            note(snapshot.manifest.newest_encoder_hash, None)
            trainer.submit(step, new_weights())
        except (DataError, CorruptArtifactError):
            embedder = new_weights()
            snapshot = until_it_works(lambda: trainer.make_now(step, embedder))
        while not world.enough.exists():
            step += 1
            if step % EVERY_STEPS == 0:
                trainer.submit(step, new_weights())
            newest = trainer.poll()
            if newest is not None:
                snapshot = newest
                prune_snapshots(world.snapshots, keep=2, pinned={pinned})
            found = snapshot.index.search(world.queries, TOP)
            record = {
                "life": life, "step": step, "snapshot_step": snapshot.step, "is_whole": snapshot.is_whole,
                "is_new": newest is not None, "newest": snapshot.manifest.newest_encoder_hash,
                "shards": [(s.first_block, s.num_blocks, s.step, s.encoder_hash) for s in snapshot.manifest.shards],
                "ids": found.ids.tolist(), "scores": found.scores.tolist(), "failures": trainer.failures,
            }  # fmt: skip
            served.write(json.dumps(record) + "\n")
            served.flush()
            trainer.failures.clear()
            if step % 5 == 0:
                new_state = {"life": life, "step": step, "snapshot": snapshot.path.name}
                until_it_works(lambda new_state=new_state: write_json(world.state, new_state))
                pinned = snapshot.path.name
            time.sleep(0.01)
        step += 1
        embedder = new_weights()
        last = until_it_works(lambda: trainer.make_now(step, embedder))
        assert last.is_whole
        assert last.manifest.encoder_hash == embedder.hash()
    trainer.close(is_done=True)


class Child:
    """A forked process. This one never starts a second thread, so it may fork; a child is up in no time."""

    def __init__(self, work: Callable[[World], None], world: World) -> None:
        self.exitcode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                work(world)
                code = 0
            except SystemExit as end:
                code = int(end.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)

    def is_alive(self) -> bool:
        if self.exitcode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.exitcode = os.waitstatus_to_exitcode(status)
        return self.exitcode is None

    def kill(self) -> None:
        if self.is_alive():
            os.kill(self.pid, signal.SIGKILL)

    def join(self, most_s: float = PATIENCE_S) -> None:
        end = time.monotonic() + most_s
        while self.is_alive() and time.monotonic() < end:
            time.sleep(0.002)


class Saboteur:
    """Does the harm, and starts again what died of it."""

    def __init__(self, world: World, seed: int) -> None:
        self.world, self.chance = world, random.Random(seed)
        self.trainer = self.refresher = None
        self.starts: Counter[str] = Counter()
        self.revive()
        end = time.monotonic() + PATIENCE_S
        while not world.served.exists() or world.served.stat().st_size == 0:
            assert time.monotonic() < end, "nothing was served"
            time.sleep(0.01)

    def revive(self) -> None:
        for name, target in (("trainer", trainer_process), ("refresher", refresher_process)):
            process = getattr(self, name)
            if process is None or not process.is_alive():
                assert process is None or process.exitcode == -signal.SIGKILL, (name, process.exitcode)
                setattr(self, name, Child(target, self.world))
                self.starts[name] += 1

    def pause(self, most_s: float = 0.12) -> None:
        time.sleep(self.chance.uniform(0, most_s))

    def kill(self, *processes) -> None:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()

    def see_it_recover(self) -> None:
        """Waits until the trainer takes a snapshot that was not there before."""
        end = time.monotonic() + PATIENCE_S
        with open(self.world.served, encoding="utf-8") as served:
            served.seek(0, os.SEEK_END)
            line = ""
            while not (line.endswith("\n") and json.loads(line)["is_new"]):
                assert time.monotonic() < end, "it did not recover"
                self.revive()
                line = served.readline() if line.endswith("\n") else line + served.readline()
                if not line:
                    time.sleep(0.002)

    # --- the kinds of harm; each returns whether there was something to harm

    def kill_refresher(self) -> bool:
        self.kill(self.refresher)
        return True

    def kill_trainer(self) -> bool:
        self.kill(self.trainer)
        return True

    def kill_both(self) -> bool:
        self.kill(self.trainer, self.refresher)
        return True

    def fill_the_disk(self) -> bool:
        self.world.full.touch()
        self.pause()
        self.world.full.unlink()
        return True

    def limit_the_size_of_files(self) -> bool:
        """Writes of the refresher come up short, as on a disk that fills up amid one."""
        limit = self.chance.randrange(0, 8192)
        _, hard = resource.prlimit(self.refresher.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(self.refresher.pid, resource.RLIMIT_FSIZE, (limit, hard))
        self.pause()
        resource.prlimit(self.refresher.pid, resource.RLIMIT_FSIZE, (hard, hard))
        return True

    def corrupt_a_shard_being_made(self) -> bool:
        return self._corrupt(f"{BUILDING_PREFIX}*/shard-*")

    def corrupt_a_published_shard(self) -> bool:
        return self._corrupt("step-*/shard-*")

    def corrupt_a_manifest(self) -> bool:
        return self._corrupt("step-*/manifest.json")

    def _corrupt(self, pattern: str) -> bool:
        """A flipped bit or a cut, under a new inode: who has the file mapped already keeps what it checked."""
        for file in self._some(self.world.snapshots, pattern):
            try:
                content = bytearray(file.read_bytes())
                if self.chance.random() < 0.5:
                    content[self.chance.randrange(len(content))] ^= 1 << self.chance.randrange(8)
                else:
                    del content[self.chance.randrange(len(content)) :]
                spoiled = self.world.folder / "spoiled"
                spoiled.write_bytes(content)
                os.replace(spoiled, file)
            except (FileNotFoundError, ValueError):  # renamed at this very moment
                continue
            return True
        return False

    def delete_a_snapshot(self) -> bool:
        for folder in self._some(self.world.snapshots, "step-*"):
            shutil.rmtree(folder, ignore_errors=True)
            return True
        return False

    def delete_the_weights(self) -> bool:
        for folder in self._some(self.world.handover, "weights-*"):
            shutil.rmtree(folder, ignore_errors=True)
            return True
        return False

    def set_the_clock(self) -> bool:
        """Times of files from the past and the future (that of the processes jumps at every look)."""
        files = self._some(self.world.snapshots, "*") + self._some(self.world.handover, "*")
        for file in files:
            try:
                os.utime(file, times=(0, self.chance.uniform(0, 4e9)))
            except FileNotFoundError:
                continue
        return bool(files)

    def start_a_second_refresher(self) -> bool:
        """Told so, it ends; if ours was not up yet, it is ours that ends, which is the same mistake."""
        second = Child(refresher_process, self.world)
        end = time.monotonic() + PATIENCE_S
        while second.is_alive() and self.refresher.is_alive() and time.monotonic() < end:
            time.sleep(0.005)
        if self.refresher.is_alive():
            assert second.exitcode == TAKEN, second.exitcode
        else:
            assert self.refresher.exitcode == TAKEN, self.refresher.exitcode
            self.refresher = second
        return True

    def _some(self, folder: Path, pattern: str) -> list[Path]:
        try:
            found = sorted(folder.glob(pattern))
        except FileNotFoundError:  # a folder went away while it was looked through
            return []
        self.chance.shuffle(found)
        return found

    def finish(self) -> None:
        """The run must come to its end as if nothing had happened."""
        self.world.enough.touch()
        self.revive()
        self.trainer.join()
        assert self.trainer.exitcode == 0, self.trainer.exitcode
        self.refresher.join()
        assert self.refresher.exitcode == 0, self.refresher.exitcode


KINDS = (
    "kill_refresher", "kill_trainer", "kill_both", "fill_the_disk", "limit_the_size_of_files",
    "corrupt_a_shard_being_made", "corrupt_a_published_shard", "corrupt_a_manifest", "delete_a_snapshot",
    "delete_the_weights", "set_the_clock", "start_a_second_refresher",
)  # fmt: skip


def judge(world: World) -> Counter[str]:
    """Compares every answer with brute force over what its snapshot's manifest says it is."""
    seeds, ours = {}, set()
    for line in world.weights_log.read_text().splitlines():
        entry = json.loads(line)
        ours.add((entry["life"], entry["hash"]))
        if entry["seed"] is not None:
            seeds[entry["hash"]] = tuple(entry["seed"])
    embeddings: dict[str, torch.Tensor] = {}
    seen: Counter[str] = Counter()
    snapshots = set()
    for line in world.served.read_text().splitlines():
        record = json.loads(line)
        assert (record["life"], record["newest"]) in ours, "a snapshot of weights that are not the trainer's"
        assert record["snapshot_step"] <= record["step"]
        rows = []
        for first, count, step, encoder_hash in record["shards"]:
            assert seeds[encoder_hash][1] == step <= record["snapshot_step"]
            if encoder_hash not in embeddings:
                embeddings[encoder_hash] = embed_blocks(world.weights(*seeds[encoder_hash]), world.store)
            rows.append(embeddings[encoder_hash][first : first + count])
        exact = (world.queries.double() @ torch.cat(rows).double().T).topk(TOP)
        scores = torch.tensor(record["scores"], dtype=torch.float64)
        torch.testing.assert_close(scores, exact.values, rtol=1e-4, atol=1e-4)
        at_ids = (world.queries.double() @ torch.cat(rows).double().T).gather(1, torch.tensor(record["ids"]))
        torch.testing.assert_close(at_ids, exact.values, rtol=1e-4, atol=1e-4)
        seen["answers"] += len(scores)
        if record["is_new"]:
            seen["snapshots taken"] += 1
            seen["partial ones"] += not record["is_whole"]
        seen["damaged ones refused"] += sum("is not used" in failure for failure in record["failures"])
        seen["failures said"] += len(record["failures"])
        snapshots.add((record["newest"], record["is_whole"], len(record["shards"])))
    return seen


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    if not (folder / "store").exists():
        qa_world.make_store(folder, BLOCKS)
    world = World(folder)
    saboteur = Saboteur(world, seed=6)
    try:
        run(world, saboteur)
    finally:
        saboteur.kill(saboteur.trainer, saboteur.refresher)


def run(world: World, saboteur: "Saboteur") -> None:
    done: Counter[str] = Counter()
    begin = time.monotonic()
    for number in range(INJECTIONS):
        kind = KINDS[number % len(KINDS)]
        end = time.monotonic() + PATIENCE_S
        while True:
            saboteur.pause()
            saboteur.revive()
            if getattr(saboteur, kind)():
                break
            assert time.monotonic() < end, f"{kind}: there was nothing to harm"
        done[kind] += 1
        if number % 8 == 7:
            saboteur.see_it_recover()
    saboteur.finish()
    seen = judge(world)
    print(f"{sum(done.values())} injections in {time.monotonic() - begin:.0f} s: {dict(done)}")
    print(f"started: {dict(saboteur.starts)}; {dict(seen)}", flush=True)
    assert seen["snapshots taken"] >= INJECTIONS // 8
    assert seen["partial ones"] >= 1
    assert seen["damaged ones refused"] >= 1
    assert not list(world.snapshots.glob(BUILDING_PREFIX + "*"))
    newest = open_snapshot(published_snapshots(world.snapshots)[-1].path, verify=True)
    assert newest.is_whole


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    main(Path(sys.argv[1]))
