"""Result rows: one JSON object a line, appended whole or not at all, with where each number came from."""

import fcntl
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch

from methods.core.errors import CompressError

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
REPORTED = {"name", "method", "task", "network", "seed", "top1_float", "top1_integer", "baseline_top1", "bytes",
            "float32_bytes", "bytes_split", "accounting", "cost", "layers", "difficulty", "paper", "checkpoint"}


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append `row` to a JSONL file. If it cannot be written in full (a full disk, say), the file is cut back
    to what it was and CompressError says so: earlier rows are never lost or damaged."""
    try:
        line = (json.dumps(row, allow_nan=False) + "\n").encode()  # unsorted: layers stay in the network's order
    except (TypeError, ValueError) as error:
        raise CompressError(f"the row for {path} holds a value that is not JSON: {error}") from error
    descriptor = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        before, complete = os.fstat(descriptor).st_size, False
        try:
            _write_whole(descriptor, line, before)
            os.fsync(descriptor)
            complete = True
        finally:  # a failed write, or Ctrl-C
            if not complete:
                os.ftruncate(descriptor, before)
    except OSError as error:
        raise CompressError(f"the row could not be appended to {path}: {error.strerror}; "
                            "earlier rows are intact; free space or choose --results DIR") from error
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _write_whole(descriptor: int, line: bytes, before: int) -> None:
    if before and os.pread(descriptor, 1, before - 1) != b"\n":
        line = b"\n" + line  # a foreign editor left the last line open: do not glue onto it
    while line:
        line = line[os.write(descriptor, line):]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a JSONL file, oldest first; CompressError names a line that is no row."""
    try:
        lines = path.read_bytes().split(b"\n")  # not splitlines: JSON text may hold what Unicode calls a line end
    except OSError as error:
        raise CompressError(f"cannot read the rows {path}: {error.strerror}") from None
    return [_row(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CompressError(f"{where}, is not a row: {error}") from None
    if not isinstance(row, dict) or not REPORTED <= set(row):
        lacks = f"lacks {', '.join(sorted(REPORTED - set(row)))}" if isinstance(row, dict) else "is no JSON object"
        raise CompressError(f"{where}, is not a row: it {lacks}")
    return row


def provenance() -> dict[str, Any]:
    """Commit, dirty flag (changes outside results/), versions, threads, processor.

    In a copy without git (a container, a cluster job) $JOINTCOMPRESS_COMMIT, which whoever made the copy sets
    from a clean tree, stands in for it.
    """
    commit, dirty = _git()
    return {
        "commit": commit, "dirty": dirty, "threads": torch.get_num_threads(), "torch": torch.__version__,
        "numpy": numpy.__version__, "python": platform.python_version(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _git() -> tuple[str | None, bool | None]:
    def ask(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = ask("status", "--porcelain", "--", ".", ":!results")
        return ask("rev-parse", "HEAD"), bool(changed)
    except (OSError, subprocess.CalledProcessError):
        declared = os.environ.get("JOINTCOMPRESS_COMMIT")
        return declared, None if declared is None else False
