"""Pareto plots: what accuracy costs in bytes and in bit operations."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from .table import comparable, short_bytes, short_count

Row = Mapping[str, Any]
AXES: dict[str, tuple[str, Callable[[Row], float], Callable[[float], str]]] = {  # label, cost of a row, of a tick
    "bytes": ("size of the file", lambda r: r["bytes"], short_bytes),
    "bops": ("BOPs, pruned weights skipped", lambda r: r["cost"]["sparse_bops"], short_count),
}
MARKERS = "osD^vPX*<>hp"
COLOURS = ("0.4", "tab:brown", "tab:cyan", "tab:olive")  # of the groups that can be compared


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (cost, accuracy) that no other one beats in both, by ascending cost."""
    front: list[tuple[float, float]] = []
    for cost, accuracy in sorted(points, key=lambda p: (p[0], -p[1])):
        if not front or accuracy > front[-1][1]:
            front.append((cost, accuracy))
    return front


def pareto_plot(rows: Sequence[Row], axis: str, score: str = "top1_integer") -> Figure:
    """Top-1 (`top1_integer` or `top1_float`) against "bytes" or "bops", one marker per method.

    Rows that start from one checkpoint have a front of their own and the line of their float32 baseline.
    """
    label, cost, tick = AXES[axis]
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    panel = figure.add_subplot()
    for i, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        mine = [row for row in rows if row["method"] == method]
        panel.plot([cost(r) for r in mine], [r[score] for r in mine], MARKERS[i % len(MARKERS)], ms=8, label=method,
                   alpha=0.85)
    groups = comparable(rows)
    for i, group in enumerate(groups):
        top, network = group[0]["baseline_top1"], group[0]["network"]
        of = f", {network} of {top:.2f} %" if len(groups) > 1 else ""
        front = pareto_front([(cost(r), r[score]) for r in group])
        front.append((max(cost(r) for r in group), front[-1][1]))  # more of it buys nothing
        panel.plot(*zip(*front, strict=True), color=COLOURS[i % len(COLOURS)], lw=1, zorder=0, drawstyle="steps-post",
                   label=f"Pareto front{of}")
        panel.axhline(top, color=COLOURS[i % len(COLOURS)], lw=1, ls="--", label=f"float32 baseline{of}")
    panel.set(xscale="log", xlabel=f"{label} (log scale)",
              ylabel=f"test top-1, %, {score.removeprefix('top1_')} arithmetic")
    low, high = panel.get_xlim()
    steps = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if high < 6 * low else (1, 2, 5) if high < 200 * low else (1,)
    panel.xaxis.set_major_locator(LogLocator(subs=steps, numticks=20))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=3 if len(groups) == 1 else 2, fontsize=8, frameon=False)
    return figure


def as_png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150)
    return out.getvalue()


def as_svg(figure: Figure) -> str:
    """The figure as an SVG element with text kept as text; the same bytes every time."""
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "jointcompress"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg"):]
