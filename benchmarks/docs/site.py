"""Builds the site: one page a paper, one a table, an index, the tables in every form, and the API pages."""

import pkgutil
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

import methods
from methods.core.errors import ConfigError
from methods.core.file.container import write_file

from ..jobs import Table, all_tables
from ..networks import label
from ..report import claims
from ..report.table import comparable, told_apart
from ..report.verdicts import ACCURACY, COUNTED, GIVEN
from .content import at_equal_bytes, command_in, front, rows_by, story, table_part
from .papers import Paper, papers
from .tables import comma_separated, latex, markdown, table_of
from .words import Row

TEMPLATES = Path(__file__).parent / "templates"
RowsOf = Mapping[str, Sequence[Row]]


@dataclass(frozen=True)
class Site:
    """A folder of pages. `known` are the papers in the navigation; `api` says whether there are API pages."""

    out: Path
    known: list[Paper]
    api: bool

    def page(self, template: str, file: str, title: str, **values: Any) -> Path:
        """Render a template into the file of that name."""
        environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True,
                                         undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        environment.filters["marked"] = marked
        text = environment.get_template(template).render(title=title, here=file, pages=self.known, api=self.api,
                                                         **values)
        write_file(self.out / file, text.encode())
        return self.out / file

    def table(self, part: Mapping[str, Any]) -> Path:
        """The page of a table, and the table as CSV, Markdown and LaTeX."""
        table = part["table"]
        for suffix, form in (("csv", comma_separated), ("md", markdown), ("tex", latex)):
            write_file(self.out / f"{table.stem}.{suffix}", form(table).encode())
        return self.page("table.html", part["file"], part["title"], table=part)


def marked(text: str) -> Markup:
    """A docstring's text in HTML: what stands in `backticks` is code."""
    return Markup(re.sub(r"`+([^`]+)`+", r"<code>\1</code>", str(escape(text))))


def open_site(out: Path, *, api: bool = False, linked: bool = True) -> Site:
    """A folder with style and script; ConfigError where `out` is a file. `linked`: pages name those of papers."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: this is a file; a folder is needed")
    out.mkdir(parents=True, exist_ok=True)
    for name in ("style.css", "tables.js"):
        write_file(out / name, (TEMPLATES / name).read_bytes())
    return Site(out, papers() if linked else [], api)


def table_page(rows: Sequence[Row], name: str, title: str, command: str, out: Path) -> Path:
    """One table as a page of its own, with nothing around it."""
    return open_site(out, linked=False).table(table_part(rows, name, title, command, ""))


def build_site(rows_of: RowsOf, out: Path, *, headline: str, api: bool, say: Callable[[str], None],
               networks: Mapping[str, Any] | None = None) -> list[dict]:
    """Write the whole site into the folder `out`; returns what the index says of every paper.

    rows_of   {table: its rows};  headline  the table that the index shows
    api       whether the pages of the library are built as well (with pdoc)
    networks  what `foreign.in_words` says of torchvision's networks, or None: no page of them
    """
    site, configs, parts, summaries = open_site(out, api=api), {entry.name: entry for entry in all_tables()}, {}, []
    for i, (name, rows) in enumerate(rows_of.items()):
        say(f"table {i + 1} of {len(rows_of)}: {name}")
        parts[name] = (part_of(configs[name], rows) if name in configs else
                       table_part(rows, name, title_of(rows), command_of(name), ""))
        site.table(parts[name])
    for i, one in enumerate(site.known):
        say(f"page {i + 1} of {len(site.known) + 1}: {one.name}")
        own = [entry for entry in configs.values() if entry.method == one.method]
        summaries.append(paper_page(site, one, own, parts))
    others = [part for name, part in parts.items() if name not in configs]
    say(f"page {len(site.known) + 1} of {len(site.known) + 1}: index")
    first = headline_of(rows_of[headline], headline) if headline in rows_of else None
    found = claims.in_words(rows_of)
    site.page("index.html", "index.html", "jointcompress", headline=first, papers=summaries, others=others,
              claims=found, networks=networks is not None)
    site.page("claims.html", "claims.html", "Claims", claims=found)
    if networks is not None:
        site.page("networks.html", "networks.html", "torchvision's networks under the methods", networks=networks)
    if api:
        say("pages of the library")
        _api(out / "api")
    return summaries


def part_of(entry: Table, rows: Sequence[Row]) -> dict:
    """A table that a configuration makes, in its order."""
    places = {(job.name, label(job.network)): i for i, job in enumerate(entry.rows)}
    rows = sorted(rows, key=lambda row: places.get((row["name"], row["network"]), len(places)))
    return table_part(rows, entry.name, entry.title, command_in(entry.path), story(entry.path), entry.others,
                      entry.first)


def paper_page(site: Site, one: Paper, configs: Sequence[Table], parts: Mapping[str, Mapping[str, Any]]) -> dict:
    """Write a paper's page, the tables of its configurations and its rows in others; returns its line on the index."""
    own = [entry.name for entry in configs]
    mine = {name: rows_by(part, one.method) for name, part in parts.items()}
    elsewhere = {name: part for name, part in mine.items() if name not in own and part["methods"][one.method]}
    site.page("paper.html", one.file, one.name, paper={**vars(one), "configs": [e.name for e in configs if e.rows]},
              tables=[mine[name] for name in own if name in mine], elsewhere=elsewhere.values())
    return summary(one, mine)


