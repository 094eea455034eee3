"""README's tables, made from committed rows: text between `<!-- KIND: NAME -->` and `<!-- end -->`.

KIND is "rows" (the comparison), "paper" (every printed number), "scores" (a line a row), or "baselines" (NAME shipped).
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from methods.core.errors import CompressError

from . import against_paper, scores, table

BLOCK = re.compile(r"(<!-- (rows|paper|scores|baselines): (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str, rows_of: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """`text` with every block replaced by the table of its rows; CompressError for a block without rows."""

    def fill(match: re.Match) -> str:
        opening, kind, name, closing = match.groups()
        if name not in rows_of:
            raise CompressError(f"README asks for the rows of {name!r}, which results/rows does not hold")
        rows = rows_of[name]
        content = {"rows": lambda: table.markdown(table.listed(rows)),
                   "paper": lambda: against_paper.markdown(rows), "scores": lambda: scores.markdown(rows),
                   "baselines": lambda: baselines(rows)}[kind]()
        return f"{opening}\n{content}\n{closing}"

    return BLOCK.sub(fill, text)


def baselines(trained: Sequence[Mapping[str, Any]]) -> str:
    """A GitHub table of trained networks, from the provenance in their files."""
    lines = "".join(
        f"| {one['task']} | {one['network']} | {one['test_top1']:.2f} | {one['held_out_top1']:.2f} | "
        f"{one['setup']['recipe']['epochs']} | {one['seed']} | {one['commit'][:7]} |\n" for one in trained)
    return ("| task | network | test top-1 | held-out top-1 | epochs | seed | commit |\n"
            "| --- | --- | ---: | ---: | ---: | ---: | --- |\n" + lines)


def refresh(readme: Path, rows_of: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Rewrite the blocks of a README in place."""
    readme.write_text(filled(readme.read_text(encoding="utf-8"), rows_of), encoding="utf-8")
