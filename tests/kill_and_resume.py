"""Kills fine-tuning again and again, resumes it, and checks that it ends as if nothing had happened.

    python kill_and_resume.py FOLDER

One process that never starts a second thread, so that it may fork: each child is a real process that loads
the run from disk, trains, and dies by the signal. Prints what was done; an assertion fails the process.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import qa_world
import torch

from realm_fast.checkpoint import checkpoint_steps, newest_checkpoint
from realm_fast.errors import RealmFastError
from realm_fast.files import STAGING_PREFIX
from realm_fast.finetune import finetune
from realm_fast.qa_model import best_checkpoint

OVERRIDES = (
    "finetune.steps=36", "finetune.checkpoint_every_steps=4", "finetune.log_every_steps=3",
    "finetune.dev_share=.2", "finetune.evaluate_every_steps=5",
)  # fmt: skip
TIMING = ("questions_per_s", "step_s", "evaluation_s")


def start(run, config) -> int:
    """Fine-tunes in a child; its exit code is the error's."""
    child = os.fork()
    if child:
        return child
    code = 0
    try:
        finetune(run, config, resume=True)
    except RealmFastError as error:
        print(error, file=sys.stderr)
        code = error.exit_code
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def outcome(run) -> tuple[list[dict], dict[str, bytes]]:
    """Every logged figure but the timings, and the bytes of the last and the best checkpoint's files."""
    lines = [
        json.loads(line)
        for name in ("metrics", "evaluations")
        for line in (run.finetune_dir / f"{name}.jsonl").read_text().splitlines()
    ]
    checkpoint = newest_checkpoint(run.finetune_dir / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.step == 36
    checkpoint.verify()
    best = best_checkpoint(checkpoint)
    files = {
        f"{place}/{name}": (found.path / name).read_bytes()
        for place, found in (("last", checkpoint), (f"best, step {best.step}", best))
        for name in found.files
        if "safetensors" in name
    }
    return [{k: v for k, v in line.items() if k not in TIMING} for line in lines], files


def sigkill(run, config) -> None:
    moments = random.Random(1)
    folder = run.finetune_dir / "checkpoints"
    cut_short = 0
    for kill in range(4):
        before = checkpoint_steps(folder)
        child = start(run, config)
        if kill % 2:  # amid training: a little after a checkpoint of its own
            poll(lambda before=before: checkpoint_steps(folder) != before)
        time.sleep(moments.uniform(0.0, 0.1))
        os.kill(child, signal.SIGKILL)
        code = wait(child)
        assert code in (0, -signal.SIGKILL), code
        cut_short += code != 0 and checkpoint_steps(folder) != before
    assert cut_short >= 1, "no kill hit a child amid training"
    print(f"4 SIGKILLs, {cut_short} amid training", flush=True)
    assert wait(start(run, config)) == 0


def sigterm(run, config) -> None:
    metrics = run.finetune_dir / "metrics.jsonl"
    child = start(run, config)
    poll(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 3)
    os.kill(child, signal.SIGTERM)
    assert wait(child) == 128 + signal.SIGTERM
    saved = checkpoint_steps(run.finetune_dir / "checkpoints")[-1]
    assert 9 <= saved < 36, (
        saved
    )  # the step at hand was finished and saved, whatever checkpoint_every_steps says
    print(f"SIGTERM stopped and saved after step {saved}", flush=True)
    assert wait(start(run, config)) == 0


def poll(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "nothing was logged within a minute"
        time.sleep(0.002)


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    folder = Path(sys.argv[1])
    store = qa_world.make_store(folder)
    results = []
    for name, harm in (("whole", None), ("killed", sigkill), ("stopped", sigterm)):
        run, config = qa_world.make_run(folder, name, store, *OVERRIDES)
        if harm is None:
            finetune(run, config)  # in this process: the children inherit what it imported
        else:
            harm(run, config)
        results.append(outcome(run))
        left = [p for p in (run.finetune_dir / "checkpoints").iterdir() if p.name.startswith(STAGING_PREFIX)]
        assert not left, left
    whole, killed, stopped = results
    assert whole[0] == killed[0] == stopped[0], (whole[0], killed[0], stopped[0])
    assert whole[1] == killed[1] == stopped[1]
    print("same losses and the same bytes", flush=True)
