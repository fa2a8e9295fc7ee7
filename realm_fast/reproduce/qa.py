"""The table of question answering: REALM, fine-tuned, beside its baselines, several seeds each.

    run_qa(Path("runs/reproduce"), config, seeds=3, hours=3)

Every system is fine-tuned alike, on the same questions. REALM starts from the REALM arm of the ablation table
with the same seed (run now where it was not), the others from the warm start that all arms share.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from realm_fast.checkpoint import Checkpoint, newest_checkpoint
from realm_fast.config import Config, FinetuneConfig, apply_overrides
from realm_fast.early_stopping import split_dev
from realm_fast.errors import DataError, TrainingDivergedError
from realm_fast.evaluate import evaluate, parse_cutoffs
from realm_fast.files import read_json, write_json
from realm_fast.finetune import finetune
from realm_fast.questions import load_questions
from realm_fast.reproduce.ablations import run_arms, write_tables
from realm_fast.reproduce.arms import PUBLISHED_QA, REALM, REALM_QA, SYSTEMS, System
from realm_fast.reproduce.jobs import Job, read_results, result_path, run_jobs, took
from realm_fast.reproduce.shared import Shared, check_questions, exclusively, make_plan, prepare
from realm_fast.reproduce.table import (
    PAIRED,
    import_pyplot,
    markdown,
    number,
    paired_difference,
    plot,
    seeds_cell,
    stage_rows,
    summarise,
    with_interval,
    with_spread,
    write_text,
)
from realm_fast.run_folder import RunFolder, describe_machine


def run_qa(
    out: Path,
    config: Config,
    *,
    seeds: int = 3,
    hours: float | None = None,
    corpus: Path | None = None,
    stop_if_diverged: bool = False,
    progress: bool = False,
) -> Path:
    """Runs what is missing, the REALM arm of the ablations included, and writes the table.

    Args:
        hours: as for `run_ablations`: it decides the joint steps of REALM where no plan was made yet.
            Fine-tuning makes config.finetune.steps.
        out, config, seeds, corpus, stop_if_diverged: as for `run_ablations`.

    Returns:
        The path of the table.
    """
    import_pyplot()  # its absence should show before hours of work
    check_questions(config.finetune.questions, config.evaluate.limit_questions)
    check_questions(config.evaluate.questions, config.evaluate.limit_questions)
    split_dev(load_questions(config.finetune.questions, limit=config.finetune.limit_questions), config)
    shared = prepare(out, config, corpus=corpus, progress=progress)
    with exclusively(out):
        dev = shared.questions(config.finetune.questions, progress=progress)
        test = shared.questions(config.evaluate.questions, progress=progress)
        plan = make_plan(shared, arm=REALM, seeds=seeds, hours=hours, questions=dev)
        ablations, folder = out / "ablations", out / "qa"
        run_arms(
            shared, plan, ablations, arms=[REALM], seeds=seeds, questions=dev,
            report=lambda: write_tables(shared, plan, ablations, with_plot=False),
            stop_if_diverged=stop_if_diverged, progress=progress,
        )  # fmt: skip
        systems = {system.name: system for system in SYSTEMS}

        def work(job: Job, on_step: Callable[[int], None]) -> dict[str, Any]:
            system = systems[job.arm]
            settings = _settings(shared, ablations, system, job, plan["steps"], test)
            run = RunFolder.open_or_create(folder / "runs" / job.name, settings, shared.store)
            resume = newest_checkpoint(run.finetune_dir / "checkpoints") is not None
            tuned = finetune(run, settings, resume=resume, on_step=on_step)
            found = evaluate(run, settings)
            return {
                "measured": _flat(found["sets"]),
                "best_step": tuned.best_step,
                **took(run, "finetune", "evaluate"),
            }

        def tidy(job: Job) -> None:
            for name in ("checkpoints", "snapshots"):
                shutil.rmtree(folder / "runs" / job.name / "finetune" / name, ignore_errors=True)

        jobs = [Job(s.name, seed, config.finetune.steps) for seed in range(seeds) for s in SYSTEMS]
        run_jobs(
            folder, jobs, work, tidy=tidy, desc="question answering",
            report=lambda: write_table(shared, folder, with_plot=False),
            stop_if_diverged=stop_if_diverged, progress=progress,
        )  # fmt: skip
        write_tables(shared, plan, ablations)
        return write_table(shared, folder)


def _settings(
    shared: Shared, ablations: Path, system: System, job: Job, joint_steps: int, questions: str
) -> Config:
    embedder, reader = shared.start_embedder, shared.start_reader
    if system.from_realm:
        checkpoint = _realm_checkpoint(ablations, Job(REALM.name, job.seed, joint_steps))
        embedder, reader = checkpoint.path / "embedder", checkpoint.path / "reader"
    return apply_overrides(
        shared.config,
        [
            f"seed={job.seed}",
            f"pretrain.start_embedder={embedder}",
            f"pretrain.start_reader={reader}",
            f"evaluate.questions={questions}",
            "evaluate.limit_questions=0",
            *system.changes,
        ],
    )


def _realm_checkpoint(ablations: Path, job: Job) -> Checkpoint:
    result = read_json(result_path(ablations, job), "the result of REALM")
    if result["status"] == "diverged":
        raise TrainingDivergedError(f"its joint pre-training diverged: {result['error']}")
    checkpoint = newest_checkpoint(ablations / "runs" / job.name / "pretrain" / "checkpoints")
    if checkpoint is None:
        raise DataError(
            f"{ablations / 'runs' / job.name}: its checkpoint is gone; delete {result_path(ablations, job)} "
            "to have that arm trained again."
        )
    return checkpoint


def _flat(sets: list[dict[str, Any]]) -> dict[str, float | None]:
    """{"nq.test/all/exact_match": 1.5, "nq.test/all/recall@5": 12.0, ...}"""
    flat: dict[str, float | None] = {}
    for row in sets:
        place = f"{row['name']}/{row['subset']}"
        flat[f"{place}/questions"] = row["questions"]
        flat[f"{place}/exact_match"], flat[f"{place}/f1"] = row["exact_match"], row["f1"]
        flat |= {f"{place}/recall@{k}": value for k, value in row["recall"].items()}
    return flat


def write_table(shared: Shared, folder: Path, *, with_plot: bool = True) -> Path:
    """table.md, table.json and plot.png of the results there are; returns the first."""
    results = read_results(folder, [system.name for system in SYSTEMS])
    systems = [system for system in SYSTEMS if system.name in results]
    best_steps = {
        name: [r["best_step"] for r in found if r["status"] == "done"] for name, found in results.items()
    }
    done = [r["measured"] for found in results.values() for r in found if r["status"] == "done"]
    names = list(dict.fromkeys(name for measured in done for name in measured))
    summaries = {system.name: summarise(results[system.name], names) for system in systems}
    questions = {
        name.removesuffix("/questions"): int(done[0][name]) for name in names if name.endswith("/questions")
    }
    stages = [
        {"stage": f"{s.title}, one seed", **{k: summaries[s.name][k] for k in ("seconds", "peak_rss_bytes")}}
        for s in systems
    ]
    write_json(
        folder / "table.json",
        {
            "machine": describe_machine(),
            "corpus": {"blocks": len(shared.store), "hash": shared.store.corpus_hash},
            "systems": {
                s.name: {
                    "title": s.title,
                    "changes": s.changes,
                    "best_steps": best_steps[s.name],
                    **summaries[s.name],
                }
                for s in systems
            },
            "stages": stages,
        },
    )
    shown = [place for place, count in questions.items() if place.endswith("/reachable") and count]
    if with_plot and done:
        plot(
            folder / "plot.png",
            [system.title for system in systems],
            [
                (
                    f"EM, {place.replace('/', ', ')}, %",
                    [summaries[s.name]["metrics"][f"{place}/exact_match"] for s in systems],
                    1.0,
                )
                for place in shown or questions
            ],
        )
    lost = [
        f"- {system.title}, seed {one['seed']}: {one['error']}"
        for system in systems
        for one in summaries[system.name]["diverged"]
    ]
    cutoffs = parse_cutoffs(shared.config.evaluate.recall_at)
    tuning = shared.config.finetune
    parts = [
        "# Question answering",
        *(_set_table(place, count, systems, summaries, cutoffs) for place, count in questions.items()),
        f"{tuning.steps} fine-tuning steps of {tuning.batch_questions} questions; {len(shared.store):,} "
        f"blocks. {_answering(tuning, systems, best_steps)} Mean ± standard deviation over seeds. Recall: "
        "percent with an answer string in the best blocks; reachable: an answer string is in the BM25 top "
        "blocks or in those of the embedder before any training. The paper's figures are for 13 million "
        "blocks and BERT-base.",
        f"Against REALM: {PAIRED[0].lower()}{PAIRED[1:]}",
        *(["Diverged, and in no mean:", "\n".join(lost)] if lost else []),
        *(["![Mean and spread of every system](plot.png)"] if done else []),
        "## What each took",
        markdown(["system", "s", "peak memory, MB"], stage_rows(stages)),
    ]
    write_text(folder / "table.md", "\n\n".join(parts) + "\n")
    return folder / "table.md"


def _answering(tuning: FinetuneConfig, systems: list[System], best_steps: dict[str, list[int]]) -> str:
    """Which step of each run is the one measured."""
    if not (tuning.dev_questions or tuning.dev_share):
        return "The last one answers."
    steps = [f"{s.title} {', '.join(map(str, best_steps[s.name])) or 'none'}" for s in systems]
    return f"The one that did best on dev answers, seed by seed: {'; '.join(steps)}."


def _set_table(
    place: str, count: int, systems: list[System], summaries: dict[str, Any], cutoffs: list[int]
) -> str:
    """The part about one question set, all of it or the reachable part."""
    set_name, _, subset = place.rpartition("/")
    title = f"## {set_name}, {subset} ({count:,} questions)"
    if not count:
        return f"{title}\n\nNo question of the set is reachable: no block looked at holds an answer."
    exact = f"{place}/exact_match"
    columns = ["exact_match", "f1", *(f"recall@{k}" for k in cutoffs)]
    rows = []
    for system in systems:
        metrics = summaries[system.name]["metrics"]
        differs = "–"
        if system is not REALM_QA and REALM_QA.name in summaries:
            against = paired_difference(summaries[system.name], summaries[REALM_QA.name], exact)
            differs = with_interval(against, digits=2)
        published = PUBLISHED_QA.get(system.name, {}).get(set_name) if subset == "all" else None
        rows.append(
            [
                system.title,
                seeds_cell(summaries[system.name]),
                *(with_spread(metrics[f"{place}/{name}"], digits=2) for name in columns),
                differs,
                number(published),
            ]
        )
    header = [
        "system", "seeds", "EM", "F1", *(f"R@{k}" for k in cutoffs),
        "EM against REALM, seed by seed", "paper: EM",
    ]  # fmt: skip
    return f"{title}\n\n{markdown(header, rows)}"
