"""Long computations from the command line: progress bars, and state on disk that a `--resume` continues from."""

import hashlib
import io
import json
import pickle
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from methods.core.errors import CompressError
from methods.core.file.container import write_file

QUIET_SECONDS = 30.0  # between progress lines where the output is no terminal


class Screen:
    """Progress on stderr: bars with the remaining time on a terminal, else a line now and then."""

    def __init__(self):
        self.console = Console(stderr=True)
        self.progress = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[metrics]}"),
            console=self.console, disable=not self.console.is_terminal)
        self.bars: dict[str, int] = {}
        self.last = 0.0

    def __enter__(self):
        self.progress.start()
        return self

    def __exit__(self, *error):
        self.progress.stop()

    def say(self, line: str) -> None:
        """A line of its own."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def update(self, label: str, step: int, total: int, metrics: Mapping[str, float]) -> None:
        text = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        if self.console.is_terminal:
            if label not in self.bars:
                self.bars[label] = self.progress.add_task(label, total=total, metrics="")
            self.progress.update(self.bars[label], completed=step, total=total, metrics=text)
        elif time.monotonic() - self.last > QUIET_SECONDS or step == total:
            self.last = time.monotonic()
            sys.stderr.write(f"{label}: {step}/{total}  {text}\n")
            sys.stderr.flush()


@dataclass
class Clock:
    """Seconds that a computation took; `earlier` are those before its last interruption."""

    earlier: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def seconds(self) -> float:
        return self.earlier + time.perf_counter() - self.started


class DiskRun:
    """A `Run` whose states are files under `folder` and whose reports go to `screen`."""

    def __init__(self, folder: Path, label: str, screen: Screen, *, resume: bool, clock: Clock | None = None):
        if not resume and folder.exists():
            shutil.rmtree(folder)
        self.folder, self.label, self.screen = folder, label, screen
        self.clock = Clock() if clock is None else clock

    def report(self, step, total, **metrics):
        self.screen.update(self.label, step, total, metrics)

    def save(self, state):
        written = io.BytesIO()
        torch.save({"state": state, "seconds": self.clock.seconds()}, written)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_file(self.folder / "state.pt", written.getbuffer())

    def load(self):
        path = self.folder / "state.pt"
        if not path.exists():
            return None
        try:
            saved = torch.load(path, weights_only=True, map_location="cpu")
            state, seconds = saved["state"], saved["seconds"]
        except (RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError):
            raise CompressError(f"the saved state {path} is damaged: start again without --resume") from None
        self.clock.earlier = max(self.clock.earlier, seconds)
        return state

    def stage(self, name):
        return DiskRun(self.folder / name.replace("/", "_"), f"{self.label}: {name}", self.screen, resume=True,
                       clock=self.clock)

    def forget(self) -> None:
        """The computation is over: its states are no longer needed."""
        shutil.rmtree(self.folder, ignore_errors=True)


def run_key(facts: Mapping[str, Any]) -> str:
    """A name for a computation that depends on all that determines its result."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
