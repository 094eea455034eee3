"""One line a row: its accuracies, the printed one where there is one, and whether it was reached."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .against_paper import compared
from .table import in_markdown, short_bytes, told_apart

Row = Mapping[str, Any]
SAME, REACHED = 0.02, 0.1  # points of top-1: the printed number again; as good as the printed one
ACCURACIES = {"top1_float": 1, "top1_integer": 1, "error_float": -1, "error_integer": -1}


def verdict(row: Row) -> tuple[float, float, str] | None:
    """(printed top-1, ours minus printed, verdict) of the first accuracy that the paper prints, or error: 100 - it."""
    for metric, paper, ours in compared(row):
        if metric in ACCURACIES and ours is not None:
            gain = round(ACCURACIES[metric] * (ours - paper), 6)
            text = "the same" if abs(gain) <= SAME else "reached" if gain >= -REACHED else "not reached"
            return paper if ACCURACIES[metric] > 0 else 100 - paper, gain, text
    return None


def markdown(rows: Sequence[Row]) -> str:
    """A GitHub table; columns in which no row has anything are left out."""
    columns: dict[str, Callable[[Row], str]] = {
        "row": lambda r: r["name"],
        "paper": lambda r: _of(verdict(r), lambda v: f"{v[0]:g}"),
        "top-1 float": lambda r: f"{r['top1_float']:.2f}", "top-1 integer": lambda r: f"{r['top1_integer']:.2f}",
        "difference": lambda r: _of(verdict(r), lambda v: f"{v[1]:+.2f}"),
        "verdict": lambda r: _of(verdict(r), lambda v: v[2]),
        "float, batch norm re-estimated": lambda r: _of(r.get("top1_float_bn_reestimated"), "{:.2f}".format),
        "file": lambda r: short_bytes(r["bytes"]), "note": lambda r: r.get("note", "")}
    lines = [[show(row) for show in columns.values()] for row in told_apart(rows)]
    used = [i for i in range(len(columns)) if any(line[i] for line in lines)]
    heads = [head for i, head in enumerate(columns) if i in used]
    text = ("row", "verdict", "note")
    rule = " | ".join("---" if head in text else "---:" for head in heads)
    return f"| {' | '.join(heads)} |\n| {rule} |\n" + "".join(
        "| " + " | ".join(in_markdown(line[i]) for i in used) + " |\n" for line in lines)


def _of(value: Any, show: Callable[[Any], str]) -> str:
    return "" if value is None else show(value)
