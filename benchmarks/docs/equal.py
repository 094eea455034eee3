"""Rows at equal bytes: a line for each way of compressing, a column for each size that several methods reach.

What decides between methods: the points that each loses at one size of the file, with their intervals, as a table and
as a picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..report.seeds import paired_interval, seeds_of
from ..report.table import in_markdown
from .figures import bottom_of, series
from .words import DATA, Row, look, points, points_lost, times

ALIKE = 0.9  # of the largest file: sizes that count as one
SEVERAL = 3  # methods that a size needs to be a column
OTHERS = "another size"


@dataclass(frozen=True)
class Ways:
    """columns  headers of sizes;  lines  (name, rows in each column, rows of other sizes), the least lost first"""

    columns: list[str]
    lines: list[tuple[str, list[list[Row]], list[Row]]]


def blocks(rows: Sequence[Row]) -> list[list[Row]]:
    """`rows` by size, the largest first: those within a tenth of the largest of a block, in it the least lost first."""
    found: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: -row["bytes"]):
        if not found or row["bytes"] < ALIKE * found[-1][0]["bytes"]:
            found.append([])
        found[-1].append(row)
    return [sorted(block, key=points_lost) for block in found]


def smaller(row: Row) -> float:
    return row["float32_bytes"] / row["bytes"]


def ways(rows: Sequence[Row]) -> Ways:
    """`rows`, which start from one baseline, by what their names say besides the size."""
    columns = [block for block in blocks(rows) if len({row["method"] for row in block}) >= SEVERAL]
    names = list(dict.fromkeys(series(row) or row["name"] for row in rows))
    lines = []
    for name in names:
        own = [row for row in rows if (series(row) or row["name"]) == name]
        cells = [[row for row in column if row in own] for column in columns]
        lines.append((name, cells, [row for row in own if not any(row in column for column in columns)]))
    main = max(range(len(columns)), key=lambda i: len(columns[i]), default=None)

    def order(line: tuple[str, list[list[Row]], list[Row]]) -> tuple[bool, float]:
        there = [] if main is None else line[1][main]
        return not there, min(map(points_lost, there or sum(line[1], line[2])))

    return Ways([head_of(column) for column in columns], sorted(lines, key=order))


def head_of(column: Sequence[Row]) -> str:
    """The size that its rows were asked for, mostly, or that they have where none was."""
    asked = [1 / row["budget"]["size_ratio"] for row in column if row["budget"].get("size_ratio") is not None]
    return f"{round(median(asked))}x" if asked else times(median(map(smaller, column)))


def limits(row: Row) -> tuple[float, float] | None:
    """The 95 % interval of the points that a row lost; None where it was not paired."""
    found = paired_interval(row)
    return None if found is None else (-found[1], -found[0])


def ways_table(rows: Sequence[Row]) -> str:
    """A GitHub table of `ways`: points lost and their 95 % interval, the least of a column in bold."""
    found = ways(rows)
    best = [min((points_lost(row) for _, cells, _ in found.lines for row in cells[i]), default=0.0)
            for i in range(len(found.columns))]
    others = any(rest for _, _, rest in found.lines)
    heads = ["points of top-1 lost", *(f"{column} smaller" for column in found.columns), *[OTHERS] * others, "data"]
    out = "| " + " | ".join(heads) + " |\n|" + " --- |" * len(heads) + "\n"
    for name, cells, rest in found.lines:
        texts = [", ".join(_lost(row, points_lost(row) == least) for row in cell) or "—"
                 for cell, least in zip(cells, best, strict=True)]
        if others:
            texts.append(", ".join(f"{_lost(row)} at {times(smaller(row))}" for row in rest) or "—")
        data = dict.fromkeys(DATA.get(row["difficulty"]["data"], row["difficulty"]["data"]) for row in sum(cells, rest))
        out += "| " + " | ".join([in_markdown(name), *texts, ", ".join(data)]) + " |\n"
    return out


def _lost(row: Row, best: bool = False) -> str:
    text, between = points(points_lost(row)), limits(row)
    text = f"**{text}**" if best else text
    seeds = f", {seeds_of(row)}" if seeds_of(row) else ""
    return text + seeds if between is None else f"{text} ({points(between[0])} to {points(between[1])}{seeds})"


def ways_plot(rows: Sequence[Row]) -> Figure:
    """`ways` as a picture: a panel for each size, points lost to the right, with their 95 % intervals; points far off
    are numbers at the edge, those of other sizes have their own panel and say theirs."""
    found, edge = ways(rows), bottom_of(rows)
    heads = [f"{column} smaller" for column in found.columns]
    if any(rest for _, _, rest in found.lines):
        heads.append(OTHERS)
    figure = Figure(figsize=(10.0, 1.3 + 0.21 * len(found.lines)), layout="constrained")
    panels = figure.subplots(1, len(heads), sharex=True, sharey=True, squeeze=False)[0]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for y, (_, cells, rest) in enumerate(found.lines):
        for panel, cell in zip(panels, [*cells, rest], strict=False):
            for row in cell:
                size = times(smaller(row)) if cell is rest else ""
                _mark(panel, row, y, edge, look(row["method"], methods), size)
    for panel, head in zip(panels, heads, strict=True):
        panel.set_title(head, fontsize=9)
        panel.axvline(0, color="0.4", lw=1, ls="--")
        panel.grid(axis="x", alpha=0.25)
        panel.tick_params(labelsize=8)
    least = min([0.0, *(limits(row)[0] if limits(row) else points_lost(row) for row in rows)])
    panels[0].set(xlim=(least - 0.1, edge + 0.4), ylim=(len(found.lines) - 0.5, -0.5))
    panels[0].set_yticks(range(len(found.lines)), [name for name, _, _ in found.lines])
    figure.supxlabel("points of top-1 lost in integer arithmetic, 95 % interval", fontsize=9)
    return figure


def _mark(panel: Axes, row: Row, y: float, edge: float, shape: tuple[str, str], size: str) -> None:
    """A row, with its size and its seeds, if there are several, in words."""
    lost, between, (colour, marker) = points_lost(row), limits(row), shape
    if lost > edge:
        text = ", ".join(filter(None, (f"{lost:.1f} at {size}" if size else f"{lost:.1f}", seeds_of(row))))
        panel.annotate(f"{text} →", (edge + 0.4, y), xytext=(-3, 0), textcoords="offset points", fontsize=7,
                       ha="right", va="center", color=colour)
        return
    if between is not None:
        panel.plot(between, (y, y), color=colour, lw=1.2, solid_capstyle="butt")
    panel.plot([lost], [y], color=colour, marker=marker, ms=5, ls="none")
    text = ", ".join(filter(None, (size, seeds_of(row))))
    if text:
        end = lost if between is None else max(between[1], lost)
        panel.annotate(text, (end, y), xytext=(5, 0), textcoords="offset points", fontsize=7, va="center")
