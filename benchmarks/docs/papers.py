"""What a paper's page says of it, from the docstring of its module and its configurations."""

import re
from dataclasses import dataclass
from types import ModuleType

from methods import find_method, method_names

from ..citations import entries, link, short, who
from ..rows import ROOT
from .words import DATA, method_name

SECTION = re.compile(r"^(Algorithm|Symbols|Departures)\b", re.MULTILINE)
LONGER = re.compile(r"\A [^\s(].*\n(?=\s*\* )")  # the rest of a heading, over a list


@dataclass(frozen=True)
class Paper:
    """summary: paragraphs that say what the method does; departures: one text each."""

    method: str
    name: str
    file: str
    who: str
    citation: str
    link: str | None
    bibtex: str
    data: str
    code: str
    summary: list[str]
    departures: list[str]


def papers() -> list[Paper]:
    """All methods, in alphabetical order."""
    known = entries()
    return [paper(find_method(name), known.get(name)) for name in method_names()]


def paper(module: ModuleType, entry: str | None) -> Paper:
    """The paper of a method; without a BibTeX entry (a method of one's own) the docstring's first line cites it."""
    method = module.__name__.rpartition(".")[2]
    paragraphs, departures = said(module.__doc__)
    code = module.__file__
    inside = code.startswith(str(ROOT))
    return Paper(method, method_name(method), f"{method}.html", who(entry) if entry else "of this project",
                 short(entry) if entry else paragraphs[0].rstrip("."), link(entry) if entry else None,
                 entry if entry else "no paper: cite this project", DATA.get(module.DATA, module.DATA),
                 code[len(str(ROOT)) + 1:] if inside else module.__name__, paragraphs[1:], departures)


def said(docstring: str | None) -> tuple[list[str], list[str]]:
    """(paragraphs before the algorithm, departures) of a docstring; lines joined.

    A heading's line may go on ("Departures from the specification"): that is dropped. What stands apart from it, by two
    blanks or in parentheses, is text.
    """
    text = docstring if docstring is not None else ""
    parts = SECTION.split(text)
    paragraphs = [" ".join(part.split()) for part in parts[0].split("\n\n") if part.strip()]
    found = {parts[i]: parts[i + 1] for i in range(1, len(parts) - 1, 2)}
    body = LONGER.sub("", found.get("Departures", ""))
    items = re.split(r"^\s*\* ", body, flags=re.MULTILINE)
    return paragraphs or ["(no docstring)"], [" ".join(item.split()) for item in items if item.strip()]
