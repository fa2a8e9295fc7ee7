"""What the report shows, read from a run folder and checked: a part not run is None, a malformed one raises.

    data = RunData.read("runs/demo/run")
    data.metrics            # [{"step": 10, "loss": 7.1, ...}, ...] or None where pre-training never ran

Every error names the file, and the line or the place in it, with what was expected and what came.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from realm_fast.config import Config
from realm_fast.errors import CorruptArtifactError, DataError
from realm_fast.files import read_json
from realm_fast.metrics import read_jsonl, read_metrics

Record = dict[str, Any]
SUBSETS = {"all": "all", "reachable": "reachable"}  # as tables and charts call them


class Share:
    """Schema of a number between 0 and 1."""


class Percentage:
    """Schema of a number between 0 and 100."""


class Score:
    """Schema of a question's score: a number between 0 and 100, or true or false."""


class Maybe:
    """Schema of a value that may also be null."""

    def __init__(self, schema: Any) -> None:
        self.schema = schema


TOKEN = {"token": str, "p": Share}
ILLUSTRATION = {
    "title": str,
    "level?": str,
    "origin_block_id": int,
    "step": int,
    "query": str,
    "query_tokens?": [str],
    "positions": [int],
    "gold": [str],
    "candidates": [
        {
            "slot": int,
            "block_id": int,
            "title": str,
            "text": str,
            "p_z": Share,
            "responsibility": Share,
            "gradient": float,
            "predictions": [[TOKEN]],
            "gold_p": [Share],
        }
    ],
    "marginal": [[TOKEN]],
    "gold_marginal_p": [Share],
    "null_gold_p?": Maybe([Share]),
}
METRICS: Record = {"step": int, "skipped?": Maybe({"*": int}), "probe_overlap?": Maybe(Share)} | {
    f"{name}?": Maybe(float)
    for name in (
        # of both stages
        "loss", "reader_lr", "embedder_lr", "grad_norm", "step_s",
        # of pre-training
        "retrieval_utility", "masked_accuracy", "null_probability", "staleness_steps",
        "oldest_staleness_steps", "snapshot_step", "score_drift", "drift_check_s", "queries_per_s",
        "refresh_blocks_per_s", "trainer_wait_s", "handover_s", "refresh_failures",
        # of fine-tuning
        "retriever_loss", "reader_loss", "questions_per_s", "with_answer_retrieved", "with_answer_read",
    )
}  # fmt: skip
REFRESH = {"event": str}
REFRESH_EVENTS = {  # by what happened; other events are passed over
    "handed over": {"step": int, "reason": str},
    "in use": {
        "step": int,
        "snapshot_step": int,
        "oldest_shard_step": int,
        "fresh_shards": int,
        "shards": int,
    },
}
RECALL = Maybe({"*": Maybe(Percentage)})  # by cut-off, "1", "5", …
EVALUATION = {
    "when": str,
    "step": int,
    "questions?": Maybe(int),
    "subset": str,
    "recall?": RECALL,
    "masked_accuracy?": Maybe(Share),
    "masked_accuracy_null?": Maybe(Share),
    "masked_nll?": Maybe(float),
    "masked_nll_null?": Maybe(float),
    "retrieval_utility?": Maybe(float),
    "span_recall?": RECALL,
}
ICT_EVALUATION = {
    "when": str,
    "step": int,
    "sentences": int,
    "blocks": int,
    "recall": {"*": Maybe(Percentage)},
}
WARMUP_EVALUATION = {
    "when": str, "step": int, "queries": int, "spans": int, "spans_with_evidence": int,
    "nll_evidence": float, "nll_null": float, "nll_distractor?": float, "nll_random": float,
    "accuracy_evidence": Share, "accuracy_null": Share, "accuracy_distractor?": Share,
    "accuracy_random": Share,
}  # fmt: skip
DEV_EVALUATION = {
    "step": int,
    "questions": int,
    "exact_match": Percentage,
    "f1": Percentage,
    "recall": {"*": Percentage},
    "best": bool,
}
STAGE = {
    "stage": str,
    "seconds": float,
    "started?": str,
    "command?": str,
    "peak_rss_bytes?": Maybe(float),
    "details?": dict,
}
RESULTS = {
    "checkpoint?": object,
    "sets": [
        {
            "name": str,
            "subset": str,
            "questions": int,
            "exact_match?": Maybe(Percentage),
            "f1?": Maybe(Percentage),
            "recall?": RECALL,
            "recall_before?": RECALL,
            "retrieval_utility?": Maybe(float),
        }
    ],
    "notes?": [str],
}
PREDICTION = {
    "id": str,
    "question": str,
    "answers": [str],
    "prediction": Maybe(str),
    "exact_match": Maybe(Score),
    "f1?": Maybe(Score),
    "block_id": int,
    "title?": Maybe(str),
    "score?": Maybe(float),
    "probability?": Maybe(Share),
    "span?": Maybe([int]),
    "reachable?": Maybe(bool),
}
CORPUS = {"num_blocks?": int, "num_documents?": int, "source?": Maybe({"spec?": str})}
MACHINE = {"native?": Maybe(dict), "cpu_levels?": Maybe([str])}
MANIFEST = {
    "format_version?": int,
    "corpus?": str,
    "corpus_hash?": str,
    "tokenizer_hash?": str,
    "machine?": MACHINE,
}


