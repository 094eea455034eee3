"""Ours beside the paper's: every printed number of a row, our number, the difference."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..metrics import number_of
from ..rows import visible
from .seeds import over_seeds, spread_of
from .table import in_markdown

Row = Mapping[str, Any]
DERIVED = {"error_float": lambda r: 100 - r["top1_float"], "error_integer": lambda r: 100 - r["top1_integer"]}


def lookup(row: Row, path: str) -> float | None:
    """The number at a dotted path of a row, such as accounting.ratios.data_only; None if the row has none there."""
    if path in DERIVED:
        return DERIVED[path](row)
    value: Any = row
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value if isinstance(value, (int, float)) else None


def compared(row: Row) -> list[tuple[str, float, float | None]]:
    """(metric, paper, ours) for every printed number: of the row, then of each layer."""
    return [(metric, number_of(text), ours) for metric, text, ours in as_printed(row)]


def as_printed(row: Row) -> list[tuple[str, float | str, float | None]]:
    """As `compared`, of numbers that end with a printed 0 their text: "0.060" in TOML."""
    return [(metric, value[0] if isinstance(value, list) else value, ours) for metric, value, ours in _pairs(row)]


def deviations(row: Row) -> dict[str, float]:
    """{metric: printed deviation} of what is printed with one: [99.3, 0.03] in TOML."""
    return {metric: value[1] for metric, value, _ in _pairs(row) if isinstance(value, list)}


def _pairs(row: Row) -> list[tuple[str, Any, float | None]]:
    lines = [(metric, value, lookup(row, metric)) for metric, value in _dotted(row["paper"])]
    for layer, numbers in row["paper"].get("layers", {}).items():
        ours = row["layers"].get(layer, {})
        lines += [(f"{layer} {metric}", value, ours.get(metric)) for metric, value in _dotted(numbers)]
    return lines


def _dotted(tables: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """(dotted path, value) of all but the table `layers`: `cost.density = 1` in TOML is a table `cost`."""
    found: list[tuple[str, float]] = []
    for key, value in tables.items():
        if isinstance(value, Mapping):
            found += [] if key == "layers" else [(f"{key}.{path}", number) for path, number in _dotted(value)]
        else:
            found.append((key, value))
    return found


def terminal(rows: Sequence[Row], title: str) -> Table:
    """A rich table of all rows."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for head in ("row", "metric", "paper", "ours", "difference"):
        table.add_column(head, justify="left" if head in ("row", "metric") else "right", overflow="fold")
    for row in over_seeds(rows):
        for i, line in enumerate(texts(row)):
            table.add_row(visible(row["name"]) if i == 0 else "", *line)
        table.add_section()
    return table


def markdown(rows: Sequence[Row]) -> str:
    """The same as a GitHub table."""
    out = "| row | metric | paper | ours | difference |\n| --- | --- | ---: | ---: | ---: |\n"
    for row in over_seeds(rows):
        for line in texts(row):
            out += "| " + " | ".join(map(in_markdown, (row["name"], *line))) + " |\n"
    return out


def texts(row: Row) -> list[tuple[str, str, str, str]]:
    """(metric, paper, ours, difference) as text: printed numbers first, then what only we report."""
    extra = [(name, None, lookup(row, name)) for name in ("error_float", "error_integer", "bytes", "paper_mode_bytes",
             "accounting.ratios.prune_quantize_huffman") if name not in row["paper"]]
    printed = deviations(row)
    return [(metric, _number(paper) + (f" ± {printed[metric]:g}" if metric in printed else ""),
             _ours(row, metric, ours), "" if ours is None or paper is None else f"{ours - paper:+.3g}")
            for metric, paper, ours in compared(row) + extra]


def _ours(row: Row, metric: str, ours: float | None) -> str:
    deviation, count = spread_of(row, lambda one: lookup(one, metric))
    return _number(ours) + (f" ± {deviation:.2g} ({count} seeds)" if count > 1 else "")


def _number(value: float | None) -> str:
    return "—" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)
