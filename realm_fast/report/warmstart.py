"""The section of the report about the stages before joint training: before and after, in two tables."""

from realm_fast.report.data import Record, RunData, cutoff_order
from realm_fast.report.markup import Markup, count, join, tag
from realm_fast.report.parts import table


def warm_starts(data: RunData) -> Markup | None:
    """None where neither stage was run."""
    parts = [part for part in (_ict(data.ict_evaluations), _warmup(data.warmup_evaluations)) if part]
    return join(parts) if parts else None


def _ict(evaluations: list[Record] | None) -> Markup | None:
    if not evaluations:
        return None
    last = evaluations[-1]
    cutoffs = sorted(last["recall"], key=cutoff_order)
    rows = [
        [f"{line['when']} (step {line['step']:,})", *(_or_dash(line["recall"].get(k), 1) for k in cutoffs)]
        for line in evaluations
    ]
    note = (
        f"{count(last['sentences'], 'sentence')} of held-out documents: is the block that a sentence was cut "
        f"from, with the sentence gone, among the best of {count(last['blocks'], 'block')}?"
    )
    return join(
        [
            tag("h3", "The retriever: inverse cloze task"),
            table(["recall, in percent", *(f"@{k}" for k in cutoffs)], rows, numeric_from=1),
            tag("p", note, cls="note"),
        ]
    )


def _warmup(evaluations: list[Record] | None) -> Markup | None:
    if not evaluations:
        return None
    names = {
        "evidence": "its evidence",
        "null": "the null block",
        "distractor": "a distractor",
        "random": "a random block",
    }
    rows = [
        [
            f"{line['when']} (step {line['step']:,})",
            *(_or_dash(line.get(f"nll_{name}"), 2) for name in names),
            *(_or_dash(line.get(f"accuracy_{name}"), 1, 100) for name in names),
        ]
        for line in evaluations
    ]
    last = evaluations[-1]
    header = [*(f"nats, {name}" for name in names.values()), *(f"% right, {name}" for name in names.values())]
    note = (
        f"Masked words of {count(last['queries'], 'held-out sentence')}, by what the reader reads beside "
        f"them. {last['spans_with_evidence']:,} of {count(last['spans'], 'salient span')} stand in another "
        "block too."
    )
    return join(
        [
            tag("h3", "The reader: warm-up on evidence"),
            table(["", *header], rows, numeric_from=1),
            tag("p", note, cls="note"),
        ]
    )


def _or_dash(value: float | None, digits: int, factor: float = 1) -> str:
    return "–" if value is None else f"{factor * value:.{digits}f}"
