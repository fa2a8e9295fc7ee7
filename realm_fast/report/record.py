"""Sections of the report for the record: time and memory, configuration, provenance."""

from collections.abc import Sequence
from typing import Any

from realm_fast.report.charts import Bar, bar_chart, line_chart
from realm_fast.report.data import Record, RunData, flat
from realm_fast.report.markup import Markup, byte_size, count, join, number, seconds, tag
from realm_fast.report.parts import missing, series, table


def cost(data: RunData) -> Markup:
    parts: list[Any] = []
    if data.stages is None:
        parts.append(missing("stages.jsonl", "Every stage adds a line when it ends."))
    else:
        times: dict[str, list[Record]] = {}
        for stage in data.stages:
            times.setdefault(stage["stage"], []).append(stage)
        total = sum(stage["seconds"] for stage in data.stages)
        time_bars, memory_bars = [], []
        for name, runs in times.items():
            spent = sum(run["seconds"] for run in runs)
            again = f"in {len(runs)} runs" if len(runs) > 1 else None
            time_bars.append(Bar(name, spent, seconds(spent), again))
            peaks = [run["peak_rss_bytes"] for run in runs if run.get("peak_rss_bytes") is not None]
            peak = max(peaks, default=None)
            memory_bars.append(Bar(name, peak, byte_size(peak)))
        parts.append(
            tag(
                "div",
                bar_chart(time_bars, title="Time", unit=f"wall clock; {seconds(total)} in all", color=1),
                bar_chart(
                    memory_bars, title="Peak memory", unit="resident, largest process of the stage", color=3
                ),
                cls="charts",
            )
        )
    if data.metrics:
        parts.append(_throughput(data.metrics))
    return join(parts)


def _throughput(metrics: Sequence[Record]) -> Markup:
    rows = [
        [label, *_spread(metrics, name)]
        for label, name in (
            ("masked sentences trained on, per second", "queries_per_s"),
            ("blocks embedded by the refresher, per second", "refresh_blocks_per_s"),
            ("seconds in an optimizer step", "step_s"),
        )
        if any(record.get(name) is not None for record in metrics)
    ]
    waited, trained = _time_in(metrics, "trainer_wait_s"), _time_in(metrics, "step_s")
    return join(
        [
            tag("h3", "Throughput of pre-training"),
            tag(
                "div",
                line_chart(
                    [series(metrics, "queries_per_s", "trainer", 1)],
                    title="Trainer",
                    unit="masked sentences per second",
                    from_zero=True,
                ),
                line_chart(
                    [series(metrics, "refresh_blocks_per_s", "refresher", 3)],
                    title="Refresher",
                    unit="blocks embedded per second",
                    from_zero=True,
                ),
                cls="charts",
            ),
            table(["", "median", "20th percentile", "80th percentile"], rows, numeric_from=1)
            if rows
            else None,
            tag("p", _waiting_words(waited, trained), cls="note") if waited is not None else None,
        ]
    )


def configuration(data: RunData) -> Markup:
    if data.settings is None:
        return missing("config.json", "Every command that trains writes it.")
    now, defaults = flat(data.settings), flat(data.defaults)
    changed = [
        [
            tag("code", name),
            tag("code", _json(value)),
            tag("code", _json(defaults[name]) if name in defaults else "–"),
        ]
        for name, value in now.items()
        if name not in defaults or value != defaults[name]
    ]
    same = [
        [tag("code", name), tag("code", _json(value))]
        for name, value in now.items()
        if defaults.get(name, now) == value
    ]
    return tag(
        "details",
        tag(
            "summary",
            f"{count(len(changed), 'setting')} changed from the defaults, {len(same)} left as they are",
        ),
        table(["changed setting", "this run", "default"], changed) if changed else tag("p", "All defaults."),
        table(["default setting", "value"], same) if same else None,
    )


def provenance(data: RunData) -> Markup:
    manifest = data.manifest
    machine = manifest.get("machine") or {}
    native = machine.get("native") or {}
    corpus = data.corpus or {}
    facts: list[tuple[str, Any]] = [
        ("run folder", tag("code", str(data.path))),
        ("created", manifest.get("created")),
        ("corpus", tag("code", manifest["corpus"]) if manifest.get("corpus") else None),
        ("made from", (corpus.get("source") or {}).get("spec")),
        ("blocks, documents", _counts(corpus)),
        ("corpus hash", _hash(manifest.get("corpus_hash"))),
        ("tokenizer hash", _hash(manifest.get("tokenizer_hash"))),
        ("evaluated checkpoint", _checkpoint(data)),
        ("realm_fast", manifest.get("realm_fast")),
        (
            "torch, Python",
            ", ".join(str(v) for v in (machine.get("torch"), machine.get("python")) if v) or None,
        ),
        ("processor", machine.get("cpu")),
        ("cores", machine.get("cores")),
        ("instruction sets", ", ".join(map(str, machine.get("cpu_levels") or [])) or None),
        ("CUDA kernels in the build", {"True": "yes", "False": "no"}.get(str(native.get("cuda")))),
        ("compiler", native.get("compiler")),
        ("system", machine.get("platform")),
    ]
    rows = [[name, value] for name, value in facts if value not in (None, "")]
    commands = [
        [stage["stage"], stage.get("started", ""), tag("code", stage.get("command", ""))]
        for stage in data.stages or []
    ]
    return join(
        [
            table(["", ""], rows, cls="facts"),
            tag("details", tag("summary", "Commands"), table(["stage", "started", "command"], commands))
            if commands
            else None,
        ]
    )


def _time_in(metrics: Sequence[Record], name: str) -> float | None:
    """Seconds in all, from a record's mean over the steps since the record before it."""
    total, found, last_step = 0.0, False, 0
    for record in metrics:
        if record.get(name) is not None:
            total, found = total + record[name] * (record["step"] - last_step), True
        last_step = record["step"]
    return total if found else None


def _waiting_words(waited: float, trained: float | None) -> str:
    share = f" of {seconds(trained)} of training" if trained else ""
    return f"The trainer waited {seconds(waited)} for an index{share}."


def _spread(metrics: Sequence[Record], name: str) -> list[str]:
    values = sorted(record[name] for record in metrics if record.get(name) is not None)
    return [number(values[min(len(values) - 1, int(q * len(values)))]) for q in (0.5, 0.2, 0.8)]


def _json(value: Any) -> str:
    return (
        value
        if isinstance(value, str)
        else {True: "true", False: "false"}.get(value, str(value))
        if isinstance(value, bool)
        else str(value)
    )


def _counts(corpus: Record) -> str | None:
    values = [corpus.get("num_blocks"), corpus.get("num_documents")]
    return ", ".join(f"{v:,}" for v in values if isinstance(v, int)) or None


def _hash(value: str | None) -> Markup | None:
    return tag("code", value[:16], title=value) if value else None


def _checkpoint(data: RunData) -> Markup | None:
    checkpoint = (data.results or {}).get("checkpoint")
    return tag("code", str(checkpoint)) if checkpoint else None
