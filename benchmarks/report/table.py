"""The comparison table along three axes: capability kept, hardware efficiency, difficulty."""

import html
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table

from ..rows import visible
from .seeds import over_seeds, seeds_of, spread_of

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """A column: the axis it belongs to, its header, the value in a row, how to print it, what it means."""

    axis: str
    header: str
    value: Callable[[Row], Any]
    show: Callable[[Any], str]
    meaning: str


def short_bytes(n: float) -> str:
    """Bytes in units of 1000: 974 KB."""
    return _short(n, (("GB", 1e9), ("MB", 1e6), ("KB", 1e3), ("B", 1)))


def short_count(n: float) -> str:
    """A number of operations: 35.5 G."""
    return _short(n, (("T", 1e12), ("G", 1e9), ("M", 1e6), ("K", 1e3), ("", 1)))


def _short(n: float, units: Sequence[tuple[str, float]]) -> str:
    """Three digits in the largest unit that leaves 1 or more once rounded."""
    unit, size = next((pair for pair in units if n >= 0.9995 * pair[1]), units[-1])
    return f"{n / size:.3g} {unit}".rstrip()


def cpu_seconds(row: Row) -> float | None:
    """None where a GPU did the work, whose time these seconds leave out."""
    return None if row.get("device") == "cuda" else row["difficulty"].get("cpu_seconds")


ACCURACY = {"top-1 float": "top1_float", "top-1 integer": "top1_integer"}  # columns with a deviation over seeds
CAPABILITY, HARDWARE, DIFFICULTY = "capability kept", "hardware efficiency", "difficulty"
COLUMNS = (
    Column("", "method", lambda r: r["name"], str, "row and the method that made it"),
    Column(CAPABILITY, "top-1 float", lambda r: r["top1_float"], "{:.2f}".format,
           "test accuracy in percent, decoded weights in float arithmetic"),
    Column(CAPABILITY, "top-1 integer", lambda r: r["top1_integer"], "{:.2f}".format,
           "test accuracy in percent in integer arithmetic; activations have 8 bits unless the method chose others"),
    Column(HARDWARE, "file", lambda r: r["bytes"], short_bytes, "bytes of the file on disk, everything included"),
    Column(HARDWARE, "smaller", lambda r: r["float32_bytes"] / r["bytes"], "{:.1f}x".format,
           "float32 bytes of the network / bytes of the file"),
    Column(HARDWARE, "density", lambda r: r["cost"]["density"], "{:.3g}".format,
           "kept fraction of the uncompressed network's conv and linear weights"),
    Column(HARDWARE, "bits", lambda r: r["cost"]["mean_bits"], "{:.3g}".format, "mean code width of a kept weight"),
    Column(HARDWARE, "BOPs", lambda r: r["cost"]["bops"], short_count,
           "sum of MACs x weight operand bits x activation bits (a codebook multiplies 8 or 16 bits)"),
    Column(HARDWARE, "BOPs, zeros skipped", lambda r: r["cost"]["sparse_bops"], short_count,
           "the same x density: hardware that skips every pruned weight"),
    Column(HARDWARE, "MACs", lambda r: r["cost"]["macs"], short_count, "multiply-accumulates of one input"),
    Column(DIFFICULTY, "data", lambda r: r["difficulty"]["data"], str, "what the method has to see"),
    Column(DIFFICULTY, "knobs", lambda r: r["difficulty"]["knobs"], str, "settings of budget and configuration"),
    Column(DIFFICULTY, "lines", lambda r: r["difficulty"]["lines"], str, "lines of code of the method's module"),
    Column(DIFFICULTY, "CPU seconds", cpu_seconds, "{:.1f}".format,
           "of all cores, to compress, on the machine of the row; not of rows that a GPU made"),
)


