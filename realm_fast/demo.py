"""The main job on real text, stage by stage, each by the command a user would type.

A stage that is done is not done again: `demo.json` in the output folder remembers what each one ran with,
and a stage cut short goes on from its last checkpoint.
"""

import hashlib
import importlib.resources
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from realm_fast.errors import RealmFastError
from realm_fast.files import read_json, write_json
from realm_fast.run_folder import now_iso

QUESTION = "Who wrote the play Romeo and Juliet?"


class DemoError(RealmFastError):
    """A stage failed; its own message stands above."""


@dataclass(frozen=True)
class Stage:
    name: str
    what: str  # for the reader of the terminal
    arguments: tuple[str, ...]
    resume_if: Path | None = None  # add --resume when this exists


def demo_stages(out: Path, config: Path, overrides: Sequence[str]) -> list[Stage]:
    """The commands of the demo, in order."""
    corpus, run = out / "corpus", out / "run"
    settings = ("--config", str(config), *(word for o in overrides for word in ("--set", o)))
    return [
        Stage(
            "corpus",
            "real text -> blocks -> token store -> salient spans",
            ("corpus", "build", "--out", str(corpus), *settings),
        ),
        Stage(
            "pretrain",
            "retriever and reader learn together from masked sentences, with a live refresh of the index",
            ("pretrain", str(run), "--corpus", str(corpus), *settings),
            resume_if=run / "pretrain" / "checkpoints" / "latest.json",
        ),
        Stage(
            "finetune",
            "question answering: the retriever and a span reader",
            ("finetune", str(run), *settings),
            resume_if=run / "finetune" / "checkpoints" / "latest.json",
        ),
        Stage(
            "evaluate",
            "exact match, F1, recall on test questions",
            ("evaluate", str(run), "--before", *settings),
        ),
        Stage("ask", "one question, answered with evidence", ("ask", str(run), QUESTION)),
        Stage("report", "one page that shows it all", ("report", str(run))),
    ]


def run_demo(
    out: Path, *, quick: bool, fresh: bool, config_path: str | None = None, overrides: Sequence[str] = ()
) -> Path:
    """Runs the stages that are not done yet and returns the report's path.

    Args:
        out: everything is written below this folder.
        quick: the small settings (realm_fast/assets/demo_quick.toml) instead of demo.toml.
        fresh: delete what an earlier demo left in `out` first.
        config_path: other settings.
        overrides: `section.name=value`, passed on to every stage.
    """
    if fresh and (out / "demo.json").exists():
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    name = "demo_quick.toml" if quick else "demo.toml"
    with importlib.resources.as_file(importlib.resources.files("realm_fast") / "assets" / name) as packaged:
        config = out / "config.toml"
        text = Path(config_path or packaged).read_text(encoding="utf-8")
        config.write_text(text, encoding="utf-8")
    memory = out / "demo.json"
    done: dict[str, dict] = read_json(memory, "the demo's record") if memory.exists() else {}
    stages = demo_stages(out, config, overrides)
    fingerprint = hashlib.sha256(text.encode())
    total_s = 0.0
    for number, stage in enumerate(stages, 1):
        fingerprint.update(json.dumps(stage.arguments).encode())  # a changed stage makes the later ones due
        command = list(stage.arguments)
        title = f"[{number}/{len(stages)}] {stage.name}: {stage.what}"
        if done.get(stage.name, {}).get("fingerprint") == fingerprint.hexdigest() and stage.name != "ask":
            print(f"{title}\n    done before, in {done[stage.name]['seconds']:.0f} s", flush=True)
            continue
        if stage.resume_if is not None and stage.resume_if.exists():
            command.append("--resume")
        print(f"{title}\n    realm-fast {shlex.join(command)}", flush=True)
        begin = time.monotonic()
        code = subprocess.call([sys.executable, "-m", "realm_fast", *command])
        if code:
            raise DemoError(
                f"stage {stage.name} ended with exit code {code}. The same demo command goes on from here."
            )
        seconds = time.monotonic() - begin
        total_s += seconds
        done[stage.name] = {"fingerprint": fingerprint.hexdigest(), "seconds": seconds, "finished": now_iso()}
        write_json(memory, done)
        print(f"    {seconds:.0f} s", flush=True)
    report = out / "run" / "report.html"
    print(f"The main job took {total_s / 60:.1f} min this time. Open {report}", flush=True)
    return report
