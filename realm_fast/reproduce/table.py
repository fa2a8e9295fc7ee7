"""Means, spreads, and differences from a reference with their confidence; as Markdown and as a plot."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from realm_fast.errors import MissingDependencyError
from realm_fast.files import atomic_file

# The 97.5% quantile of Student's t for 1, 2, ... degrees of freedom; the last serves for more: the safe side.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)

OFF_SCALE = 6  # see _shown_range

PAIRED = (
    "Mean difference over the seeds ± half of its 95% confidence interval (Student's t of the differences). "
    "Bold where the interval leaves out 0; where nothing differs, one cell in twenty is bold by chance. The "
    "interval is that of training: all runs are measured on the same sentences and questions, and which those"
    " are is not in it."
)


def summarise(results: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds that were finished; the diverged ones by name.

    The standard deviation is that of a sample (n - 1); None with fewer than two seeds.
    """
    done = [result for result in results if result["status"] == "done"]
    metrics = {}
    for name in names:
        by_seed = {r["seed"]: r["measured"][name] for r in done if r["measured"].get(name) is not None}
        values = list(by_seed.values())
        metrics[name] = {
            "mean": statistics.fmean(values) if values else None,
            "std": statistics.stdev(values) if len(values) > 1 else None,
            "by_seed": by_seed,
        }
    return {
        "seeds": [result["seed"] for result in done],
        "diverged": [
            {"seed": result["seed"], "error": result["error"]}
            for result in results
            if result["status"] == "diverged"
        ],
        "metrics": metrics,
        "seconds": statistics.fmean([r["seconds"] for r in done]) if done else None,
        "peak_rss_bytes": max((r["peak_rss_bytes"] for r in done), default=None),
    }


def paired_difference(
    arm: Mapping[str, Any], reference: Mapping[str, Any], name: str
) -> dict[str, float | int | None]:
    """How far an arm is from the reference in one metric, seed by seed.

        mean(d) ± t(n - 1) std(d) / sqrt(n),    d_s = arm_s - reference_s

    the 95% confidence interval of Student's t. A seed decides what is drawn and in which order, and what that
    does to both cancels in d; arms that mask or retrieve in another way share less of it.

    Args:
        arm, reference: of `summarise`.

    Returns:
        {"mean", "half_width", "seeds"}: seeds that both finished; None for what they are too few for (one
        for the mean, two for the interval).
    """
    ours, theirs = (side["metrics"][name]["by_seed"] for side in (arm, reference))
    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    count = len(differences)
    half_width = None
    if count > 1:
        quantile = T_975[min(count - 1, len(T_975)) - 1]
        half_width = quantile * statistics.stdev(differences) / math.sqrt(count)
    return {
        "mean": statistics.fmean(differences) if differences else None,
        "half_width": half_width,
        "seeds": count,
    }


def with_interval(difference: Mapping[str, Any], *, scale: float = 1, digits: int = 1) -> str:
    """ "+1.2 ± 0.4", bold where the interval leaves out 0; "+1.2" without an interval, "–" without both."""
    mean, half_width = difference["mean"], difference["half_width"]
    if mean is None or math.isnan(mean):
        return "–"
    text = f"{scale * mean:+.{digits}f}"
    if half_width is None:
        return text
    text += f" ± {scale * half_width:.{digits}f}"
    return f"**{text}**" if abs(mean) > half_width else text


def with_spread(metric: Mapping[str, Any], *, scale: float = 1, digits: int = 1) -> str:
    """ "12.3 ± 0.4"; without the second part for a single seed, "–" where nothing was measured."""
    if metric["mean"] is None or math.isnan(metric["mean"]):
        return "–"
    text = f"{scale * metric['mean']:.{digits}f}"
    return text if metric["std"] is None else f"{text} ± {scale * metric['std']:.{digits}f}"


def number(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; every cell but the first of a row is a figure."""
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def seeds_cell(summary: Mapping[str, Any]) -> str:
    """How many seeds, and which diverged."""
    count = str(len(summary["seeds"]))
    diverged = ", ".join(str(d["seed"]) for d in summary["diverged"])
    return f"{count} (diverged: seed {diverged})" if diverged else count


def stage_rows(stages: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Rows of the table of what each stage took."""
    return [
        [s["stage"], f"{s['seconds']:,.0f}", f"{s['peak_rss_bytes'] / 1e6:,.0f}"]
        for s in stages
        if s["seconds"] is not None
    ]


def write_text(path: Path, text: str) -> None:
    with atomic_file(path, "w") as file:
        file.write(text)


def import_pyplot() -> Any:
    """matplotlib's pyplot, drawing into files; named by its extra where it is missing."""
    try:
        import matplotlib
    except ImportError as error:
        raise MissingDependencyError("the plot needs matplotlib: pip install 'realm_fast[bench]'") from error
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def _shown_range(means: Sequence[float]) -> tuple[float, float]:
    """The median ± OFF_SCALE times the way to the farther quartile; everything, where that says nothing."""
    if len(means) < 4:
        return -math.inf, math.inf
    lower, middle, upper = statistics.quantiles(means, n=4, method="inclusive")
    reach = OFF_SCALE * max(middle - lower, upper - middle)
    return (middle - reach, middle + reach) if reach > 0 else (-math.inf, math.inf)


def plot(
    path: Path,
    titles: Sequence[str],
    panels: Sequence[tuple[str, Sequence[Mapping[str, Any]], float]],
) -> None:
    """Draws one panel for each metric, one row for each arm, bars of one standard deviation; the first arm's
    mean is carried down as a line. An arm far from all others stands at the edge, with its value: to scale it
    would leave the others one spot.

    Args:
        titles: of the arms.
        panels: (name of the metric with its unit, its summaries in the arms' order, factor).
    """
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(1 + 4 * len(panels), 1.2 + 0.4 * len(titles)), sharey=True, squeeze=False
    )
    for axis, (name, metrics, scale) in zip(axes[0], panels, strict=True):
        means = [None if m["mean"] is None or math.isnan(m["mean"]) else scale * m["mean"] for m in metrics]
        low, high = _shown_range([mean for mean in means if mean is not None])
        for row, (metric, mean) in enumerate(zip(metrics, means, strict=True)):
            color = "tab:blue" if row else "black"
            if mean is not None and not low <= mean <= high:
                left = mean < low
                axis.annotate(
                    f"← {mean:.3g}" if left else f"{mean:.3g} →",
                    (0.01 if left else 0.99, row), xycoords=("axes fraction", "data"),
                    ha="left" if left else "right", va="center", color=color,
                )  # fmt: skip
                continue
            if mean is not None:
                spread = scale * (metric["std"] or 0)
                axis.errorbar(mean, row, xerr=spread, fmt="o", capsize=3, color=color)
            values = [scale * value for value in metric["by_seed"].values()]
            axis.plot(values, [row] * len(values), "|", color="gray")
        if means and means[0] is not None and low <= means[0] <= high:
            axis.axvline(means[0], color="black", linewidth=0.6, linestyle=":")
        axis.set_xlabel(name)
    axes[0][0].set_yticks(range(len(titles)), titles)
    axes[0][0].set_ylim(-0.6, len(titles) - 0.4)
    axes[0][0].invert_yaxis()
    figure.tight_layout()
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)
