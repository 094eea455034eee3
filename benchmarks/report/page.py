"""One self-contained HTML page: it loads nothing and opens offline."""

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from ..accounting import COUNTED
from . import against_paper
from .courses import course_plot, search_plot
from .plots import AXES, as_svg, pareto_plot
from .table import COLUMNS, cells, listed

Row = Mapping[str, Any]
FACTS = ("note", "file", "task", "network", "seed", "budget", "config", "setup", "checkpoint", "data", "integer",
         "ranges_by", "commit", "dirty", "mixed", "device", "threads", "torch", "numpy", "python", "cpu", "gpu")
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1180px;margin:2em auto;padding:0 1em;color:#1a1a1a;background:#fff}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:1em 0;display:block;overflow-x:auto}
th,td{padding:.3em .6em;text-align:right;white-space:nowrap;border-bottom:1px solid #ddd}
th{vertical-align:bottom;font-weight:600;white-space:normal}
th.axis{border-bottom:1px solid #888;color:#666;font-weight:400;text-align:center}
th:first-child,td:first-child,td.text{text-align:left;white-space:normal}
td:first-child{min-width:10em}tr.baseline td{color:#666}
figure{display:inline-block;width:46%;min-width:20em;margin:0 2% 1em 0}svg{width:100%;height:auto}
details{margin:.5em 0;border-left:3px solid #ddd;padding-left:1em}code,pre{font-size:13px;background:#f5f5f5}
pre{padding:.7em;overflow-x:auto}dt{font-weight:600}dd{margin:0 0 .3em 1.5em}
"""


def page(rows: Sequence[Row], title: str, command: str) -> str:
    """The report of a comparison: table, plots, and per row the layers, the byte split and the provenance."""
    axes = [column.axis for column in COLUMNS]
    head = "".join(f"<th{' class=axis' if axis else ''} colspan={axes.count(axis)}>{html.escape(axis)}</th>"
                   for axis in dict.fromkeys(axes))
    names = "".join(f'<th title="{html.escape(c.meaning)}">{html.escape(c.header)}</th>' for c in COLUMNS)
    body = "".join(_line(row, "baseline" if row["method"] == "none" else "") for row in listed(rows))
    plots = "".join(f"<figure>{as_svg(pareto_plot(rows, axis))}</figure>" for axis in AXES)
    plots += "".join(f"<h2>Searches, {html.escape(network)}</h2>{as_svg(figure)}" for network, figure in searches(rows))
    meanings = "".join(f"<dt>{html.escape(c.header)}</dt><dd>{html.escape(c.meaning)}</dd>" for c in COLUMNS)
    printed = "".join(_beside(row) for row in rows if row["paper"])
    details = "".join(_details(row) for row in listed(rows) if row["method"] != "none")
    return (f"<!doctype html><html lang=en><meta charset=utf-8>"
            f"<meta name=viewport content='width=device-width'><title>{html.escape(title)}</title>"
            f"<style>{STYLE}</style>"
            f"<h1>{html.escape(title)}</h1><p>Every number was measured from the decoded file. This page again: "
            f"<code>{html.escape(command)}</code></p>"
            f"<table><thead><tr>{head}</tr><tr>{names}</tr></thead><tbody>{body}</tbody></table>{plots}{printed}"
            f"<h2>Columns</h2><dl>{meanings}</dl><h2>Rows</h2>{details}</html>\n")


def searches(rows: Sequence[Row]) -> list[tuple[str, Figure]]:
    """(network, plot) for each network with rows that searched."""
    networks = dict.fromkeys(row["network"] for row in rows)
    plots = [(network, search_plot([row for row in rows if row["network"] == network])) for network in networks]
    return [(network, figure) for network, figure in plots if figure is not None]


def _beside(row: Row) -> str:
    heads = "".join(f"<th>{head}</th>" for head in ("metric", "paper", "ours", "difference"))
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in line) + "</tr>"
                    for line in against_paper.texts(row))
    return f"<h2>{html.escape(row['name'])}, beside the paper</h2><table><tr>{heads}</tr>{lines}</table>"


def _line(row: Row, kind: str = "") -> str:
    return f"<tr class='{kind}'>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells(row)) + "</tr>"


def _details(row: Row) -> str:
    keys = list(dict.fromkeys(key for layer in row["layers"].values() for key in layer))
    layers = "".join("<tr><td>" + html.escape(name) + "</td>"
                     + "".join(f"<td>{_number(layer.get(key))}</td>" for key in keys) + "</tr>"
                     for name, layer in row["layers"].items())
    heads = "".join(f"<th>{html.escape(key.replace('_', ' '))}</th>" for key in ["layer", *keys])
    ratios = "".join(f"<tr><td>{html.escape(name)}</td><td>{value:.2f}x</td>"
                     f"<td class=text>{html.escape(COUNTED.get(name, ''))}</td></tr>"
                     for name, value in row["accounting"]["ratios"].items())
    split = "".join(f"<tr><td>{html.escape(name)}</td><td>{value:,}</td></tr>"
                    for name, value in row["bytes_split"].items())
    facts = {key: row[key] for key in FACTS if key in row}
    figure = course_plot(row)
    course = "" if figure is None else f"<h3>While it ran</h3>{as_svg(figure)}"
    return (f"<details><summary>{html.escape(row['name'])}</summary><h3>Bytes of the file</h3><table>{split}</table>"
            f"<h3>Ratios in the papers' accountings</h3><table>{ratios}</table><h3>Layers</h3>"
            f"<table><tr>{heads}</tr>{layers}</table>{course}<h3>Where it comes from</h3>"
            f"<pre>{html.escape(json.dumps(facts, indent=1, ensure_ascii=False))}</pre></details>")


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else html.escape(str(value))
