"""Plots of what a method noted while it ran: searches, penalties, codebooks, gates. One drawing for each method."""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Row = Mapping[str, Any]
COLUMNS, SIDE = 4, 2.6  # panels side by side, their size in inches
LINE = 0.16  # inches of a line of the legend


def course_plot(row: Row) -> Figure | None:
    """The course of one row; None where its method notes none, or has noted nothing."""
    panels = COURSES[row["method"]](row["notes"]) if row["method"] in COURSES else []
    return _grid(panels) if panels else None


def search_plot(rows: Sequence[Row]) -> Figure | None:
    """Best objective so far against evaluations, a panel for each layer, a line for each of `rows` that searched."""
    found = [row for row in rows if row["method"] == "clip_q" and row["notes"].get("trace")]
    layers = list(dict.fromkeys(layer for row in found for layer in row["notes"]["trace"]))

    def panel(layer: str) -> tuple[str, Callable[[Axes], None]]:
        def draw(axes: Axes) -> None:
            for row in found:
                values = [seen["objective"] for seen in row["notes"]["trace"].get(layer, [])]
                axes.plot(range(1, len(values) + 1), list(accumulate(values, min)), label=row["name"], lw=1.3)
            axes.set(xlabel="evaluations")
        return layer, draw
    return _grid([panel(layer) for layer in layers], "lowest error - lambda x share of bits saved") if found else None


Panels = list[tuple[str, Callable[[Axes], None]]]  # (title, draw)


def _clip_q(notes: Mapping[str, Any]) -> Panels:
    """Where the search looked: (p, bits) of every evaluation, darker is better; the star is what it took."""
    def panel(layer: str, seen: list[dict]) -> tuple[str, Callable[[Axes], None]]:
        def draw(axes: Axes) -> None:
            best = min(seen, key=lambda one: one["objective"])
            axes.scatter([one["p"] for one in seen], [one["bits"] for one in seen], s=16, cmap="viridis",
                         c=[one["objective"] for one in seen])
            axes.plot(best["p"], best["bits"], "*", ms=12, color="tab:red")
            axes.set(xlabel="p, share clipped", ylabel="bits", xlim=(-0.03, 1.03))
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        return layer, draw
    return [panel(layer, seen) for layer, seen in notes.get("trace", {}).items()]


def _admm(notes: Mapping[str, Any]) -> Panels:
    """|W - Z| / |W| after every W-step."""
    def panel(stage: str, residuals: Mapping[str, list[float]]) -> tuple[str, Callable[[Axes], None]]:
        def draw(axes: Axes) -> None:
            for layer, values in residuals.items():
                axes.plot(range(1, len(values) + 1), values, label=layer, lw=1.2, marker="o", ms=2.5)
            axes.set(xlabel="ADMM iterations", ylabel="|W - Z| / |W|", ylim=(0, None))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return stage, draw
    return [panel(stage, found) for stage, found in notes.get("residuals", {}).items() if any(found.values())]


def _annc(notes: Mapping[str, Any]) -> Panels:
    """Of every epoch: the gap between W and its quantized copy, widths, and kept weights."""
    epochs = [seen for stage in notes.get("trace", []) for seen in stage]
    names = list(notes.get("kept", {}))

    def lines(key: str, axes: Axes) -> None:
        for i, name in enumerate(names):
            axes.plot(range(1, len(epochs) + 1), [seen[key][i] for seen in epochs], label=name, lw=1.2)
        axes.set(xlabel="epochs", ylabel=key)

    def gap(axes: Axes) -> None:
        axes.plot(range(1, len(epochs) + 1), [seen["gap"] for seen in epochs], color="0.3", lw=1.2)
        axes.set(xlabel="epochs", ylabel="|W - V| / |W|", ylim=(0, None))

    def kept(axes: Axes) -> None:
        lines("kept", axes)
        axes.set(yscale="symlog")
    return [("gap", gap), ("bits", lambda axes: lines("bits", axes)), ("kept weights", kept)] if epochs else []


def _bayesian_bits(notes: Mapping[str, Any]) -> Panels:
    """Relative BOPs of the thresholded gates after every epoch."""
    values = notes.get("bops_percent", [])

    def draw(axes: Axes) -> None:
        axes.plot(range(1, len(values) + 1), values, color="0.3", lw=1.2)
        axes.set(xlabel="epochs", ylabel="% of the 32-bit BOPs", yscale="log")
    return [("bit operations", draw)] if values else []


def _width_search(notes: Mapping[str, Any]) -> Panels:
    """Least error so far of what keeps the budget; and all evaluations, what they cost against their error."""
    seen = notes.get("trace", {})
    errors, fits = seen.get("errors", []), seen.get("fits", [])

    def best(axes: Axes) -> None:
        kept = [error if fit else float("inf") for error, fit in zip(errors, fits, strict=True)]
        axes.plot(range(1, len(kept) + 1), list(accumulate(kept, min)), color="0.3", lw=1.2)
        axes.set(xlabel="evaluations", ylabel="least held-out error")

    def front(name: str) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            points = sorted(zip(seen[name], errors, strict=True))
            axes.scatter(*zip(*points, strict=True), s=12, alpha=0.6)
            axes.plot([cost for cost, _ in points], list(accumulate((error for _, error in points), min)),
                      color="tab:red", lw=1.2, drawstyle="steps-post")
            axes.set(xlabel=name, ylabel="held-out error")
        return draw
    limits = [name for name in ("mac_ratio", "bop_ratio", "size_ratio") if name in seen]
    return [("best so far", best), *((f"front: {name}", front(name)) for name in limits)] if errors else []


COURSES: dict[str, Callable[[Mapping[str, Any]], Panels]] = {
    "clip_q": _clip_q, "admm": _admm, "annc": _annc, "bayesian_bits": _bayesian_bits, "width_search": _width_search}


def _grid(panels: Panels, title: str = "") -> Figure:
    columns = min(len(panels), COLUMNS)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(SIDE * columns + 0.6, SIDE * lines + 0.5), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).reshape(-1)
    for axes, (name, draw) in zip(grid, panels, strict=False):
        draw(axes)
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.xaxis.label.set_size(8)
        axes.yaxis.label.set_size(8)
        axes.grid(alpha=0.25)
    for axes in grid[len(panels):]:
        axes.set_axis_off()
    if title:
        figure.suptitle(title, fontsize=9)
    labels = {label: line for axes in grid for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if labels:
        columns = max(min(len(labels), int(figure.get_figwidth() / 1.8)), 1)
        figure.set_figheight(figure.get_figheight() + LINE * -(-len(labels) // columns))
        figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=columns, fontsize=7,
                      frameon=False)
    return figure