@dataclass(frozen=True)
class RunData:
    """One run as read. None stands for a file that is not there: the stage was not run."""

    path: Path
    manifest: Record
    settings: Record | None
    defaults: Record
    stages: list[Record] | None
    ict_evaluations: list[Record] | None
    warmup_evaluations: list[Record] | None
    metrics: list[Record] | None
    refreshes: list[Record] | None
    evaluations: list[Record] | None
    illustrations: list[Record] | None
    finetune_metrics: list[Record] | None
    dev_evaluations: list[Record] | None
    results: Record | None
    predictions: list[Record] | None
    corpus: Record | None  # the token store's manifest

    @classmethod
    def read(cls, run_folder: str | Path) -> "RunData":
        """Reads and checks every file the report is made of.

        Raises:
            DataError: there is no such run folder.
            CorruptArtifactError: a file is malformed; the message names it and the place in it.
        """
        path = Path(run_folder)
        manifest_path = path / "run.json"
        if not manifest_path.is_file():
            raise DataError(f"{path}: not a run folder (run.json is missing).")
        manifest = _checked_json(manifest_path, "the run's manifest", MANIFEST)
        corpus_path = Path(manifest["corpus"]) / "manifest.json" if manifest.get("corpus") else None
        return cls(
            path=path,
            manifest=manifest,
            settings=_optional_json(path / "config.json", "the run's configuration", dict),
            defaults=Config().to_dict(),
            stages=_optional_lines(path / "stages.jsonl", "the stages", STAGE),
            ict_evaluations=_optional_lines(
                path / "ict" / "evaluations.jsonl", "the evaluations", ICT_EVALUATION
            ),
            warmup_evaluations=_optional_lines(
                path / "warmup" / "evaluations.jsonl", "the evaluations", WARMUP_EVALUATION
            ),
            metrics=_optional_metrics(path / "pretrain" / "metrics.jsonl"),
            refreshes=_optional_refreshes(path / "pretrain" / "refreshes.jsonl"),
            evaluations=_optional_lines(
                path / "pretrain" / "evaluations.jsonl", "the evaluations", EVALUATION
            ),
            illustrations=_illustrations(path / "pretrain" / "illustrations.json"),
            finetune_metrics=_optional_metrics(path / "finetune" / "metrics.jsonl"),
            dev_evaluations=_optional_lines(
                path / "finetune" / "evaluations.jsonl", "the evaluations", DEV_EVALUATION
            ),
            results=_optional_json(path / "evaluate" / "results.json", "the results", RESULTS),
            predictions=_optional_lines(
                path / "evaluate" / "predictions.jsonl", "the predictions", PREDICTION
            ),
            corpus=_optional_json(corpus_path, "the corpus manifest", CORPUS) if corpus_path else None,
        )

    def setting(self, name: str) -> Any:
        """A setting of the run by its dotted name; None where the configuration is missing."""
        return flat(self.settings or {}).get(name)

    def queries_per_step(self) -> int:
        """Masked sentences in an optimizer step; 0 where the configuration is missing."""
        batch, batches = self.setting("pretrain.batch_queries"), self.setting("pretrain.accumulate_batches")
        return batch * batches if isinstance(batch, int) and isinstance(batches, int) else 0

    def evaluation(self, when: str, subset: str) -> Record | None:
        """The last one recorded: a resumed run may have written it twice."""
        found = [e for e in self.evaluations or [] if e["when"] == when and e["subset"] == subset]
        return found[-1] if found else None

    def subsets(self) -> list[str]:
        """Those of the evaluations, all questions first."""
        return sorted({e["subset"] for e in self.evaluations or []}, key=lambda s: (s != "all", s))

    def recall_cutoff(self) -> str | None:
        """The cut-off quoted in the summary: 5, as in the paper's ablation, or the smallest measured."""
        evaluations = (self.evaluation("before", "all"), self.evaluation("after", "all"))
        measured = [set(e["recall"]) for e in evaluations if e and e.get("recall")]
        shared = set.intersection(*measured) if measured else set()
        return "5" if "5" in shared else min(shared, key=cutoff_order, default=None)


def flat(settings: Record) -> Record:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    found: Record = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            found |= {f"{name}.{inner}": v for inner, v in flat(value).items()}
        else:
            found[name] = value
    return found


def cutoff_order(k: str) -> tuple[float, str]:
    """Recall's cut-offs are JSON keys, so text: "5" before "20"."""
    return (float(k) if k.isdecimal() else math.inf, k)


