"""Where a number came from: commit, changes, versions, processor; and all of it that worked on one result."""

import os
import platform
import subprocess
from collections.abc import Sequence
from typing import Any

import numpy
import torch

from .rows import ROOT

Origin = tuple[str | None, bool | None]  # commit, and whether anything outside results/ differed from it


def provenance() -> dict[str, Any]:
    """Commit, dirty flag, versions, threads, processor, now."""
    commit, dirty = origin()
    return {"commit": commit, "dirty": dirty, **surroundings()}


def surroundings() -> dict[str, Any]:
    return {
        "threads": torch.get_num_threads(), "torch": torch.__version__, "numpy": numpy.__version__,
        "python": platform.python_version(), "cpu": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def origin() -> Origin:
    """The code as it is now.

    In a copy without git (a container, a cluster job) $JOINTCOMPRESS_COMMIT, which whoever made the copy sets
    from a clean tree, stands in for it.
    """
    def ask(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = ask("status", "--porcelain", "--", ".", ":!results")
        return ask("rev-parse", "HEAD"), bool(changed)
    except (OSError, subprocess.CalledProcessError):
        declared = os.environ.get("JOINTCOMPRESS_COMMIT")
        return declared, None if declared is None else False


def joined(origins: Sequence[Origin]) -> dict[str, Any]:
    """What a row says of all code that worked on it; `commit` is that of the last part.

    `dirty` is true if any part's was, None if any part's is unknown; `mixed` if parts differ.
    """
    parts = list(dict.fromkeys(tuple(one) for one in origins))
    flags = [dirty for _, dirty in parts]
    return {"commit": parts[-1][0], "dirty": True if True in flags else None if None in flags else False,
            "mixed": len(parts) > 1, "made_by": [list(part) for part in parts]}
