"""Builds the site: one page a paper, an index, the tables in every form, and the API pages."""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from methods.core.errors import ConfigError
from methods.core.file.container import write_file

from ..accounting import COUNTED
from ..jobs import CONFIGS, all_tables
from ..report.against_paper import compared
from ..report.courses import course_plot
from ..report.table import comparable, told_apart
from .figures import AXES, as_svg, bytes_plot, front_plot, has_axis
from .papers import Paper, papers
from .tables import Table, comma_separated, latex, markdown, table_of
from .words import Row, metric, times

TEMPLATES = Path(__file__).parent / "templates"
FACTS = ("note", "file", "file_digest", "task", "network", "seed", "budget", "config", "setup", "checkpoint", "data",
         "ranges_by", "commit", "dirty", "mixed", "device", "threads", "torch", "numpy", "python", "cpu", "gpu")
DETAILED = 12  # rows of a table that get pictures of their layers; more would make a page of megabytes
RowsOf = Mapping[str, Sequence[Row]]


def build_site(rows_of: RowsOf, out: Path, *, headline: str, api: bool, say: Callable[[str], None]) -> list[Path]:
    """Write the site into the folder `out` and return its pages.

    rows_of   {table: its rows};  headline  the table that the index shows
    api       whether the pages of the library are built as well (with pdoc)
    Raises ConfigError where `out` is a file.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: this is a file; a folder is needed")
    out.mkdir(parents=True, exist_ok=True)
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True,
                                     undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    for name in ("style.css", "tables.js"):
        write_file(out / name, (TEMPLATES / name).read_bytes())
    known, written, summaries = papers(), [], []
    for i, one in enumerate(known):
        say(f"page {i + 1} of {len(known) + 1}: {one.name}")
        tables = [_table_part(entry, rows_of[entry.name], out) for entry in all_tables()
                  if entry.method == one.method and entry.name in rows_of]
        summaries.append(_summary(one, tables))
        written.append(_page(environment, out, "paper.html", one.file, one.name, known, api, paper=_Shown(one, tables)))
    say(f"page {len(known) + 1} of {len(known) + 1}: index")
    first = _headline(rows_of[headline], headline, out) if headline in rows_of else None
    written.append(_page(environment, out, "index.html", "index.html", "jointcompress", known, api, headline=first,
                         papers=summaries))
    if api:
        say("API pages")
        _api(out / "api")
    return written


def _page(environment, out: Path, template: str, file: str, title: str, known: list[Paper], api: bool,
          **values: Any) -> Path:
    text = environment.get_template(template).render(title=title, here=file, pages=known, api=api, **values)
    write_file(out / file, text.encode())
    return out / file


class _Shown:
    """A paper with its tables, as the template reads it."""

    def __init__(self, one: Paper, tables: list[dict]):
        self.tables = tables
        self.__dict__.update(vars(one))


def _summary(one: Paper, tables: list[dict]) -> dict:
    counts = Counter(line["verdict"] for table in tables for line in table["verdicts"])
    return {**vars(one), "counts": counts, "printed": sum(counts.values())}


def _table_part(entry, rows: Sequence[Row], out: Path) -> dict:
    """Everything a paper's page shows of one table."""
    rows = told_apart(rows)
    table = table_of(rows, entry.title, entry.name)
    _write_forms(table, out)
    lines = [line for row in rows for line in verdict_lines(row)]
    tally = ", ".join(f"{count} {verdict}" for verdict, count in Counter(line["verdict"] for line in lines).items())
    pictures = [_front(group, axis, entry.title) for group in comparable(rows) if len(group) > 1
                for axis in AXES if has_axis(group, axis)][:3]
    if len(rows) > 1:
        pictures.append({"svg": as_svg(bytes_plot(rows), f"bytes of the files of {entry.title}, by what they are for"),
                         "caption": "What the bytes of each file are for."})
    return {"title": entry.title, "command": f"python -m benchmarks reproduce paper_configs/{entry.name}.toml",
            "story": story(CONFIGS / f"{entry.name}.toml"), "verdicts": lines, "tally": tally, "figures": pictures,
            "table": table, "notes": [{"row": row["name"], "text": row["note"]} for row in rows if row.get("note")],
            "rows": [_row_part(row) for row in rows[:DETAILED]]}


def _row_part(row: Row) -> dict:
    ratios = [{"name": name.replace("_", " "), "value": times(value), "counts": COUNTED.get(name, "")}
              for name, value in row["accounting"]["ratios"].items()]
    course = course_plot(row)
    figures = [] if course is None else [
        {"svg": as_svg(course, f"what {row['name']} noted while it ran"), "caption": "While it ran."}]
    layers = [{"name": name, "density": layer["density"], "bits": layer["bits"], "weights": layer["weights"]}
              for name, layer in row["layers"].items()]
    facts = {key: row[key] for key in FACTS if key in row}
    return {"name": row["name"], "ratios": ratios, "figures": figures, "layers": layers,
            "provenance": json.dumps(facts, indent=1, ensure_ascii=False)}


def _front(rows: Sequence[Row], axis: str, title: str, *, wide: bool = False) -> dict:
    label = AXES[axis][0]
    return {"svg": as_svg(front_plot(rows, axis, wide=wide), f"{title}: points of top-1 lost against {label}"),
            "caption": f"Points of test top-1 lost against {label}; bars are 95 % intervals, the grey line the front."}


def _headline(rows: Sequence[Row], name: str, out: Path) -> dict:
    """The index' first screen: the largest group of rows that can be compared."""
    group = max(comparable(told_apart(rows)), key=len)
    what = f"{group[0]['network']} on {group[0]['task']}, baseline {group[0]['baseline_top1']:.2f} %"
    table = table_of(group, f"All methods: {what}.", name)
    _write_forms(table, out)
    return {"what": what, "figures": [_front(group, axis, what, wide=True) for axis in ("bytes",)], "table": table}


def _write_forms(table: Table, out: Path) -> None:
    for suffix, form in (("csv", comma_separated), ("md", markdown), ("tex", latex)):
        write_file(out / f"{table.stem}.{suffix}", form(table).encode())


def verdict_of(row, path, printed, ours):
    return "cannot tell" if ours is None else "reached" if ours >= printed else "not reached"


def verdict_lines(row: Row) -> list[dict]:
    """One line for each printed number of a row."""
    lines = []
    for path, printed, ours in compared(row):
        name, show = metric(path)
        lines.append({"row": row["name"], "metric": name, "printed": show(printed),
                      "ours": "—" if ours is None else show(ours),
                      "difference": "" if ours is None else f"{ours - printed:+.3g}",
                      "verdict": verdict_of(row, path, printed, ours)})
    return lines


def story(path: Path) -> str:
    """The comment at the head of a configuration, in one paragraph, without the command."""
    head = re.match(r"(#.*\n)*", path.read_text(encoding="utf-8"))[0]
    lines = [line.lstrip("# ") for line in head.splitlines()]
    return re.sub(r"Run: python -m benchmarks reproduce \S+( --checkpoint FILE)?", "", " ".join(lines)).strip()


def _api(out: Path) -> None:
    """The library's pages, from its docstrings."""
    import pdoc
    pdoc.render.configure(docformat="restructuredtext", show_source=True)
    pdoc.pdoc("methods", output_directory=out)
