"""Plots of rows: points lost against bytes, bit operations or energy, and where the bytes of a file go."""

import io
import re
from collections.abc import Callable, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from ..chance import Z95
from ..report.seeds import paired_interval, seeds_of
from .words import Row, count, look, method_name, points_lost, size

AXES: dict[str, tuple[str, Callable[[Row], float], Callable[[float], str]]] = {  # label, cost of a row, of a tick
    "bytes": ("size of the file", lambda r: r["bytes"], size),
    "bops": ("bit operations, pruned weights skipped", lambda r: r["cost"]["sparse_bops"], count),
    "energy": ("energy, share of float32", lambda r: r["hardware"]["energy_ratio_skipping"], lambda v: f"{v:.3g}"),
}
SIZE = re.compile(r"(, |^)[\d.]+ ?(x|KB|MB|% of the size)\b")  # in the name of a row
LINES = ("-", "--", ":", "-.")
PARTS = {"codes": "#0072B2", "positions": "#E69F00", "codebooks": "#009E73", "rest": "#CC79A7",
         "activations": "#56B4E9", "header": "#999999"}


def interval(row: Row) -> float:
    """Half of the 95 % interval of points lost, from the size of the test set; of the paired change where it is."""
    paired = paired_interval(row)
    if paired is not None:
        return (paired[1] - paired[0]) / 2
    share = row["top1_integer"] / 100
    return 100 * Z95 * (share * (1 - share) / row.get("n_test", 10_000)) ** 0.5


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (cost, accuracy) that no other one beats in both, by ascending cost."""
    front: list[tuple[float, float]] = []
    for cost, accuracy in sorted(points, key=lambda p: (p[0], -p[1])):
        if not front or accuracy > front[-1][1]:
            front.append((cost, accuracy))
    return front


def has_axis(rows: Sequence[Row], axis: str) -> bool:
    return axis != "energy" or all("energy_ratio_skipping" in row.get("hardware", {}) for row in rows)


def series(row: Row) -> str:
    """What a row's name says besides its size: one line joins rows that differ in size alone. "" where it says none.

    >>> series({"name": "prune then quantize, low rate, 20x"}), series({"name": "4 bits: GPTQ"})
    ('prune then quantize, low rate', '')
    """
    return SIZE.sub("", row["name"]) if SIZE.search(row["name"]) else ""


def front_plot(rows: Sequence[Row], axis: str, *, wide: bool = False) -> Figure:
    """Points lost (upwards is better) against a cost on a logarithmic axis: a curve for each `series` of a method,
    names on the points, 95 % intervals, and the front that no row beats in both. Points far below the others are
    arrows at the lower edge. `rows` start from one baseline."""
    label, cost, tick = AXES[axis]
    figure = Figure(figsize=(9.0, 5.0) if wide else (6.4, 4.8), layout="constrained")
    panel = figure.add_subplot()
    methods = list(dict.fromkeys(row["method"] for row in rows))
    bottom = bottom_of(rows)
    shown = {row["method"] for row in rows if points_lost(row) <= bottom}
    for method in methods:
        colour, marker = look(method, methods)
        own = [row for row in rows if row["method"] == method]
        for i, kind in enumerate(dict.fromkeys(map(series, own))):
            mine = sorted((row for row in own if series(row) == kind), key=cost)
            panel.errorbar([cost(r) for r in mine], [points_lost(r) for r in mine], [interval(r) for r in mine],
                           color=colour, marker=marker, ms=6, lw=0.8, elinewidth=0.8, alpha=0.9,
                           ls=LINES[i % len(LINES)] if kind or len(mine) < 6 else "none",
                           label=method_name(method) if i == 0 and method in shown else "_nolegend_")
    front = pareto_front([(cost(r), -points_lost(r)) for r in rows])
    panel.plot([x for x, _ in front], [-y for _, y in front], color="0.6", lw=4, alpha=0.35, zorder=0,
               drawstyle="steps-post", label="front: no smaller one loses less")
    panel.axhline(0, color="0.4", lw=1, ls="--")
    panel.set(xscale="log", xlabel=f"{label} (log)", ylabel="points of top-1 lost, integer arithmetic")
    best = min(*map(points_lost, rows), 0)
    panel.set_ylim(bottom + 0.08 * (bottom - best) + 0.1, best - 0.25)
    panel.grid(alpha=0.25)
    _ticks(panel, tick)
    names = [r["name"] if len(methods) == 1 else series(r) or method_name(r["method"]) for r in rows]
    names = [", ".join(filter(None, (name, seeds_of(r)))) for name, r in zip(names, rows, strict=True)]
    named = [(cost(r), points_lost(r), name) for r, name in zip(rows, names, strict=True)]
    figure.draw_without_rendering()
    _name_points(panel, [one for one in named if one[1] <= bottom])
    _point_below(panel, [one for one in named if one[1] > bottom])
    if len(methods) > 1:
        figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def bottom_of(rows: Sequence[Row]) -> float:
    """The most lost points that a plot shows in their place: a far outlier does not squeeze the others."""
    lost = sorted(points_lost(r) for r in rows)
    middle = lost[len(lost) // 2]
    return max(min(lost[-1], max(4 * middle, lost[0] + 4.0)), lost[0] + 0.5)


def _point_below(panel: Axes, named: list[tuple[float, float, str]]) -> None:
    """An arrow at the lower edge for each point below it, with its name and what it lost; one above another where
    they meet."""
    edge, taken, box = panel.get_ylim()[0], [], panel.get_window_extent()
    for x, y, name in sorted(named):
        text, middle = f"{name}: {y:.1f}", panel.transData.transform((x, edge))[0]
        half = 2.5 * len(text) + 4
        left = min(max(middle - half, box.x0 + 2), box.x1 - 2 - 2 * half)  # inside the frame
        level = sum(left < end and start < left + 2 * half for start, end in taken)
        panel.annotate(text, (x, edge), xytext=(0.72 * (left - middle), 12 + 10 * level), textcoords="offset points",
                       fontsize=7, arrowprops={"arrowstyle": "->", "lw": 0.8, "color": "0.4", "relpos": (
                           (middle - left) / (2 * half), 0)}, annotation_clip=False)
        taken.append((left, left + 2 * half))


def _ticks(panel: Axes, tick: Callable[[float], str]) -> None:
    low, high = panel.get_xlim()
    subs = (1, 1.5, 2, 3, 4, 5, 6, 8) if high < 8 * low else (1, 2, 5) if high < 300 * low else (1,)
    panel.xaxis.set_major_locator(LogLocator(subs=subs, numticks=20))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_minor_formatter(NullFormatter())


def _name_points(panel: Axes, named: list[tuple[float, float, str]]) -> None:
    """A name at each point, at the first of eight places around it where it covers nothing; else none."""
    transform, taken, box = panel.transData, [], panel.get_window_extent()
    dots = [transform.transform((x, y)) for x, y, _ in named]
    for (x, y, name), (left, bottom) in zip(named, dots, strict=True):
        width, height = 5.0 * len(name) + 2, 10.0
        for dx, dy in ((6, 3), (6, -11), (-6 - width, 3), (-6 - width, -11), (-width / 2, 8), (-width / 2, -17),
                       (6, 12), (-6 - width, 12)):
            spot = (left + dx, bottom + dy, left + dx + width, bottom + dy + height)
            inside = box.x0 < spot[0] and spot[2] < box.x1 and box.y0 < spot[1] and spot[3] < box.y1
            free = not any(_meet(spot, other) for other in taken)
            clear = not any(spot[0] - 3 < px < spot[2] + 3 and spot[1] - 3 < py < spot[3] + 3 for px, py in dots)
            if inside and free and clear:
                panel.annotate(name, (x, y), xytext=(dx * 0.72, dy * 0.72), textcoords="offset points", fontsize=7)
                taken.append(spot)
                break


def _meet(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def bytes_plot(rows: Sequence[Row]) -> Figure:
    """Stacked bars: what the bytes of each file are for."""
    figure = Figure(figsize=(7.2, 0.9 + 0.28 * len(rows)), layout="constrained")
    panel = figure.add_subplot()
    for i, row in enumerate(rows):
        start = 0
        for part, colour in PARTS.items():
            length = row["bytes_split"].get(part, 0)
            panel.barh(i, length, left=start, color=colour, label=part if i == 0 else None)
            start += length
    panel.set_yticks(range(len(rows)), [row["name"][:48] for row in rows], fontsize=7)
    panel.invert_yaxis()
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value)))
    panel.set_xlabel("bytes of the file")
    figure.legend(loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    return figure


def as_svg(figure: Figure, alt: str) -> str:
    """The figure as an SVG element with text kept as text and a text alternative; the same bytes every time."""
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "jointcompress"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    words = alt.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return text[text.index("<svg"):].replace("<svg ", f'<svg role="img" aria-label="{words}" ', 1)


def as_png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150)
    return out.getvalue()