def told_apart(rows: Sequence[Row]) -> list[Row]:
    """`rows`, seeds in one row (see `seeds`), where names that occur more than once say the network, and the baseline
    and the seed if that does not tell them apart."""
    rows = over_seeds(rows)

    def told(row: Row) -> Row:
        same = [other for other in rows if other["name"] == row["name"]]
        alike = [other for other in same if other["network"] == row["network"]]
        parts = [row["name"], *([row["network"]] if len(alike) < len(same) else [])]
        started = [other for other in alike if other["checkpoint"]["digest"] == row["checkpoint"]["digest"]]
        if len(started) < len(alike):
            parts.append(f"baseline {row['checkpoint']['digest'][:8]}")
        if len(started) > 1:
            parts.append(seeds_of(row) if "seeds" in row else f"seed {row['seed']}")
        return {**row, "name": ", ".join(parts)} if len(parts) > 1 else row

    return [told(row) for row in rows]


def with_spread(row: Row, key: str) -> str:
    """An accuracy of a row; of several seeds the mean and the sample deviation."""
    deviation, count = spread_of(row, lambda one: one[key])
    return f"{row[key]:.2f}" + (f" ± {deviation:.2f}" if count > 1 else "")


def listed(rows: Sequence[Row]) -> list[Row]:
    """`rows`, told apart, under the baseline they start from."""
    out: list[Row] = []
    groups = comparable(told_apart(rows))
    for group in groups:
        base = baseline_row(group[0])
        out += [base if len(groups) == 1 else {**base, "name": f"{base['name']}, {group[0]['network']}"}, *group]
    return out


def comparable(rows: Sequence[Row]) -> list[list[Row]]:
    """`rows` by the checkpoint they start from: only those of one group can be compared."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["network"], row["checkpoint"]["digest"]), []).append(row)
    return list(groups.values())


def baseline_row(row: Row) -> dict[str, Any]:
    """The uncompressed network of a row, as a row of its own."""
    cost = row["cost"]
    macs = row.get("dense_macs", cost["macs"])
    full = {**cost, "macs": macs, "density": 1.0, "mean_bits": 32.0, "bops": macs * 1024, "sparse_bops": macs * 1024}
    return {"name": "float32 baseline", "method": "none", "top1_float": row["baseline_top1"], "top1_integer": None,
            "bytes": row["float32_bytes"], "float32_bytes": row["float32_bytes"], "cost": full,
            "difficulty": dict.fromkeys(("data", "knobs", "lines", "cpu_seconds"))}


def terminal(rows: Sequence[Row], title: str, width: int) -> Group:
    """The table for a terminal of `width` characters: in one piece, or one table per axis where that is too wide."""
    whole = _table(rows, title, COLUMNS)
    wide = Console(width=1000)
    if wide.measure(whole).maximum <= width:
        return Group(whole)
    axes = list(dict.fromkeys(column.axis for column in COLUMNS if column.axis))
    parts = [_table(rows, axis, [c for c in COLUMNS if c.axis in ("", axis)]) for axis in axes]
    return Group(f"{title}\n", *(piece for part in parts for piece in (part, "")))


def _table(rows: Sequence[Row], title: str, columns: Sequence[Column]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True,
                  show_edge=False)
    for column in columns:
        table.add_column(column.header.replace(" ", "\n") if column.axis else column.header, vertical="bottom",
                         justify="right" if column.axis else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(visible, cells(row, columns)))
    return table


def cells(row: Row, columns: Sequence[Column] = COLUMNS) -> list[str]:
    values = [column.value(row) for column in columns]
    texts = ["—" if value is None else column.show(value) for column, value in zip(columns, values, strict=True)]
    keys = [ACCURACY.get(column.header) if "seeds" in row else None for column in columns]
    return [text if key is None else with_spread(row, key) for text, key in zip(texts, keys, strict=True)]


def in_markdown(text: str) -> str:
    """`text` inside a cell of a GitHub table, shown as it is."""
    text = " ".join(html.escape(text, quote=False).split())
    return re.sub(r"([\\|`*\[\]])", r"\\\1", text)
