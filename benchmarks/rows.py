"""Result rows: one JSON file each, results/rows/TABLE/STEM.json, whole or not there at all.

A row is found by what it is (name, network, seed, checkpoint), so that no two rows share a file, and processes on one
machine or many can write at once. A row that takes the place of another job's moves that one to TABLE/superseded.
"""

import hashlib
import json
import os
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from methods.core.errors import CompressError
from methods.core.file.container import write_file

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
SCHEMA = 2  # 1 was a line of a JSONL file
SUPERSEDED = "superseded"
DIGITS = 8  # of a digest in the name of a file
LARGEST = 2.0**63  # numbers beyond are no measurement

Number = (int, float)
FORM: dict[str, Any] = {  # what every row has; a dict is a table with at least these keys
    "schema": int, "table": str, "order": int, "job": (str, type(None)), "name": str, "method": str, "task": str,
    "network": str, "seed": int, "top1_float": Number, "top1_integer": Number, "baseline_top1": Number, "n_test": int,
    "bytes": int, "float32_bytes": int, "bytes_split": {}, "accounting": {"bits": {}, "ratios": {}},
    "cost": {"macs": Number, "bops": Number, "sparse_bops": Number, "density": Number, "mean_bits": Number},
    "layers": {}, "difficulty": {"data": str, "knobs": int, "lines": int, "cpu_seconds": (*Number, type(None))},
    "paper": {}, "notes": {}, "checkpoint": {"digest": str, "source": str}}


@dataclass(frozen=True, eq=False)
class Row(Mapping[str, Any]):
    """A result, as JSON values with at least the keys of `FORM`; CompressError names the first fault.

    order      position in its table;  job  key of the computation (`runs.run_key`)
    paper      the printed numbers;    notes  what the method noted while it ran
    """

    values: Mapping[str, Any]

    def __post_init__(self):
        fault = _fault(self.values, FORM, "") or _unusual(self.values, "")
        if fault is None and self.values["schema"] != SCHEMA:
            fault = f"is of schema {self.values['schema']}; read here is {SCHEMA}"
        if fault is not None:
            raise CompressError(f"not a row: it {fault}")

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def __len__(self) -> int:
        return len(self.values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Row) and self.values == other.values

    __hash__ = None

    def changed(self, **values: Any) -> "Row":
        """The row with other values."""
        return Row({**self.values, **values})

    @property
    def stem(self) -> str:
        """Of its file and of its model's file."""
        return stem(self["name"], self["network"], self["seed"], self["checkpoint"]["digest"])

    @property
    def clean(self) -> bool:
        """Made by one commit without changes, from a baseline of which the same is known or that is foreign."""
        measured = self.get("measured_by", (None, False))  # a commit, and whether anything differed from it
        return (self.get("dirty") is False and not self.get("mixed") and not self["checkpoint"].get("dirty")
                and measured[1] is False)


def stem(name: str, network: str, seed: int, checkpoint: str) -> str:
    """Of the files of a row: its name, its network, a seed other than 0, and the checkpoint it starts from."""
    parts = (slug(name), slug(network), f"seed{seed}" if seed else "", checkpoint[:DIGITS])
    return "-".join(part for part in parts if part)


def slug(name: str) -> str:
    """`name` in lower case, its words of letters and digits joined by dashes."""
    return "-".join("".join(letter if letter.isalnum() else " " for letter in name.lower()).split())


def _fault(values: Any, form: Any, where: str) -> str | None:
    """The first thing that `values` lacks, or has of another type than `form` says."""
    if not isinstance(form, dict):
        good = isinstance(values, form) and not isinstance(values, bool)
        return None if good else f"has {where} = {shortened(values)}"
    if not isinstance(values, Mapping):
        return f"has {where} = {shortened(values)}, no table" if where else "is no JSON object"
    lacking = sorted(set(form) - set(values))
    if lacking:
        return f"lacks {', '.join(f'{where}.{key}'.lstrip('.') for key in lacking)}"
    found = (_fault(values[key], form[key], f"{where}.{key}".lstrip(".")) for key in form)
    return next((fault for fault in found if fault is not None), None)


