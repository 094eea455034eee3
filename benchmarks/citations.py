"""What to cite: the BibTeX entries of paper_configs/references.bib, one for each method of a paper; else this project,
as CITATION.cff names it."""

import importlib.metadata
import re
from pathlib import Path

from methods import GROUP, __version__, method_names
from methods.core.errors import ConfigError

from .rows import ROOT

REFERENCES = ROOT / "paper_configs" / "references.bib"
CITATION = ROOT / "CITATION.cff"
ENTRY = re.compile(r"^@\w+\{(\w+),\n.*?^\}\n", re.MULTILINE | re.DOTALL)
FIELD = re.compile(r"^\s*(\w+) = \{(.*)\},?$", re.MULTILINE)
OWN = "jointcompress"


def entries(path: Path = REFERENCES) -> dict[str, str]:
    """{method: its BibTeX entry}."""
    return {match[1]: match[0] for match in ENTRY.finditer(path.read_text(encoding="utf-8"))}


def own_entries(path: Path = CITATION) -> dict[str, str]:
    """{method without a paper of its own: a BibTeX entry of this project, whose note names the method}."""
    text = path.read_text(encoding="utf-8")
    title, author, released = (re.search(rf'^[ -]*{key}: "?(.*?)"?$', text, re.MULTILINE)[1]
                               for key in ("title", "name", "date-released"))
    brought = {point.name for point in importlib.metadata.entry_points(group=GROUP)}
    names = [name for name in method_names() if name not in entries() and name not in brought]
    fields = {"title": title, "author": f"{{{author}}}", "year": released[:4], "version": __version__}
    return {name: _software(name, {**fields, "note": "The method " + name.replace("_", r"\_")}) for name in names}


def _software(key: str, fields: dict[str, str]) -> str:
    lines = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
    return f"@software{{{key},\n{lines}\n}}\n"


def bibtex(methods: list[str]) -> str:
    """The entries of `methods`, or of all; ConfigError, listing the names, for one that has none."""
    known = entries() | own_entries()
    unknown = [name for name in methods if name not in known]
    if unknown:
        raise ConfigError(f"no reference for {unknown[0]!r}; there are: {', '.join(known)}")
    return "\n".join(known[name] for name in (methods if methods else known))


def link(entry: str) -> str | None:
    """Where the paper of an entry is found: its doi, else arXiv."""
    fields = dict(FIELD.findall(entry))
    if "doi" in fields:
        return f"https://doi.org/{fields['doi']}"
    return f"https://arxiv.org/abs/{fields['eprint']}" if "eprint" in fields else None


def authors(entry: str) -> str:
    """Authors and year of an entry, and where it is found: Tung and Mori 2018, doi.org/..."""
    where = link(entry)
    return who(entry) + (f", {where.removeprefix('https://')}" if where is not None else "")


def who(entry: str) -> str:
    """Authors and year of an entry: Tung and Mori 2018."""
    names, _, rest = short(entry).partition(":")
    return f"{names} {rest[-4:]}"


def short(entry: str) -> str:
    """An entry in one line: authors, title, year, without braces."""
    fields = {key: value.replace("{", "").replace("}", "") for key, value in FIELD.findall(entry)}
    names = [name.split(",")[0] for name in fields["author"].split(" and ")]
    who = names[0] if len(names) == 1 else f"{names[0]} and {names[1]}" if len(names) == 2 else f"{names[0]} et al."
    where = fields["booktitle"] if "booktitle" in fields else fields["journal"]
    return f"{who}: {fields['title']}. {where}, {fields['year']}"
