"""Many training runs, one after the other. Each leaves a result file: done once, it is never done again."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from realm_fast.errors import ConfigError, TrainingDivergedError
from realm_fast.files import read_json, write_json
from realm_fast.metrics import read_jsonl
from realm_fast.progress import bar
from realm_fast.run_folder import RunFolder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One arm with one seed."""

    arm: str
    seed: int
    steps: int

    @property
    def name(self) -> str:
        return f"{self.arm}.seed-{self.seed}"


def result_path(folder: Path, job: Job) -> Path:
    return folder / "results" / f"{job.name}.json"


def run_jobs(
    folder: Path,
    jobs: Sequence[Job],
    work: Callable[[Job, Callable[[int], None]], dict[str, Any]],
    *,
    tidy: Callable[[Job], None],
    report: Callable[[], object],
    desc: str,
    stop_if_diverged: bool = False,
    progress: bool = False,
) -> None:
    """Does every job that has no result yet.

    Args:
        folder: results go to FOLDER/results.
        work: does one job, from wherever it was left; is given a function to call with each step made;
            returns what to keep.
        tidy: called once a job's result is on disk, unless it diverged: what is no longer needed can go.
            Called again with every job done before, as a kill may have come before it was through.
        report: called after every job, so that what is there can be read at any time.
        desc: on the bar, which goes over the steps of all jobs.
        stop_if_diverged: end at the first job that diverges instead of recording it and going on.

    Raises:
        ConfigError: a result there is was made with another number of steps.
        TrainingDivergedError: a job diverged and stop_if_diverged says so; its result is recorded.
        Interrupted: SIGINT or SIGTERM came; the same call goes on from there.
    """
    pending = []
    for job in jobs:
        path = result_path(folder, job)
        if not path.exists():
            pending.append(job)
            continue
        record = read_json(path, "a result")
        if record["steps"] != job.steps:
            raise ConfigError(
                f"{path}: is of a run of {record['steps']} steps, now {job.steps} are planned; delete "
                f"{folder} to begin anew, or name another --out."
            )
        if record["status"] == "done":
            tidy(job)
    total = sum(job.steps for job in jobs)
    first = total - sum(job.steps for job in pending)
    with bar(total=total, initial=first, desc=desc, unit="step", enabled=progress) as shown:
        for job in pending:
            begin = shown.n

            def on_step(step: int, begin: int = begin) -> None:
                shown.update(begin + step - shown.n)

            shown.set_postfix(arm=job.arm, seed=job.seed)
            diverged: TrainingDivergedError | None = None
            try:
                record = {"status": "done", **work(job, on_step)}
            except TrainingDivergedError as error:
                diverged, record = error, {"status": "diverged", "error": str(error)}
                log.warning("%s, seed %d, diverged: %s", job.arm, job.seed, error)
            write_json(
                result_path(folder, job), {"arm": job.arm, "seed": job.seed, "steps": job.steps, **record}
            )
            if diverged is None:
                tidy(job)
            on_step(job.steps)
            report()
            if diverged is not None and stop_if_diverged:
                raise diverged


def read_results(folder: Path, arms: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """The results there are of each arm, by ascending seed; an arm without any is left out."""
    found: dict[str, list[dict[str, Any]]] = {}
    for arm in arms:
        paths = (folder / "results").glob(f"{arm}.seed-*.json")
        results = [read_json(path, f"a result of {arm}") for path in paths]
        if results:
            found[arm] = sorted(results, key=lambda result: result["seed"])
    return found


def took(run: RunFolder, *stages: str) -> dict[str, float]:
    """Seconds and peak memory of some of a run's stages; what a killed process did not note is not in it."""
    lines = read_jsonl(run.stages_path, "the stages") if run.stages_path.exists() else []
    lines = [line for line in lines if line["stage"] in stages]
    return {
        "seconds": round(sum(line["seconds"] for line in lines), 1),
        "peak_rss_bytes": max((line["peak_rss_bytes"] for line in lines), default=0),
    }
