"""What every arm shares: the corpus, the warm start, the questions, the way to measure, and the plan.

    shared = prepare(out, config)                 # corpus, inverse cloze task, evidence warm-up: once
    plan = make_plan(shared, arm=REALM, seeds=3, …)    # how many steps a run can make: measured, then kept

Arms are all measured alike, whatever they were trained with: salient spans of held-out documents, the null
block, the trivial candidate excluded, the recipe's number of candidates, token level.
"""

import contextlib
import dataclasses
import logging
import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from realm_fast.checkpoint import Checkpoint, identity_of, newest_checkpoint
from realm_fast.config import Config, apply_overrides
from realm_fast.device import resolve_device
from realm_fast.embedder import Embedder
from realm_fast.errors import ConfigError, DataError, UserError
from realm_fast.evaluate import question_sets
from realm_fast.files import read_json, write_json
from realm_fast.ict import Ict, ict
from realm_fast.masking import Masker, SalientSpans
from realm_fast.metrics import read_jsonl, read_metrics
from realm_fast.model import RealmModel
from realm_fast.prepare import prepare_corpus
from realm_fast.probe import Probe
from realm_fast.qa_model import index_of
from realm_fast.questions import load_questions, save_questions
from realm_fast.reader import Reader
from realm_fast.reading import questions_hash
from realm_fast.reproduce.arms import ABLATIONS, REFRESHES, Arm, refresh_every_steps
from realm_fast.run_folder import RunFolder
from realm_fast.snapshot import open_snapshot
from realm_fast.stage import StageTrainer, stage_dir
from realm_fast.start import starting_models
from realm_fast.token_store import TokenStore
from realm_fast.train import pretrain
from realm_fast.warmup import Warmup, warmup

TRIAL_STEPS = 8  # of which the first are left out of the median: caches are cold
TRIAL_COLD_STEPS = 3
MIN_STEPS = 30  # fewer are no training
SAFETY = 0.95  # of the time there is: what is measured in a trial is not what a busy machine gives
SECTIONS = [f.name for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.type)]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shared:
    """What the arms start from."""

    out: Path
    config: Config  # the recipe
    store: TokenStore
    spans: SalientSpans
    start: RunFolder
    start_embedder: Path
    start_reader: Path

    def questions(self, specs: str, *, progress: bool = False) -> str:
        """The files of these question sets, comma-separated, with every question marked reachable or not."""
        limit = self.config.evaluate.limit_questions
        files = []
        for spec in (part.strip() for part in specs.split(",") if part.strip()):
            name = Path(spec).stem if Path(spec).exists() else spec
            asked = questions_hash(load_questions(spec, limit=limit))  # files may share a name, and change
            file = self.out / "questions" / asked[:16] / f"{name}.jsonl"
            if not file.exists():
                only = apply_overrides(self.config, [f"evaluate.questions={spec}"])
                (found,) = question_sets(self.start, only, self.store, progress=progress)
                if not any(question.reachable for question in found.questions):
                    log.warning("%s: none of its questions is reachable in this corpus", spec)
                save_questions(file, found.questions)
            files.append(str(file))
        return ",".join(files)

    def arm_config(self, arm: Arm, seed: int, steps: int) -> Config:
        """The recipe with what an arm changes."""
        starts = [
            f"pretrain.start_embedder={self.start_embedder}",
            f"pretrain.start_reader={self.start_reader}",
        ]
        every = refresh_every_steps(steps) * arm.stale_factor
        return apply_overrides(
            self.config,
            [
                f"seed={seed}",
                f"pretrain.steps={steps}",
                f"refresh.every_steps={every}",
                *(starts if arm.warm else ()),
                *arm.changes,
            ],
        )

    def measure(
        self, run: RunFolder, embedder: Embedder, reader: Reader, *, step: int, questions: str
    ) -> dict[str, Any]:
        """Masked words with and without retrieval, retrieval utility, zero-shot recall."""
        config = apply_overrides(
            self.config, [f"evaluate.questions={questions}", "evaluate.limit_questions=0"]
        )
        device = resolve_device(config.device)
        model = RealmModel(
            embedder.to(device),
            reader.to(device),
            temperature=config.pretrain.score_temperature,
            null_score_offset=run.config().pretrain.null_score_offset,  # it belongs to the weights
        ).eval()
        path = index_of(run, embedder, self.store, config, out=run.evaluate_dir / "snapshots", step=step)
        held_out = Masker(self.store, config.masking, config.seed, self.spans, split="heldout")
        probe = Probe(run, config, model, self.store, held_out, progress=False)
        everything, reachable = probe.rows(open_snapshot(path))
        return {
            **{name: everything[name] for name in everything if name.startswith(("masked", "retrieval"))},
            **{f"span_recall@{k}": value for k, value in everything["span_recall"].items()},
            **{f"recall@{k}": value for k, value in everything["recall"].items()},
            **{f"reachable_recall@{k}": value for k, value in reachable["recall"].items()},
            "questions": everything["questions"],
            "reachable_questions": reachable["questions"],
        }


