"""Tables of README and results/TABLES.md, made from committed rows: text between `<!-- KIND: NAME -->` and
`<!-- end -->`.

KIND is "headline" (the methods of one table at equal bytes), "rows" (every row of one table), "papers" (a line a
paper), "claims" (a line a claim), or "baselines".
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from methods.core.errors import CompressError
from methods.core.file.container import write_file

from ..report import claims
from ..report.table import comparable, in_markdown, told_apart
from ..report.verdicts import ACCURACY, CANNOT_TELL, COUNTED, MISSING, NOT_REACHED, REACHED
from .equal import blocks, ways_plot, ways_table
from .figures import as_png
from .tables import Table, markdown, table_of
from .words import Row

BLOCK = re.compile(r"(<!-- (headline|rows|papers|claims|baselines): (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
OF_TABLE = ("headline", "rows")
SHOWN = ("row", "points lost", "95 % interval", "top-1, integer", "top-1, float", "file", "smaller",
         "trimmed", "BOPs, zeros skipped", "energy", "cycles", "data", "CPU s")
RowsOf = Mapping[str, Sequence[Row]]


def refresh(readme: Path, rows_of: RowsOf, papers: Sequence[Mapping[str, Any]],
            baselines: Sequence[Mapping[str, Any]]) -> None:
    """Rewrite the blocks of a text in place, and the pictures of its headlines, beside it under results/figures."""
    text = readme.read_text(encoding="utf-8")
    write_file(readme, filled(text, rows_of, papers, baselines).encode())
    for match in BLOCK.finditer(text):
        if match[2] == "headline":
            figure = ways_plot(told_apart(rows_of[match[3]]))
            path = readme.parent / "results" / "figures" / f"{match[3]}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, as_png(figure))


def filled(text: str, rows_of: RowsOf, papers: Sequence[Mapping[str, Any]],
           baselines: Sequence[Mapping[str, Any]]) -> str:
    """`text` with every block replaced; CompressError for a block without rows."""
    makers: dict[str, Callable[[str], str]] = {
        "headline": lambda name: headline(rows_of[name]), "rows": lambda name: every_row(rows_of[name], name),
        "papers": lambda name: paper_lines(papers),
        "claims": lambda name: claim_lines(claims.in_words(rows_of)),
        "baselines": lambda name: baseline_lines(baselines)}

    def fill(match: re.Match) -> str:
        opening, kind, name, closing = match.groups()
        if kind in OF_TABLE and name not in rows_of:
            raise CompressError(f"a block asks for the rows of {name!r}, which results/rows does not hold")
        return f"{opening}\n{makers[kind](name)}\n{closing}"

    return BLOCK.sub(fill, text)


def headline(rows: Sequence[Row]) -> str:
    """For each baseline its methods at equal bytes."""
    return "\n".join(ways_table(group) for group in comparable(told_apart(rows)))


def every_row(rows: Sequence[Row], name: str) -> str:
    """A GitHub table of the columns in SHOWN: the largest files first, of files of one size the least lost."""
    whole = table_of(sum(blocks(told_apart(rows)), []), name, name)
    kept = [i for i, column in enumerate(whole.columns) if column.header in SHOWN]
    lines = [type(line)(line.kind, [line.cells[i] for i in kept]) for line in whole.lines]
    return markdown(Table(whole.caption, whole.stem, [whole.columns[i] for i in kept], lines))


def paper_lines(papers: Sequence[Mapping[str, Any]]) -> str:
    """One line a paper: what it prints beside ours for the rows that stand for it, what came of all its numbers, what
    it needs, where its rows are."""
    out = ("| method | paper | printed → ours | accuracies: reached, not, cannot tell | counted numbers | data | rows |"
           "\n| --- | --- | --- | --- | --- | --- | --- |\n")
    for one in papers:
        kinds = [(counts[REACHED], counts[NOT_REACHED] + counts[MISSING], counts[CANNOT_TELL])
                 for counts in (one["counts"][kind] for kind in (ACCURACY, COUNTED))]
        found = " | ".join(", ".join(map(str, kind)) if any(kind) else "—" for kind in kinds)
        rows = ", ".join(f"{n} in [{name}](results/rows/{name})" for name, n in one["tables"].items())
        cited = f"[{in_markdown(one['who'])}]({one['link']})" if one["link"] else in_markdown(one["who"])
        out += f"| [{in_markdown(one['name'])}]({one['code']}) | {cited} | {in_markdown(beside(one['first']))} | "
        out += f"{found} | {one['data']} | {rows if rows else 'none yet'} |\n"
    return out


def beside(first: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """What is printed for each row beside ours: matched: error 1.58 → 1.42 reached, P+Q+H 40.0x → 41.1x reached."""
    texts = [f"{row}: " + ", ".join(f"{line['short']} {line['printed']} → {line['ours']} {line['verdict']}"
                                    for line in lines) for row, lines in first.items()]
    return "; ".join(texts) if texts else "—"


def claim_lines(found: Sequence[Mapping[str, Any]]) -> str:
    """One line a claim: the answer, the changes of its pairs, those that cannot be told from 0 in brackets, with the
    ratio of the bytes where they are not equal, and what they were measured on; then the notes. Claims whose rows are
    missing are counted.
    """
    out = "| claim | answer | changes in points of top-1 | on |\n| --- | --- | --- | --- |\n"
    open_ones = [one for one in found if one["verdict"] == claims.MISSING]
    answered = [one for one in found if one not in open_ones]
    for one in answered:
        there = [line for line in one["lines"] if line["verdict"] not in claims.SILENT]
        answer = f"{one['verdict']} ({one['pairs']})" if one["pairs"] else one["verdict"]
        on = "; ".join(dict.fromkeys(line["on"] for line in there))
        out += f"| {in_markdown(one['text'])} | {answer} | {in_markdown(changes(there))} | {in_markdown(on)} |\n"
    notes = "".join(f"- {in_markdown(one['text'])}: {in_markdown(one['note'])}\n" for one in answered if one["note"])
    waiting = f"\n{len(open_ones)} more claim{'s' * (len(open_ones) > 1)} without rows yet.\n" if open_ones else ""
    return out + (f"\n{notes}" if notes else "") + waiting


def changes(lines: Sequence[Mapping[str, str]]) -> str:
    """The changes of a claim's pairs; by method, the first words of the better rows, where there are several. Names
    that list settings ("order: ...") name none."""
    groups: dict[str, list[str]] = {}
    for line in lines:
        told = line["change"] if line["verdict"] in (claims.YES, claims.NO) else f"({line['change']})"
        unequal = f" at {line['unequal']}x bytes" if line["unequal"] else ""
        name = line["better"].split(", ")[0]
        groups.setdefault("" if ":" in name else name, []).append(told + unequal)
    texts = {name: ", ".join(found) for name, found in groups.items()}
    return "; ".join(texts.values() if len(texts) == 1 else (f"{name} {text}" for name, text in texts.items()))


def baseline_lines(trained: Sequence[Mapping[str, Any]]) -> str:
    """A GitHub table of trained networks, from the provenance in their files."""
    lines = "".join(
        f"| {one['task']} | {one['network']} | {one['test_top1']:.2f} | {one['held_out_top1']:.2f} | "
        f"{one['setup']['recipe']['epochs']} | {one['seed']} | {one['commit'][:7]} |\n" for one in trained)
    return ("| task | network | test top-1 | held-out top-1 | epochs | seed | commit |\n"
            "| --- | --- | ---: | ---: | ---: | ---: | --- |\n" + lines)
