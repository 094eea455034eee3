"""Files that are made but not measured yet: each lies beside what is known of its making, in the folder of its run.

Making wants a GPU, measuring a CPU: `--no-measure` stops in between, and the same command with --resume, here or
wherever results/runs was copied to, goes on from the file.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from methods.core.file.container import write_file

from .checkpoints import digest_of
from .provenance import Origin

FILE, FACTS = "made.jc", "made.json"


@dataclass(frozen=True)
class Made:
    """A compressed file at `path`, and what its row will say of how it was made.

    facts    of the row, JSON values;  origins  the code that made it;  surroundings  versions and processor there
    """

    path: Path
    facts: Mapping[str, Any]
    origins: Sequence[Origin]
    surroundings: Mapping[str, Any]


def keep(folder: Path, facts: Mapping[str, Any], origins: Sequence[Origin], surroundings: Mapping[str, Any]) -> Made:
    """Write down the facts of folder/made.jc, which is there: from now on it counts as made, and states can go."""
    path = folder / FILE
    text = json.dumps({"digest": digest_of(path), "facts": facts, "origins": origins, "surroundings": surroundings})
    write_file(folder / FACTS, text.encode())
    for state in folder.iterdir():
        if state.is_dir():
            shutil.rmtree(state)
        elif state.name not in (FILE, FACTS):
            state.unlink()
    return Made(path, facts, origins, surroundings)


def find(folder: Path) -> Made | None:
    """What `keep` wrote there, if file and facts are whole."""
    try:
        known = json.loads((folder / FACTS).read_bytes())
        whole = digest_of(folder / FILE) == known["digest"]
        origins = [(commit, dirty) for commit, dirty in known["origins"]]
        return Made(folder / FILE, known["facts"], origins, known["surroundings"]) if whole else None
    except (OSError, KeyError, TypeError, ValueError):
        return None