@contextlib.contextmanager
def exclusively(out: Path) -> Iterator[None]:
    """Keeps a second `reproduce` out of the folder."""
    with RunFolder(out / "start").lock("reproduction"):
        yield


def prepare(out: Path, config: Config, *, corpus: Path | None = None, progress: bool = False) -> Shared:
    """Makes what is missing of corpus, spans, inverse cloze task and evidence warm-up, and opens it."""
    if config.masking.strategy != "salient_span":
        raise ConfigError(
            f"masking.strategy: the recipe needs salient_span (the arms try the others), "
            f"got {config.masking.strategy}"
        )
    if config.pretrain.blocks_a_query < 1:
        raise ConfigError(
            "pretrain.num_candidates: the recipe needs a block beside the null block (the arms try without), "
            f"got {config.pretrain.num_candidates}"
        )
    if corpus is not None and not corpus.exists():
        raise DataError(f"{corpus}: no such corpus; leave --corpus out to have one built.")
    store, spans = prepare_corpus(config, corpus or out / "corpus", progress=progress)
    assert spans is not None
    for split in ("train", "heldout"):  # a corpus without names shows now, not after the first stage
        Masker(store, config.masking, config.seed, spans, split=split)
    start = RunFolder.open_or_create(out / "start", config, store)
    for kind, run_it in ((Ict, ict), (Warmup, warmup)):
        if not _is_finished(kind, start, config, store):
            run_it(start, config, resume=True, progress=progress)
    return Shared(
        out, config, store, spans, start,
        _newest(start, "ict").path / "embedder", _newest(start, "warmup").path / "reader",
    )  # fmt: skip


def _is_finished(kind: type[StageTrainer], run: RunFolder, config: Config, store: TokenStore) -> bool:
    folder = stage_dir(run, kind.name)
    checkpoint = newest_checkpoint(folder / "checkpoints")
    if checkpoint is None or checkpoint.step < getattr(config, kind.name).steps:
        return False
    checkpoint.check_identity(
        identity_of(config, kind.shapes, corpus_hash=store.corpus_hash, tokenizer_hash=store.tokenizer_hash),
        way_out="Use the settings that the folder was begun with, or another --out.",
    )
    evaluations = folder / "evaluations.jsonl"
    lines = read_jsonl(evaluations, "the evaluations") if evaluations.exists() else []
    return any(line["when"] == "after" for line in lines)


def _newest(run: RunFolder, stage: str) -> Checkpoint:
    checkpoint = newest_checkpoint(stage_dir(run, stage) / "checkpoints")
    assert checkpoint is not None, f"{stage} is finished"
    return checkpoint


# ---------------------------------------------------------------- the plan


