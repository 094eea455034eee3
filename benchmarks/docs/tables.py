"""Tables of rows in every form: cells for HTML, CSV, Markdown and LaTeX, with all that a citation needs."""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..report.against_paper import compared
from ..report.seeds import paired_interval, spread_of
from ..report.table import cpu_seconds, in_markdown, listed
from .words import DATA, Row, count, method_name, plain, points, points_lost, size, times

SEEN = 3.0  # points by which a network is better on held-out images than on test images only if it was trained on them


@dataclass(frozen=True)
class Column:
    """A header, the value in a row (None: nothing there), how to print it, what it means; text is left-aligned."""

    header: str
    value: Callable[[Row], Any]
    show: Callable[[Any], str]
    meaning: str
    text: bool = False


@dataclass(frozen=True)
class Cell:
    text: str
    key: float | None  # to sort by; None: by the text


@dataclass(frozen=True)
class Line:
    kind: str
    cells: list[Cell]


@dataclass(frozen=True)
class Table:
    """`stem` names the files of its other forms."""

    caption: str
    stem: str
    columns: list[Column]
    lines: list[Line]


def _lost(row: Row) -> float | None:
    return None if row["top1_integer"] is None else points_lost(row)


def _interval(row: Row) -> str | None:
    found = paired_interval(row)
    return None if found is None else f"{-found[1]:.2f} to {-found[0]:.2f}"


def _held_out(row: Row) -> float | str | None:
    """Marked where the network that the row starts from has seen these images: it knows them far better than others."""
    value, given = row.get("held_out_top1"), row.get("baseline_held_out_top1")
    seen = value is not None and given is not None and given - row["baseline_top1"] > SEEN
    return f"{points(value)} (seen)" if seen else value


def _printed(row: Row) -> str | None:
    found = [f"{value:g}" for metric, value, _ in compared(row) if metric.startswith(("top1", "error"))] if (
        row.get("paper")) else []
    return found[0] if found else None


def _trimmed(row: Row) -> float | None:
    share = row.get("notes", {}).get("size", {}).get("trimmed", 0.0)
    return 100 * share if share > 0 else None


COLUMNS = (
    Column("row", lambda r: r["name"], str, "name of the row in its configuration", True),
    Column("method", lambda r: r["method"], method_name, "the method that made it", True),
    Column("points lost", _lost, points, "top-1 of the float32 baseline minus top-1 in integer arithmetic"),
    Column("95 % interval", _interval, str, "of points lost, paired on the same test inputs"),
    Column("top-1, integer", lambda r: r["top1_integer"], points,
           "test accuracy in percent in integer arithmetic; activations have 8 bits unless the method chose others"),
    Column("top-1, float", lambda r: r["top1_float"], points, "test accuracy in percent, decoded weights in float"),
    Column("held-out", _held_out, lambda v: v if isinstance(v, str) else points(v),
           "accuracy on the held-out images that choices see; (seen): the given network was trained on them"),
    Column("printed", _printed, str, "the paper's accuracy or error, where it prints one"),
    Column("file", lambda r: r["bytes"], size, "bytes on disk, everything included; KB = 1000 B"),
    Column("smaller", lambda r: r["float32_bytes"] / r["bytes"], times, "float32 bytes of the network / bytes"),
    Column("kept", lambda r: 100 * r["cost"]["density"], lambda v: f"{plain(v)} %",
           "kept share of the uncompressed network's weights"),
    Column("bits", lambda r: r["cost"]["mean_bits"], plain, "mean code width of a kept weight"),
    Column("trimmed", _trimmed, lambda v: f"{plain(v)} %",
           "of the kept weights, lost after the training so that the file fits; — : none"),
    Column("BOPs", lambda r: r["cost"]["bops"], count, "sum of MACs x weight bits x activation bits"),
    Column("BOPs, zeros skipped", lambda r: r["cost"]["sparse_bops"], count, "the same x density"),
    Column("energy", lambda r: r.get("hardware", {}).get("energy_ratio_skipping"), plain,
           "share of the float32 network's, 45 nm model, zero operands skipped"),
    Column("cycles", lambda r: r.get("hardware", {}).get("cycles_channels"), count,
           "of a 32 x 32 weight-stationary systolic array, removed channels gone"),
    Column("data", lambda r: r["difficulty"]["data"], lambda v: DATA.get(v, v), "what the method has to see", True),
    Column("knobs", lambda r: r["difficulty"]["knobs"], str, "settings of budget and configuration"),
    Column("lines", lambda r: r["difficulty"]["lines"], str, "lines of code that only the method uses"),
    Column("CPU s", cpu_seconds, plain, "of all cores, to compress; none for what a GPU compressed: not comparable"),
    Column("task", lambda r: r.get("task"), str, "data set", True),
    Column("network", lambda r: r.get("network"), str, "architecture", True),
    Column("seed", lambda r: r.get("seed"), str, "of the method"),
    Column("n", lambda r: r.get("n_test"), str, "test images"),
)


def table_of(rows: Sequence[Row], caption: str, stem: str) -> Table:
    """The table of `rows` under their baselines; columns in which no row has anything are left out."""
    shown = listed(rows)
    columns = [column for column in COLUMNS if any(column.value(row) is not None for row in shown)]
    lines = [Line("baseline" if row["method"] == "none" else "", [_cell(column, row) for column in columns])
             for row in shown]
    return Table(caption, stem, columns, lines)


def _cell(column: Column, row: Row) -> Cell:
    value = column.value(row)
    if value is None or (column.header == "method" and value == "none"):
        return Cell("—", None)
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    deviation, count = spread_of(row, column.value) if numeric and "seeds" in row else (0.0, 1)
    spread = f" ± {column.show(deviation)}" if count > 1 and deviation > 0 else ""
    return Cell(column.show(value) + spread, float(value) if numeric else None)


def markdown(table: Table) -> str:
    """A GitHub table."""
    lines = [[column.header for column in table.columns], ["---" if c.text else "---:" for c in table.columns]]
    lines += [[in_markdown(cell.text) for cell in line.cells] for line in table.lines]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def comma_separated(table: Table) -> str:
    """CSV, numbers at full precision; a text that a spreadsheet would take for a formula is quoted by an apostrophe."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([column.header for column in table.columns])
    for line in table.lines:
        writer.writerow([_safe(cell.text) if cell.key is None else int(cell.key) if cell.key.is_integer() else
                         cell.key for cell in line.cells])
    return out.getvalue()


def _safe(text: str) -> str:
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else "" if text == "—" else text


LATEX = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{",
         "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "—": "--", "×": r"$\times$",
         "±": r"$\pm$"}


def in_latex(text: str) -> str:
    return "".join(LATEX.get(letter, letter) for letter in text)


def latex(table: Table) -> str:
    """A tabular for \\usepackage{booktabs}."""
    ends = " \\\\\n"
    rows = [" & ".join(in_latex(cell.text) for cell in line.cells) + ends for line in table.lines]
    head = " & ".join(in_latex(column.header) for column in table.columns) + ends
    form = "".join("l" if column.text else "r" for column in table.columns)
    return (f"% {table.caption}\n\\begin{{tabular}}{{{form}}}\n\\toprule\n{head}\\midrule\n{''.join(rows)}"
            "\\bottomrule\n\\end{tabular}\n")
