"""Claims of the field, each put to the rows: yes, no, or chance does not let anyone tell.

A claim names pairs of rows, measured on the same test inputs: the one that should be better, and the other. A pair is
judged by the change in integer top-1, over the seeds that both rows have (`chance.changed`), once for each network,
baseline and data set. Better is what is better in a file no larger, worse what is worse in one no smaller, within 5 %;
a claim that does not speak of sizes says so (`any_size`). Of several pairs those tell something that do so together:
the more there are, the surer each has to be (Holm), so that chance alone answers 5 of 100 claims and not every third.
With one seed the noise of training is in no interval: an answer that rests on such pairs of rows that train says "on
one seed".

A claim holds where a pair is better and none is worse, fails where one is worse and none is better. One that says
"best" or "every" (`all`) holds where every pair is better, each by its own 95 %, and fails where one is worse.

paper_configs/claims.toml lists them:

    [[claim]]
    text = "Learned masks beat fixed ones at equal bytes"
    table = "equal_bytes_resnet18"
    pairs = [["ADMM, 40x", "prune then quantize, 40x"]]
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from methods.core.errors import ConfigError

from ..chance import Change, changed, holm, unpack
from ..jobs import CONFIGS
from ..settings import build, read_toml

Row = Mapping[str, Any]
RowsOf = Mapping[str, Sequence[Row]]
PATH = CONFIGS / "claims.toml"
YES, NO, MIXED, CANNOT_TELL, MISSING = "yes", "no", "sometimes", "cannot tell", "missing"
UNLIKE = "not comparable"  # both rows are there, from other baselines, seeds or test sets, or without their answers
SILENT = {MISSING, UNLIKE}
EQUAL = 0.05  # files whose bytes differ by more than this share are not equal, and shown with their ratio


@dataclass(frozen=True)
class Claim:
    """text  what is claimed;  table  where the rows are;  pairs  (row that should be better, the other);  note
    all       every pair has to be better
    any_size  files need not be equally large"""

    text: str
    table: str
    pairs: tuple[tuple[str, str], ...]
    note: str = ""
    all: bool = False
    any_size: bool = False

    def __post_init__(self):
        if not self.text or not self.pairs:
            raise ConfigError(f"claim {self.text!r}: needed are a text and pairs of rows")


@dataclass(frozen=True)
class Found:
    """A pair of rows.

    change   in points of integer top-1; None where the pair says nothing
    ratio    bytes of the first over those of the second, of the seed where they differ most
    seeds    that the rows have, together;  trained  whether one of the two is of a method that trains
    task, n_test  what was tested on, and how many inputs
    verdict  MISSING or UNLIKE without a change, else YES, NO or CANNOT_TELL
    """

    better: str
    than: str
    network: str | None = None
    verdict: str = MISSING
    change: Change | None = None
    ratio: float = 1.0
    seeds: int = 0
    trained: bool = True
    task: str | None = None
    n_test: int | None = None


def read_claims(path: Path = PATH) -> list[Claim]:
    """The claims of a file; ConfigError for an unknown key or a claim without pairs."""
    content = read_toml(path)
    entries = content.get("claim", [])
    if set(content) - {"claim"} or not isinstance(entries, list) or not all(isinstance(x, Mapping) for x in entries):
        raise ConfigError(f"{path.name}: allowed are tables under [[claim]]")
    return [build(Claim, entry, f"{path.name} claim {i}: ") for i, entry in enumerate(entries, 1)]


def put_to(claim: Claim, rows_of: RowsOf) -> list[Found]:
    """Its pairs, in order, as the rows have them; a pair of several networks, baselines or data sets once for each."""
    found: list[Found] = []
    rows = rows_of.get(claim.table, [])
    for better, than in claim.pairs:
        mine, others = ([row for row in rows if row["name"] == name] for name in (better, than))
        networks = list(dict.fromkeys(row["network"] for row in [*mine, *others]))
        for network in networks:
            found += _paired(better, than, network, *([row for row in both if row["network"] == network]
                                                      for both in (mine, others)))
        if not networks:
            found.append(Found(better, than))
    return _told(claim, found)


def _paired(better: str, than: str, network: str, mine: Sequence[Row], others: Sequence[Row]) -> list[Found]:
    """Of the rows of two names on one network: those that start from one network and were tested on the same. A start
    or a test that only one of the names has is UNLIKE; once, where they share none."""
    if not mine or not others:
        return [Found(better, than, network)]
    grounds = list(dict.fromkeys(map(_ground, [*mine, *others])))
    found = [_changed(better, than, *({row["seed"]: row for row in rows if _ground(row) == ground and "right" in row}
                                      for rows in (mine, others))) for ground in grounds]
    kept = [Found(better, than, network, UNLIKE) if one is None else one for one in found]
    return kept if any(found) else kept[:1]


def _ground(row: Row) -> tuple[str, str, int]:
    return row["checkpoint"]["digest"], row["data"], row["n_test"]


def _changed(better: str, than: str, mine: Mapping[int, Row], others: Mapping[int, Row]) -> Found | None:
    """Of rows by seed, those that both have; None where they share none. The verdict is that of `_told`."""
    shared = sorted(set(mine) & set(others))
    if not shared:
        return None
    before, after = (torch.stack([unpack(rows[seed]["right"]["integer"], rows[seed]["n_test"]) for seed in shared])
                     for rows in (others, mine))
    ratio = max((mine[seed]["bytes"] / others[seed]["bytes"] for seed in shared), key=lambda x: abs(math.log(x)))
    first, trained = mine[shared[0]], any(rows[shared[0]]["difficulty"]["data"] == "train" for rows in (mine, others))
    return Found(better, than, first["network"], CANNOT_TELL, changed(before, after), ratio, len({*mine, *others}),
                 trained, first["task"], first["n_test"])


def _told(claim: Claim, found: Sequence[Found]) -> list[Found]:
    """`found` with the verdicts: by Holm over all pairs; YES of a claim of all of them by each pair's own interval."""
    there = [one for one in found if one.change is not None]
    sure = dict(zip(map(id, there), holm([one.change.p for one in there]), strict=True))

    def judge(one: Found) -> Found:
        if one.change is None:
            return one
        up, larger, smaller = one.change.middle > 0, one.ratio > 1 + EQUAL, one.ratio < 1 - EQUAL
        told = one.change.p <= 0.05 if claim.all and up else sure[id(one)]
        unfair = not claim.any_size and (larger if up else smaller)
        return replace(one, verdict=CANNOT_TELL if not told or unfair else YES if up else NO)

    return [judge(one) for one in found]