def make_plan(shared: Shared, *, arm: Arm, seeds: int, hours: float | None, questions: str) -> dict[str, Any]:
    """How many joint steps a run makes, measured first and kept in OUT/plan.json.

        steps = (SAFETY (hours - spent) / runs - (refreshes + 2) index_s - measure_s) / step_s

    Args:
        arm: the one whose steps are timed.
        seeds: the time is shared by so many runs of every arm of the ablation table.
        hours: for everything, what is already done included; None: the recipe's pretrain.steps.

    Returns:
        plan.json; "start" in it is what the models can do before joint training.

    Raises:
        ConfigError: the plan there is was made for other settings.
        DataError: there are runs, but the plan that they followed is gone.
        UserError: the hours are too few.
    """
    path = shared.out / "plan.json"
    identity = identity_of(
        shared.config,
        SECTIONS,
        corpus_hash=shared.store.corpus_hash,
        questions_hash=questions_hash(load_questions(questions)),  # a file may change under its name
    )
    if path.exists():
        plan = read_json(path, "the plan")
        differing = [
            f"  {name}: the plan has {plan['identity'].get(name)!r}, now it is {identity.get(name)!r}"
            for name in sorted(plan["identity"].keys() | identity.keys())
            if plan["identity"].get(name) != identity.get(name)
        ]
        if differing:
            lines = [
                f"{path}: made for other settings:",
                *differing,
                "Go on with those, or name another --out.",
            ]
            raise ConfigError("\n".join(lines))
        return plan
    for folder in (shared.out / "ablations", shared.out / "qa"):
        if folder.exists():
            raise DataError(
                f"{path}: is gone, but {folder} holds runs that were made by it; delete them to plan anew, "
                "or name another --out."
            )
    begin, runs = time.monotonic(), seeds * len(ABLATIONS)
    started = starting_models(shared.start, shared.config, shared.store)
    start = shared.measure(shared.start, started.embedder, started.reader, step=0, questions=questions)
    plan = {"hours": hours, "runs": runs, "steps": shared.config.pretrain.steps}
    if hours is not None:
        measure_s = time.monotonic() - begin
        timed = _trial(shared, arm)
        spent_s = sum(line["seconds"] for line in read_jsonl(shared.start.stages_path, "the stages"))
        spent_s += time.monotonic() - begin
        fixed_s = (REFRESHES + 2) * timed["index_s"] + measure_s
        share_s = SAFETY * (3600 * hours - spent_s) / runs
        steps = int((share_s - fixed_s) / timed["step_s"])
        if steps < MIN_STEPS:
            needed_h = (runs * (fixed_s + MIN_STEPS * timed["step_s"]) / SAFETY + spent_s) / 3600
            raise UserError(
                f"--hours: expected at least {needed_h:.1f} for {runs} runs of {MIN_STEPS} steps and more, "
                f"got {hours:g} (a step takes {timed['step_s']:.2f} s here, {fixed_s:.0f} s of each run are "
                f"index and evaluation, {spent_s:.0f} s are spent); or give fewer --seeds"
            )
        plan |= {"steps": steps, "measure_s": measure_s, "spent_s": spent_s, **timed}
    plan |= {"refresh_every_steps": refresh_every_steps(plan["steps"]), "start": start, "identity": identity}
    write_json(path, plan)
    return plan


def _trial(shared: Shared, arm: Arm) -> dict[str, float]:
    """Seconds of a step and of an index, from a short run that is then forgotten."""
    folder = shared.out / "trial"
    shutil.rmtree(folder, ignore_errors=True)
    config = apply_overrides(
        shared.arm_config(arm, 0, TRIAL_STEPS), ["refresh.mode=off", "pretrain.log_every_steps=1"]
    )
    run = RunFolder.create(folder, config, shared.store)
    pretrain(run, config, measure=False)
    seconds = [line["step_s"] for line in read_metrics(run.pretrain_dir / "metrics.jsonl")]
    index = [line for line in read_jsonl(run.stages_path, "the stages") if line["stage"] == "index"]
    shutil.rmtree(folder)
    return {"step_s": statistics.median(seconds[TRIAL_COLD_STEPS:]), "index_s": index[-1]["seconds"]}


def check_questions(specs: str, limit: int) -> None:
    """Names what is wrong with the questions before hours are spent. Raises UserError."""
    load_questions(specs, limit=limit)
