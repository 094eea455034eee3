"""Claims of the field, each put to the rows: yes, no, or chance does not let anyone tell.

A claim names pairs of rows, measured on the same test inputs: the one that should be better, and the other. A pair is
judged by the change in integer top-1 and its paired 95 % interval (`chance.paired`). Where both rows have the same
seeds, or baselines, the change is the mean over these, and its error that of the mean (`chance.over_seeds`). A claim
holds where a pair is better and none is worse, fails where one is worse and none is better. One that says "best"
(`all`) holds where every pair is better, and fails where one is worse.

paper_configs/claims.toml lists them:

    [[claim]]
    text = "Learned masks beat fixed ones at equal bytes"
    table = "equal_bytes_resnet18"
    pairs = [["ADMM, 40x", "prune then quantize, 40x"]]
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from methods.core.errors import ConfigError

from ..chance import over_seeds, paired, unpack
from ..jobs import CONFIGS
from ..settings import build, read_toml

Row = Mapping[str, Any]
RowsOf = Mapping[str, Sequence[Row]]
PATH = CONFIGS / "claims.toml"
YES, NO, MIXED, CANNOT_TELL, MISSING = "yes", "no", "sometimes", "cannot tell", "missing"
UNLIKE = "not comparable"  # both rows are there, from other baselines, seeds or test sets
SILENT = {MISSING, UNLIKE}
EQUAL = 0.05  # files whose bytes differ by more than this share are shown with their ratio


@dataclass(frozen=True)
class Claim:
    """text  what is claimed;  table  where the rows are;  pairs  (row that should be better, the other);  note
    all  every pair has to be better"""

    text: str
    table: str
    pairs: tuple[tuple[str, str], ...]
    note: str = ""
    all: bool = False

    def __post_init__(self):
        if not self.text or not self.pairs:
            raise ConfigError(f"claim {self.text!r}: needed are a text and pairs of rows")


@dataclass(frozen=True)
class Found:
    """A pair of rows. change  in points of integer top-1, with its 95 % interval;  bytes  of both;  seeds  that both
    have;  task, n_test  what was tested on, and how many inputs. All but the names are None where one of the rows is
    missing, all but the network, too, where the two share neither baseline, seed nor test set."""

    better: str
    than: str
    network: str | None = None
    change: float | None = None
    low: float | None = None
    high: float | None = None
    bytes: tuple[float, float] | None = None
    seeds: int = 0
    task: str | None = None
    n_test: int | None = None

    @property
    def verdict(self) -> str:
        if self.change is None:
            return MISSING if self.network is None else UNLIKE
        return YES if self.low > 0 else NO if self.high < 0 else CANNOT_TELL


def read_claims(path: Path = PATH) -> list[Claim]:
    """The claims of a file; ConfigError for an unknown key or a claim without pairs."""
    content = read_toml(path)
    entries = content.get("claim", [])
    if set(content) - {"claim"} or not isinstance(entries, list) or not all(isinstance(x, Mapping) for x in entries):
        raise ConfigError(f"{path.name}: allowed are tables under [[claim]]")
    return [build(Claim, entry, f"{path.name} claim {i}: ") for i, entry in enumerate(entries, 1)]


def put_to(claim: Claim, rows_of: RowsOf) -> list[Found]:
    """Its pairs, in order, as the rows have them; a pair of several networks once for each."""
    found: list[Found] = []
    rows = [row for row in rows_of.get(claim.table, []) if "right" in row]  # the oldest do not say which inputs
    for better, than in claim.pairs:
        mine, others = ([row for row in rows if row["name"] == name] for name in (better, than))
        networks = [network for network in dict.fromkeys(row["network"] for row in mine)
                    if any(row["network"] == network for row in others)]
        found += [_judged(better, than, network, *({_start(row): row for row in both if row["network"] == network}
                                                   for both in (mine, others))) for network in networks]
        if not networks:
            found.append(Found(better, than))
    return found


def _start(row: Row) -> tuple[int, str]:
    return row["seed"], row["checkpoint"]["digest"]


def _judged(better: str, than: str, network: str, mine: Mapping[tuple, Row], others: Mapping[tuple, Row]) -> Found:
    """Of rows by seed and baseline: those that both have."""
    shared = [key for key in mine if key in others and mine[key]["n_test"] == others[key]["n_test"]
              and mine[key]["data"] == others[key]["data"]]
    if not shared:
        return Found(better, than, network)
    pairs = [paired(*(unpack(row["right"]["integer"], row["n_test"]) for row in (others[key], mine[key])))
             for key in shared]
    change, low, high = over_seeds([(pair.change, pair.low, pair.high) for pair in pairs])
    k = len(pairs)
    sizes = tuple(math.fsum(rows[key]["bytes"] for key in shared) / k for rows in (mine, others))
    first = mine[shared[0]]
    return Found(better, than, network, change, low, high, sizes, k, first["task"], first["n_test"])


def verdict(found: Sequence[Found], every: bool = False) -> str:
    """Of a claim, over its pairs; those that are missing, or no pairs, say nothing unless all are. `every`: of one that
    says so of all of them, and then a pair that is missing is one that is not told."""
    said = {one.verdict for one in found} - SILENT
    if not said:
        return MISSING
    if every:
        return NO if NO in said else YES if all(one.verdict == YES for one in found) else CANNOT_TELL
    return MIXED if {YES, NO} <= said else YES if YES in said else NO if NO in said else CANNOT_TELL


def lines_of(claim: Claim, found: Sequence[Found]) -> list[dict[str, str]]:
    """What is shown of every pair, as text: bytes are those of the first over those of the second; "unequal" is that
    ratio again, where it is no equal bytes; "on" is what was tested on."""
    lines = []
    for one in found:
        shown = {"better": one.better, "than": one.than, "network": one.network or "", "verdict": one.verdict}
        if one.change is None:
            shown |= {"change": "—", "interval": "", "bytes": "", "seeds": "", "unequal": "", "on": ""}
        else:
            ratio, plural = one.bytes[0] / one.bytes[1], "s" if one.seeds > 1 else ""
            shown |= {"change": f"{one.change:+.2f}", "interval": f"{one.low:+.2f} to {one.high:+.2f}",
                      "bytes": f"{ratio:.2f}", "seeds": str(one.seeds),
                      "unequal": "" if abs(ratio - 1) <= EQUAL else f"{ratio:.2f}",
                      "on": f"{one.task}, {one.network}, {one.n_test:,} inputs, {one.seeds} seed{plural}"}
        lines.append(shown)
    return lines


def told_of(found: Sequence[Found]) -> str:
    """How many pairs say something, and how many have rows; empty where that is all of them, or none."""
    there = sum(one.verdict not in SILENT for one in found)
    told = sum(one.verdict in (YES, NO) for one in found)
    return ", ".join([f"told in {told} of {there} pairs"] * (0 < told < there)
                     + [f"{there} of {len(found)} pairs have rows"] * (0 < there < len(found)))


def in_words(rows_of: RowsOf, path: Path = PATH) -> list[dict[str, Any]]:
    """Every claim for a page: {"text", "note", "table", "there" (it has rows), "verdict", "pairs", "lines"}."""
    out = []
    for claim in read_claims(path):
        found = put_to(claim, rows_of)
        out.append({"text": claim.text, "note": claim.note, "table": claim.table,
                    "there": bool(rows_of.get(claim.table)), "verdict": verdict(found, claim.all),
                    "pairs": told_of(found),
                    "lines": lines_of(claim, found)})
    return out