def summary(one: Paper, parts: Mapping[str, Mapping[str, Any]]) -> dict:
    """A paper's line on the index: {table: rows of its method}, and what came of the numbers printed for them, by kind;
    numbers of other methods, and those that the budget gives, are not counted. `first`: the numbers of the rows that
    stand for the paper, {"row (network)": their lines}. `data`: what its rows saw."""
    lines = [line for part in parts.values() for line in part["verdicts"] if line["own"] and line["kind"] != GIVEN]
    counts = {kind: Counter(line["verdict"] for line in lines if line["kind"] == kind) for kind in (ACCURACY, COUNTED)}
    found = {name: part["methods"][one.method] for name, part in parts.items() if part["methods"][one.method]}
    first: dict[str, list[dict]] = {}
    for line in lines:
        if line["first"] and line["short"] is not None:
            name = line["row"].removesuffix(f", {line['network']}")
            first.setdefault(f"{name} ({line['network']})", []).append(line)
    seen = [text for part in parts.values() for text in part["data"].get(one.method, [])]
    return {**vars(one), "data": "; ".join(dict.fromkeys(seen)) if seen else one.data, "counts": counts,
            "printed": len(lines), "tables": found, "rows": sum(found.values()), "first": first}


def headline_of(rows: Sequence[Row], name: str) -> dict:
    """The index' first screen: all rows of a table, each measured against the baseline it starts from."""
    tops = ", ".join(f"{group[0]['baseline_top1']:.2f} %" for group in comparable(rows))
    what = f"{title_of(rows)}, points lost against each row's own baseline ({tops})"
    shown = told_apart(rows)
    return {"what": what, "figures": [*at_equal_bytes(shown, what), front(shown, "bytes", what, wide=True)],
            "table": table_of(rows, f"All methods: {what}.", name)}


def title_of(rows: Sequence[Row]) -> str:
    """Networks and data sets of rows."""
    return " and ".join(dict.fromkeys(f"{row['network']} on {row['task']}" for row in rows))


def command_of(name: str) -> str:
    """The command that makes a table which belongs to no paper."""
    kind, _, task = name.partition("_")
    return f"python -m benchmarks compare --task {task}" if kind == "compare" else f"python -m benchmarks report {name}"


def _api(out: Path) -> None:
    """The library's pages, from its docstrings."""
    import pdoc
    inside = [info.name for info in pkgutil.walk_packages(methods.__path__, "methods.")]
    pdoc.render.configure(docformat="restructuredtext", show_source=False)
    with warnings.catch_warnings():  # pdoc finds some of them by itself, too, and says so of each
        warnings.filterwarnings("ignore", message="The module specification")
        pdoc.pdoc("methods", *inside, output_directory=out)