def _unusual(value: Any, where: str) -> str | None:
    """The first number that no report can show, or text that no file can hold."""
    if isinstance(value, Mapping):
        found = (_unusual(key, where) or _unusual(item, f"{where}.{key}".lstrip(".")) for key, item in value.items())
        return next((fault for fault in found if fault is not None), None)
    if isinstance(value, (list, tuple)):
        return next((fault for fault in (_unusual(item, where) for item in value) if fault is not None), None)
    if isinstance(value, Number) and not abs(value) < LARGEST:  # nan is not, either
        return f"has {where} = {shortened(value)}"
    if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        return f"has half a letter (a lone surrogate) in {where or 'a key'}"
    return None


def shortened(value: Any) -> str:
    """`repr(value)` for an error message: at most a line, whatever it is."""
    text = repr(value) if not isinstance(value, int) or abs(value) < LARGEST else "a number beyond 2^63"
    return text if len(text) <= 80 else f"{text[:77]}..."


def visible(text: str) -> str:
    """`text` without what a terminal would obey: control characters and marks of direction as their escapes."""
    return "".join(letter if unicodedata.category(letter) not in ("Cc", "Cf", "Cs") or letter in "\n\t\u200d" else
                   letter.encode("unicode_escape").decode() for letter in text)


# --- files -------------------------------------------------------------------------------------------------


def write_row(folder: Path, row: Row) -> Path:
    """The row as folder/STEM.json, in one step; CompressError where that fails, and then nothing has changed.

    What is there of another job or of other settings, or cannot be read, goes to folder/superseded first.
    """
    path = folder / f"{row.stem}.json"
    try:
        lines = [f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in row.items()]
    except (TypeError, ValueError) as error:
        raise CompressError(f"the row for {path} holds a value that is not JSON: {error}") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before = path.read_bytes() if path.exists() else None
    except OSError as error:
        raise CompressError(f"the row {path} cannot be written: {error.strerror}") from error
    if before is not None:
        _set_aside(path, before, row)
    write_file(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())  # unsorted: layers stay in the network's order
    return path


def _set_aside(path: Path, data: bytes, row: Row) -> None:
    """Keep the row at `path` under another name, if it is of another job than `row`, or of other settings: a default
    may have changed in between."""
    try:
        old = read_row(path)
        name = str(old["job"])[:DIGITS]
        if old["job"] == row["job"]:
            if old.get("config") == row.get("config"):  # the oldest have none
                return
            name += f"-{hashlib.sha256(data).hexdigest()[:DIGITS]}"
    except CompressError:
        name = "unreadable"
    aside = path.parent / SUPERSEDED / f"{path.stem}-{name}.json"
    aside.parent.mkdir(exist_ok=True)
    write_file(aside, data)


def read_row(path: Path) -> Row:
    """The row in a file; CompressError, naming the file, for anything else."""
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise CompressError(f"cannot read the row {path}: {error.strerror}") from None
    except RecursionError:
        raise CompressError(f"{path} is not a row: it nests too deep") from None
    except ValueError as error:  # malformed, not UTF-8, or a number of thousands of digits
        raise CompressError(f"{path} is not a row: {str(error).split(';')[0]}") from None
    try:
        return Row(values)
    except CompressError as error:
        raise CompressError(f"{path} is {error}") from None


def read_rows(folder: Path, say: Callable[[str], None]) -> list[Row]:
    """The rows of a table in their order. What is no row is left where it is, said, and does not stop the others."""
    if not folder.is_dir():
        raise CompressError(f"there are no rows {folder}: it is no folder")
    rows = []
    for path in sorted(folder.glob("[!.]*.json")):
        try:
            rows.append(read_row(path))
        except CompressError as error:
            say(f"set aside: {error}")
    return sorted(rows, key=lambda row: row["order"])


def finished(folder: Path, name: str, key: str) -> Row | None:
    """The row called `name` (a stem) if it is there and of the job with this key."""
    path = folder / f"{name}.json"
    try:
        row = read_row(path) if os.path.lexists(path) else None
    except CompressError:
        return None
    return row if row is not None and row["job"] == key else None


def tables(results: Path) -> list[Path]:
    """The folders of all tables that have rows."""
    return sorted(path for path in (results / "rows").glob("[!.]*") if path.is_dir())
