"""The ablation table: REALM against itself with one thing changed, several seeds each.

    run_ablations(Path("runs/reproduce"), config, seeds=3, hours=3)

All arms start from one warm start (but for random initialisation) and make as many joint steps. A seed
decides what is masked and what dropout draws; the spread is therefore that of joint training, not of the
warm start.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from realm_fast.checkpoint import newest_checkpoint
from realm_fast.config import Config
from realm_fast.embedder import Embedder
from realm_fast.errors import UserError
from realm_fast.evaluate import parse_cutoffs
from realm_fast.files import write_json
from realm_fast.metrics import read_jsonl
from realm_fast.reader import Reader
from realm_fast.reproduce.arms import ABLATIONS, REALM, Arm
from realm_fast.reproduce.jobs import Job, read_results, run_jobs, took
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
from realm_fast.run_folder import RunFolder, describe_machine, record_stage
from realm_fast.train import pretrain


def choose_arms(names: str | None) -> list[Arm]:
    """The arms of a comma-separated list, in the table's order; all of them without one.

    Raises:
        UserError: there is no arm of that name.
    """
    if names is None:
        return list(ABLATIONS)
    wanted = {name.strip() for name in names.split(",") if name.strip()}
    known = [arm.name for arm in ABLATIONS]
    if not wanted or (unknown := sorted(wanted - set(known))):
        got = ", ".join(unknown) if wanted else "none"
        raise UserError(f"--arms: expected some of {', '.join(known)}, got {got}")
    return [arm for arm in ABLATIONS if arm.name in wanted]


def run_ablations(
    out: Path,
    config: Config,
    *,
    seeds: int = 3,
    hours: float | None = None,
    arms: Sequence[Arm] = ABLATIONS,
    corpus: Path | None = None,
    stop_if_diverged: bool = False,
    progress: bool = False,
) -> Path:
    """Runs what is missing and writes the table.

    Args:
        out: everything goes below it.
        config: the recipe.
        seeds: 0 ... seeds - 1.
        hours: for the whole table, whichever arms are chosen now; the number of joint steps follows from it.
            None: config.pretrain.steps.
        arms: which of ABLATIONS.
        corpus: a token store to use instead of OUT/corpus.
        stop_if_diverged: end at the first arm that diverges instead of recording it.

    Returns:
        The path of the table.

    Raises:
        UserError: settings, folder or hours do not fit.
        Interrupted: SIGINT or SIGTERM came; the same call goes on from there.
    """
    import_pyplot()  # its absence should show before hours of work
    check_questions(config.finetune.questions, config.evaluate.limit_questions)
    shared = prepare(out, config, corpus=corpus, progress=progress)
    with exclusively(out):
        questions = shared.questions(config.finetune.questions, progress=progress)
        plan = make_plan(shared, arm=REALM, seeds=seeds, hours=hours, questions=questions)
        folder = out / "ablations"
        run_arms(
            shared, plan, folder, arms=arms, seeds=seeds, questions=questions,
            report=lambda: write_tables(shared, plan, folder, with_plot=False),
            stop_if_diverged=stop_if_diverged, progress=progress,
        )  # fmt: skip
        return write_tables(shared, plan, folder)


def run_arms(
    shared: Shared,
    plan: dict[str, Any],
    folder: Path,
    *,
    arms: Sequence[Arm],
    seeds: int,
    questions: str,
    report: Callable[[], object],
    stop_if_diverged: bool = False,
    progress: bool = False,
) -> None:
    """Runs the arms that have no result yet: all of them with the first seed, then with the next."""
    by_name = {arm.name: arm for arm in arms}

    def work(job: Job, on_step: Callable[[int], None]) -> dict[str, Any]:
        arm = by_name[job.arm]
        config = shared.arm_config(arm, job.seed, job.steps)
        run = RunFolder.open_or_create(folder / "runs" / job.name, config, shared.store)
        checkpoint = newest_checkpoint(run.pretrain_dir / "checkpoints")
        if checkpoint is None or checkpoint.step < job.steps:
            pretrain(run, config, resume=checkpoint is not None, measure=False, on_step=on_step)
            checkpoint = newest_checkpoint(run.pretrain_dir / "checkpoints")
        assert checkpoint is not None
        with record_stage(run.stages_path, "measure"):
            measured = shared.measure(
                run,
                Embedder.load(checkpoint.module_folder("embedder")),
                Reader.load(checkpoint.module_folder("reader")),
                step=checkpoint.step,
                questions=questions,
            )
        return {"measured": measured, **took(run, "index", "pretrain", "measure")}

    def tidy(job: Job) -> None:
        if by_name[job.arm] is not REALM:  # whose models the QA table starts from; metrics stay in any case
            for name in ("checkpoints", "snapshots"):
                shutil.rmtree(folder / "runs" / job.name / "pretrain" / name, ignore_errors=True)

    jobs = [Job(arm.name, seed, plan["steps"]) for seed in range(seeds) for arm in arms]
    run_jobs(
        folder, jobs, work, tidy=tidy, report=report, desc="ablations",
        stop_if_diverged=stop_if_diverged, progress=progress,
    )  # fmt: skip


def write_tables(shared: Shared, plan: dict[str, Any], folder: Path, *, with_plot: bool = True) -> Path:
    """table.md, table.json and plot.png of the results there are; returns the first."""
    cutoffs = parse_cutoffs(shared.config.evaluate.recall_at)
    shown_k = 5 if 5 in cutoffs else cutoffs[0]
    names = [
        "masked_accuracy", "masked_accuracy_null", "retrieval_utility", "masked_nll",
        *(f"recall@{k}" for k in cutoffs), *(f"reachable_recall@{k}" for k in cutoffs),
        *(name for name in plan["start"] if name.startswith("span_recall@")),
    ]  # fmt: skip
    spans = f"span_recall@{shared.config.pretrain.blocks_a_query}"
    results = read_results(folder, [arm.name for arm in ABLATIONS])
    arms = [arm for arm in ABLATIONS if arm.name in results]
    summaries = {arm.name: summarise(results[arm.name], names) for arm in arms}
    reference = summaries.get(REALM.name)
    for arm in arms:
        summary = summaries[arm.name]
        summary["against_realm"] = {
            name: paired_difference(summary, reference, name) if reference and arm is not REALM else None
            for name in names
        }
    recall = f"recall@{shown_k}"
    rows = [_start_row(plan["start"], cutoffs, shown_k, spans)]
    for arm in arms:
        metrics = summaries[arm.name]["metrics"]
        rows.append(
            [
                arm.title,
                seeds_cell(summaries[arm.name]),
                with_spread(metrics["masked_accuracy"], scale=100),
                with_spread(metrics["masked_accuracy_null"], scale=100),
                with_spread(metrics["retrieval_utility"], digits=3),
                with_spread(metrics["span_recall@1"]),
                with_spread(metrics[spans]),
                *(with_spread(metrics[f"recall@{k}"], digits=2) for k in cutoffs),
                with_spread(metrics[f"reachable_{recall}"], digits=2),
                number(arm.published.recall_at_5 if arm.published else None),
                number(arm.published.exact_match if arm.published else None),
            ]
        )
    header = [
        "arm", "seeds", "masked words right, %", "without retrieval, %", "utility, nats",
        "first block holds the span, %", "spans found, %",
        *(f"R@{k}" for k in cutoffs), f"R@{shown_k} of the reachable", "paper: R@5", "paper: EM",
    ]  # fmt: skip
    compared = [  # (column, metric, factor, digits)
        ("masked words right, points", "masked_accuracy", 100, 2),
        ("utility, nats", "retrieval_utility", 1, 3),
        ("first block holds the span, points", "span_recall@1", 1, 1),
        ("spans found, points", spans, 1, 1),
        (f"R@{shown_k}, points", recall, 1, 2),
    ]
    differences = [
        [
            arm.title,
            *(
                with_interval(summaries[arm.name]["against_realm"][name], scale=scale, digits=digits)
                for _, name, scale, digits in compared
            ),
        ]
        for arm in arms
        if reference and arm is not REALM
    ]
    stages = _stages(shared, summaries, arms)
    nearest = [f"{arm.title}: {arm.published.arm}" for arm in arms if arm.published and arm.published.arm]
    start = plan["start"]
    refreshes = (plan["steps"] - 1) // plan["refresh_every_steps"]
    text = "\n".join(
        [
            "# Ablations",
            "",
            markdown(header, rows),
            "",
            f"{plan['steps']} joint steps an arm, the index refreshed every {plan['refresh_every_steps']}; "
            f"{len(shared.store):,} blocks. Mean ± standard deviation over seeds of joint training from one "
            f"warm start. Recall: percent of {start['questions']:,} questions "
            f"({start['reachable_questions']:,} reachable) that no stage was trained on. All arms are "
            "measured alike: salient spans of held-out documents, null block, no trivial candidate, token "
            "level. Spans found: masked spans that stand in one of the candidates.",
            "",
            f"An index 30x staler is that of the start throughout, as a run has {refreshes} refreshes. "
            "The paper's figures are for NQ dev, after fine-tuning (EM) and zero-shot (R@5), with 13 million "
            f"blocks and 200,000 steps of 512; nearest arms there: {'; '.join(nearest) or 'the same'}.",
            *(_diverged(arms, summaries)),
            "",
            "## Against REALM, seed by seed",
            "",
            markdown(["arm", *(column for column, *_ in compared)], differences),
            "",
            PAIRED,
            "",
            "![Mean and spread of every arm](plot.png)",
            "",
            "## What each stage took",
            "",
            markdown(["stage", "s", "peak memory, MB"], stage_rows(stages)),
            "",
        ]
    )
    write_json(
        folder / "table.json",
        {
            "plan": plan,
            "machine": describe_machine(),
            "corpus": {"blocks": len(shared.store), "hash": shared.store.corpus_hash},
            "arms": {
                arm.name: {"title": arm.title, "changes": arm.changes, **summaries[arm.name]} for arm in arms
            },
            "stages": stages,
        },
    )
    panels = [
        (f"recall@{shown_k} of {start['questions']:,} questions, %", recall, 1.0),
        ("masked words right, %", "masked_accuracy", 100.0),
        ("retrieval utility, nats", "retrieval_utility", 1.0),
        ("masked spans that stand in a candidate, %", spans, 1.0),
    ]
    if with_plot:
        plot(
            folder / "plot.png",
            [arm.title for arm in arms],
            [
                (title, [summaries[a.name]["metrics"][name] for a in arms], scale)
                for title, name, scale in panels
            ],
        )
    write_text(folder / "table.md", text)
    return folder / "table.md"


def _start_row(start: dict[str, Any], cutoffs: Sequence[int], shown_k: int, spans: str) -> list[str]:
    return [
        "warm start, before joint training",
        "–",
        number(100 * start["masked_accuracy"]),
        number(100 * start["masked_accuracy_null"]),
        number(start["retrieval_utility"], 3),
        number(start["span_recall@1"]),
        number(start[spans]),
        *(number(start[f"recall@{k}"], 2) for k in cutoffs),
        number(start[f"reachable_recall@{shown_k}"], 2),
        "–", "–",
    ]  # fmt: skip


def _diverged(arms: Sequence[Arm], summaries: dict[str, Any]) -> list[str]:
    lines = [
        f"- {arm.title}, seed {lost['seed']}: {lost['error']}"
        for arm in arms
        for lost in summaries[arm.name]["diverged"]
    ]
    return ["", "Diverged, and in no mean:", "", *lines] if lines else []


def _stages(shared: Shared, summaries: dict[str, Any], arms: Sequence[Arm]) -> list[dict[str, Any]]:
    lines = read_jsonl(shared.start.stages_path, "the stages")
    names = dict.fromkeys(line["stage"] for line in lines)
    return [
        *({"stage": name, **took(shared.start, name)} for name in names),
        *(
            {
                "stage": f"{arm.title}, one seed",
                "seconds": summaries[arm.name]["seconds"],
                "peak_rss_bytes": summaries[arm.name]["peak_rss_bytes"],
            }
            for arm in arms
        ),
    ]
