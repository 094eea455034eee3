"""Pareto plots: what accuracy costs in bytes and in bit operations."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

Row = Mapping[str, Any]
AXES: dict[str, tuple[str, Callable[[Row], float]]] = {
    "bytes": ("bytes of the file", lambda r: r["bytes"]),
    "bops": ("BOPs, pruned weights skipped", lambda r: r["cost"]["sparse_bops"]),
}
MARKERS = "osD^vPX*<>hp"


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (cost, accuracy) that no other one beats in both, by ascending cost."""
    front: list[tuple[float, float]] = []
    for cost, accuracy in sorted(points, key=lambda p: (p[0], -p[1])):
        if not front or accuracy > front[-1][1]:
            front.append((cost, accuracy))
    return front


def pareto_plot(rows: Sequence[Row], axis: str, score: str = "top1_integer") -> Figure:
    """Top-1 (`top1_integer` or `top1_float`) against "bytes" or "bops", one marker per method.

    The float32 baseline is drawn where all rows share it.
    """
    label, cost = AXES[axis]
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    panel = figure.add_subplot()
    for i, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        mine = [row for row in rows if row["method"] == method]
        panel.plot([cost(r) for r in mine], [r[score] for r in mine], MARKERS[i % len(MARKERS)], ms=8, label=method,
                   alpha=0.85)
    front = pareto_front([(cost(r), r[score]) for r in rows])
    panel.plot(*zip(*front, strict=True), color="0.6", lw=1, zorder=0, drawstyle="steps-post", label="Pareto front")
    baselines = {row["baseline_top1"] for row in rows}
    if len(baselines) == 1:
        panel.axhline(baselines.pop(), color="0.3", lw=1, ls="--", label="float32 baseline")
    panel.set(xscale="log", xlabel=f"{label} (log scale)",
              ylabel=f"test top-1, %, {score.removeprefix('top1_')} arithmetic")
    panel.grid(alpha=0.25, which="both")
    panel.legend(fontsize=8)
    return figure


def as_svg(figure: Figure) -> str:
    """The figure as an SVG element with text kept as text; the same bytes every time."""
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "jointcompress"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg"):]