def check(value: Any, schema: Any, file: str, place: str = "") -> None:
    """Compares parsed JSON with a schema and reports the first difference.

    A schema is str, int, float (any number), bool, dict, object (anything), Share, Percentage, Score,
    Maybe(schema), [schema] for a list, or a dictionary: "name" must be there, "name?" may be, "*" stands for
    every name not listed; without it names not listed are let through.

    Raises:
        CorruptArtifactError: "FILE: PLACE: expected …, got …".
    """
    if isinstance(schema, Maybe):
        if value is not None:
            check(value, schema.schema, file, place)
    elif isinstance(schema, list):
        expect(isinstance(value, list), file, place, "a list", value)
        for position, inner in enumerate(value):
            check(inner, schema[0], file, f"{place}[{position}]")
    elif isinstance(schema, dict):
        expect(isinstance(value, dict), file, place, "an object", value)
        for name, inner in schema.items():
            key = name.removesuffix("?")
            if name == "*":
                listed = {other.removesuffix("?") for other in schema}
                for other in value.keys() - listed:
                    check(value[other], inner, file, _inside(place, other))
            elif key in value:
                check(value[key], inner, file, _inside(place, key))
            elif key == name:
                raise CorruptArtifactError(f"{file}: {_inside(place, name)} is missing.")
    elif schema is Score and isinstance(value, bool):
        pass
    elif schema in (float, Share, Percentage, Score):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        top = {Share: 1.0, Percentage: 100.0, Score: 100.0}.get(schema)
        wanted = "a number" if top is None else f"a number between 0 and {top:.0f}"
        expect(is_number and (top is None or -1e-4 <= value <= top + 1e-4), file, place, wanted, value)
    elif schema is not object:
        names = {str: "text", int: "a whole number", bool: "true or false", dict: "an object"}
        right = isinstance(value, schema) and (schema is bool or not isinstance(value, bool))
        expect(right, file, place, names[schema], value)


def expect(right: bool, file: str, place: str, wanted: str, value: Any) -> None:
    """Raises CorruptArtifactError "FILE: PLACE: expected WANTED, got VALUE." unless `right`."""
    if not right:
        shown = json.dumps(value, ensure_ascii=False, default=str)
        shown = shown[:60] + "…" if len(shown) > 60 else shown
        raise CorruptArtifactError(f"{file}: {place}{': ' if place else ''}expected {wanted}, got {shown}.")


def _inside(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def _checked_json(path: Path, what: str, schema: Any) -> Any:
    value = read_json(path, what)
    check(value, schema, str(path))
    return value


def _optional_json(path: Path, what: str, schema: Any) -> Any:
    return _checked_json(path, what, schema) if path.exists() else None


def _optional_lines(path: Path, what: str, schema: Any) -> list[Record] | None:
    if not path.exists():
        return None
    records = read_jsonl(path, what)
    for line, record in enumerate(records, start=1):
        check(record, schema, f"{path}:{line}")
    return records


def _optional_metrics(path: Path) -> list[Record] | None:
    if not path.exists():
        return None
    records = read_metrics(path)
    for line, record in enumerate(records, start=1):
        check(record, METRICS, f"{path}:{line}")
    return records


def _optional_refreshes(path: Path) -> list[Record] | None:
    records = _optional_lines(path, "the refreshes", REFRESH)
    if records is None:
        return None
    known = [(line, r) for line, r in enumerate(records, start=1) if r["event"] in REFRESH_EVENTS]
    for line, record in known:
        check(record, REFRESH_EVENTS[record["event"]], f"{path}:{line}")
    return [record for _, record in known]


def _illustrations(path: Path) -> list[Record] | None:
    if not path.exists():
        return None
    found = _checked_json(path, "the illustrations", [ILLUSTRATION])
    file = str(path)
    for number, illustration in enumerate(found):
        place = f"[{number}]"
        masks, candidates = len(illustration["gold"]), illustration["candidates"]
        expect(masks > 0, file, f"{place}.gold", "at least one token", [])
        expect(bool(candidates), file, f"{place}.candidates", "at least one", [])
        _expect_one_a_mask(illustration, ("marginal", "gold_marginal_p", "null_gold_p"), masks, file, place)
        for slot, candidate in enumerate(candidates):
            inside = f"{place}.candidates[{slot}]"
            _expect_one_a_mask(candidate, ("predictions", "gold_p"), masks, file, inside)
            gradient = candidate["gradient"]
            expect(math.isfinite(gradient), file, f"{inside}.gradient", "a finite number", gradient)
    return found


def _expect_one_a_mask(record: Record, names: tuple[str, ...], masks: int, file: str, place: str) -> None:
    for name in names:
        values = record.get(name)
        if values is not None and len(values) != masks:
            raise CorruptArtifactError(
                f"{file}: {place}.{name}: expected one entry for each of {masks} masked tokens, "
                f"got {len(values)}."
            )
