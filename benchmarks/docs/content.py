"""What a page shows of a table of rows: verdicts, pictures, and each row in detail."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..accounting import COUNTED
from ..report.courses import course_plot, search_plot
from ..report.table import comparable, told_apart
from ..report.verdicts import verdicts
from .equal import ways, ways_plot
from .figures import AXES, as_svg, bytes_plot, front_plot, has_axis
from .tables import table_of
from .words import DATA, Row, metric, short_metric, size, times

FACTS = ("note", "file", "file_digest", "task", "network", "seed", "budget", "config", "setup", "checkpoint", "data",
         "ranges_by", "commit", "dirty", "mixed", "device", "threads", "torch", "numpy", "python", "cpu", "gpu",
         "made_with")
# "Run: COMMAND" to the end of its line, or "Run, HOW:" over an indented command and a line that says "where ..."
RUN = re.compile(r"\bRun(, [^:\n]*)?:.*(\n#    .*)*(\n# where .*)?")
COURSES = 12  # rows of a table whose course is drawn


def table_part(rows: Sequence[Row], name: str, title: str, command: str, story: str,
               others: Sequence[str] = (), first: Sequence[str] = ()) -> dict:
    """What the templates table.html and paper.html take for one table. `others`, `first`: see `jobs.Table`."""
    methods = Counter(row["method"] for row in rows)
    rows = told_apart([{**row, "own": row["name"] not in others, "first": row["name"] in first} for row in rows])
    data = {method: list(dict.fromkeys(DATA.get(row["difficulty"]["data"], row["difficulty"]["data"])
                                       for row in rows if row["method"] == method)) for method in methods}
    return {"title": title, "file": f"table_{name}.html", "command": command, "story": story, "methods": methods,
            "data": data,
            **tallied([{**line, "own": row["own"], "first": row["first"], "network": row["network"]}
                       for row in rows for line in verdict_lines(row)]),
            "figures": pictures(rows, title), "table": table_of(rows, title, name),
            "notes": [{"row": row["name"], "text": row["note"]} for row in rows if row.get("note")],
            "rows": [row_part(row, drawn=i < COURSES) for i, row in enumerate(rows)]}


def tallied(lines: Sequence[Mapping[str, Any]]) -> dict:
    """Verdicts, how often each occurs, and that in words."""
    counts = Counter(line["verdict"] for line in lines)
    return {"verdicts": lines, "counts": counts, "tally": ", ".join(f"{n} {text}" for text, n in counts.items())}


def rows_by(part: Mapping[str, Any], method: str) -> dict:
    """A table's values with the verdicts on the rows of one method alone."""
    return {**part, **tallied([line for line in part["verdicts"] if line["method"] == method])}


def pictures(rows: Sequence[Row], title: str) -> list[dict]:
    """Fronts of each group of rows that can be compared, where the bytes go, and searches."""
    found = at_equal_bytes(rows, title)
    found += [front(group, axis, title) for group in comparable(rows) if len(group) > 1
              for axis in AXES if has_axis(group, axis)]
    if len(rows) > 1:
        found.append({"svg": as_svg(bytes_plot(rows), f"bytes of the files of {title}, by what they are for"),
                      "caption": "What the bytes of each file are for."})
    for network in dict.fromkeys(row["network"] for row in rows):
        search = search_plot([row for row in rows if row["network"] == network])
        if search is not None:
            found.append({"svg": as_svg(search, f"searches on {network}"), "caption": f"Searches on {network}."})
    return found


def at_equal_bytes(rows: Sequence[Row], title: str) -> list[dict]:
    """For each group of rows that can be compared, if several sizes are reached by several methods."""
    return [{"svg": as_svg(ways_plot(group), f"{title}: points of top-1 lost at equal bytes"),
             "caption": "Points of test top-1 lost at equal bytes, with their 95 % intervals."}
            for group in comparable(rows) if len(ways(group).columns) > 1]


def front(rows: Sequence[Row], axis: str, title: str, *, wide: bool = False) -> dict:
    label = AXES[axis][0]
    return {"svg": as_svg(front_plot(rows, axis, wide=wide), f"{title}: points of top-1 lost against {label}"),
            "caption": f"Points of test top-1 lost against {label}; bars are 95 % intervals, the grey line the front."}


def row_part(row: Row, *, drawn: bool) -> dict:
    """One row in detail."""
    course = course_plot(row) if drawn else None
    return {"name": row["name"],
            "layers": [{"name": name, "density": layer["density"], "bits": layer["bits"], "weights": layer["weights"]}
                       for name, layer in row["layers"].items()],
            "figures": [] if course is None else [{"svg": as_svg(course, f"what {row['name']} noted while it ran"),
                                                   "caption": "While it ran."}],
            "split": [(name, size(value)) for name, value in row["bytes_split"].items()],
            "ratios": [{"name": name.replace("_", " "), "value": times(value), "counts": COUNTED.get(name, "")}
                       for name, value in row["accounting"]["ratios"].items()],
            "provenance": json.dumps({key: row[key] for key in FACTS if key in row}, indent=1, ensure_ascii=False)}


def verdict_lines(row: Row) -> list[dict]:
    """One line for each printed number of a row, as text."""
    lines = []
    for one in verdicts(row):
        name, show = metric(one.metric)
        lines.append({"row": row["name"], "method": row["method"], "metric": name,
                      "printed": show(one.printed), "verdict": one.verdict, "kind": one.kind,
                      "short": short_metric(one.metric),
                      "ours": "—" if one.ours is None else show(one.ours),
                      "difference": "" if one.ours is None else f"{one.ours - one.printed:+.3g}"})
    return lines


def story(path: Path) -> str:
    """The comment at the head of a configuration, in one paragraph, without the command (see RUN)."""
    return " ".join(re.sub(r"^#", "", RUN.sub("", head_of(path)), flags=re.MULTILINE).split())


def command_in(path: Path) -> str:
    """The command that the head of a configuration says, for all its rows; else, or over many lines, `reproduce`."""
    said = re.search(r"\bRun: (python -m benchmarks [^(\n]*?)( --row .*)?\.?( \(|$)", head_of(path), re.MULTILINE)
    return said[1] if said else f"python -m benchmarks reproduce paper_configs/{path.name}"


def head_of(path: Path) -> str:
    return re.match(r"(#.*\n)*", path.read_text(encoding="utf-8"))[0]