def verdict(found: Sequence[Found], every: bool = False) -> str:
    """Of a claim, over its pairs; those that are missing or not comparable, or no pairs, say nothing unless all are.
    `every`: of one that says so of all of them, and then a pair that is missing is one that is not told."""
    said = {one.verdict for one in found} - SILENT
    if not said:
        return UNLIKE if found and all(one.verdict == UNLIKE for one in found) else MISSING
    if every:
        return NO if NO in said else YES if all(one.verdict == YES for one in found) else CANNOT_TELL
    return MIXED if {YES, NO} <= said else YES if YES in said else NO if NO in said else CANNOT_TELL


def lines_of(found: Sequence[Found]) -> list[dict[str, str]]:
    """What is shown of every pair, as text: bytes are those of the first over those of the second; "unequal" is that
    ratio again, where it is no equal bytes; "on" is what was tested on."""
    lines = []
    for one in found:
        shown = {"better": one.better, "than": one.than, "network": one.network or "", "verdict": one.verdict}
        if one.change is None:
            shown |= {"change": "—", "interval": "", "bytes": "", "seeds": "", "unequal": "", "on": ""}
        else:
            low, high = one.change.interval()
            seeds = seeds_of(one)
            shown |= {"change": f"{one.change.change:+.2f}", "interval": f"{low:+.2f} to {high:+.2f}",
                      "bytes": f"{one.ratio:.2f}", "seeds": seeds,
                      "unequal": "" if abs(one.ratio - 1) <= EQUAL else f"{one.ratio:.2f}",
                      "on": f"{one.task}, {one.network}, {one.n_test:,} inputs, {seeds}"}
        lines.append(shown)
    return lines


def seeds_of(one: Found) -> str:
    """How many seeds a pair has: those that both rows have, of those that there are."""
    shared = one.change.seeds
    whole = f"{shared} seed{'s' if shared > 1 else ''}"
    return whole if shared == one.seeds else f"{whole} of {one.seeds}"


def told_of(found: Sequence[Found]) -> str:
    """What is to be known beside an answer: that it rests on one seed, how many pairs say something, and how many are
    missing or not comparable; empty where all say something, of several seeds, or none is there."""
    there = [one for one in found if one.verdict not in SILENT]
    told = [one for one in there if one.verdict in (YES, NO)]
    unlike = sum(one.verdict == UNLIKE for one in found)
    if not there:
        return ""
    said = ["on one seed"] * any(one.trained and one.change.seeds == 1 for one in told)
    said += [f"told in {len(told)} of {len(there)} pairs"] * (0 < len(told) < len(there))
    said += [f"{len(there) + unlike} of {len(found)} pairs have rows"] * (len(there) + unlike < len(found))
    said += [f"{unlike} not comparable"] * (unlike > 0)
    return ", ".join(said)


def in_words(rows_of: RowsOf, path: Path = PATH) -> list[dict[str, Any]]:
    """Every claim for a page: {"text", "note", "table", "there" (it has rows), "verdict", "pairs", "lines"}."""
    out = []
    for claim in read_claims(path):
        found = put_to(claim, rows_of)
        out.append({"text": claim.text, "note": claim.note, "table": claim.table,
                    "there": bool(rows_of.get(claim.table)), "verdict": verdict(found, claim.all),
                    "pairs": told_of(found), "lines": lines_of(found)})
    return out
