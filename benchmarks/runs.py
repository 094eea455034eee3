"""Long computations from the command line: progress bars, and state on disk that a `--resume` continues from."""

import hashlib
import io
import json
import os
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

from .locks import tried
from .made import FILE
from .provenance import Origin, origin
from .rows import read_row, tables, visible
from .settings import plain

QUIET_SECONDS = 30.0  # between progress lines where the output is no terminal
STATES = ("state.pt", "before.pt")  # the last one, and the one before it
DIGEST = 32  # bytes before the state
DAY = 86_400
STALE_PART, STALE_STATE = 3_600, 30 * DAY  # seconds


class Screen:
    """Progress on stderr: bars with the remaining time on a terminal, else (or without `bars`) a line now and then."""

    def __init__(self, bars: bool = True):
        self.console = Console(stderr=True)
        self.shown = self.console.is_terminal and bars
        self.progress = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[metrics]}"),
            console=self.console, disable=not self.shown)
        self.bars: dict[str, int] = {}
        self.last = 0.0

    def __enter__(self):
        self.progress.start()
        return self

    def __exit__(self, *error):
        self.progress.stop()

    def say(self, line: str) -> None:
        """A line of its own."""
        self.console.print(visible(line), markup=False, highlight=False, soft_wrap=True)

    def update(self, label: str, step: int, total: int, metrics: Mapping[str, float]) -> None:
        label = visible(label)
        text = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        if self.shown:
            if label not in self.bars:
                self.bars[label] = self.progress.add_task(label, total=total, metrics="")
            self.progress.update(self.bars[label], completed=step, total=total, metrics=text)
        elif time.monotonic() - self.last > QUIET_SECONDS or step == total:
            self.last = time.monotonic()
            sys.stderr.write(f"{label}: {step}/{total}  {text}\n")
            sys.stderr.flush()


@dataclass
class Clock:
    """Seconds that a computation took, of the processor and on the wall; `earlier` are those before it was cut off."""

    earlier: tuple[float, float] = (0.0, 0.0)
    started: tuple[float, float] = field(default_factory=lambda: _now())

    def seconds(self) -> tuple[float, float]:
        parts = zip(self.earlier, _now(), self.started, strict=True)
        cpu, wall = (before + now - start for before, now, start in parts)
        return cpu, wall


def _now() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


class DiskRun:
    """A `Run` whose states are files under `folder` and whose reports go to `screen`.

    A state carries a digest, and the one before it is kept: a bad one is said, and the one before goes on.
    `clock` and `origins` (the code that worked on it, see `provenance`) are shared by all stages.
    """

    def __init__(self, folder: Path, label: str, screen: Screen, *, resume: bool, clock: Clock | None = None,
                 origins: list[Origin] | None = None):
        if not resume and folder.exists():
            shutil.rmtree(folder)
        self.folder, self.label, self.screen = folder, label, screen
        self.clock = Clock() if clock is None else clock
        self.origins = [origin()] if origins is None else origins

    def report(self, step, total, **metrics):
        self.screen.update(self.label, step, total, metrics)

    def save(self, state):
        written = io.BytesIO()
        torch.save({"state": state, "seconds": self.clock.seconds(), "origins": self.origins}, written)
        data = written.getvalue()
        self.folder.mkdir(parents=True, exist_ok=True)
        last, before = (self.folder / name for name in STATES)
        if last.exists():
            os.replace(last, before)
        write_file(last, hashlib.sha256(data).digest() + data)

    def load(self):
        paths = [path for path in (self.folder / name for name in STATES) if path.exists()]
        for path in paths:
            try:
                saved = _read_state(path)
            except CompressError as error:
                self.screen.say(f"{self.label}: {error}")
                continue
            self.clock.earlier = max(self.clock.earlier, saved["seconds"])
            earlier = [tuple(one) for one in saved["origins"]]
            self.origins[:] = dict.fromkeys([*earlier, *self.origins])
            return saved["state"]
        if paths:
            self.screen.say(f"{self.label}: no saved state is whole: this part starts again")
        return None

    def stage(self, name):
        return DiskRun(self.folder / name.replace("/", "_"), f"{self.label}: {name}", self.screen, resume=True,
                       clock=self.clock, origins=self.origins)

    def forget(self) -> None:
        """The computation is over: its states are no longer needed."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _read_state(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    if hashlib.sha256(data[DIGEST:]).digest() != data[:DIGEST]:
        raise CompressError(f"the saved state {path} is damaged")
    try:
        saved = torch.load(io.BytesIO(data[DIGEST:]), weights_only=True, map_location="cpu")
        return {key: saved[key] for key in ("state", "seconds", "origins")}
    except (RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError):
        raise CompressError(f"the saved state {path} is of another version") from None


def jobs_done(results: Path) -> dict[str, float]:
    """{name of a job's folder of states: when its row was written, in seconds of the clock}, of all rows that can be
    read."""
    done: dict[str, float] = {}
    for path in (path for folder in tables(results) for path in folder.glob("[!.]*.json")):
        try:
            row = read_row(path)
        except CompressError:
            continue
        if row["job"] is not None:
            name = state_name(row["job"], row["config"])
            done[name] = max(done.get(name, 0.0), path.stat().st_mtime)
    return done


def clean_up(results: Path, jobs_done: Mapping[str, float], screen: Screen) -> None:
    """Remove what cut-off processes left: parts of files, states of rows that are there, and states long forgotten.

    jobs_done  {name of a folder of states: time at which its row was written}: younger states are of a computation
               after it, and a file that waits for its measuring is one, whatever the clocks say (copies keep old times)
    The lock of a folder KEY or KEY.SETTINGS is called KEY.lock.
    """
    now = time.time()
    for path in results.rglob(".*.tmp"):
        if now - path.stat().st_mtime > STALE_PART:
            path.unlink(missing_ok=True)
    for path in (results / "runs").glob("*.lock"):
        with tried(path):
            pass  # a free one goes
    for folder in (path for path in (results / "runs").glob("*") if path.is_dir() and path.name != "baselines"):
        with tried(folder.with_suffix(".lock")) as held:
            if held:
                _clean(folder, now, jobs_done.get(folder.name, 0.0), screen)


def _clean(folder: Path, now: float, done: float, screen: Screen) -> None:
    files = [file.stat().st_mtime for file in folder.rglob("*") if file.is_file()]
    last = max(files, default=folder.stat().st_mtime)
    if now - last > STALE_STATE:
        screen.say(f"removed: {folder}, not continued for {STALE_STATE // DAY} days")
    if now - last > STALE_STATE or last <= done and not (folder / FILE).exists():
        shutil.rmtree(folder, ignore_errors=True)


def state_name(key: str, config: Any) -> str:
    """Of the folder with the states of the job of this key: another one where a default has changed since."""
    return f"{key}.{run_key(plain(config))[:8]}"


def run_key(facts: Mapping[str, Any]) -> str:
    """A name for a computation that depends on all that determines its result."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
