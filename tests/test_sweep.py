"""Sweeps: worker processes, one of them killed, make the rows that the plain loop makes, and none of them twice."""

import os
import signal
import threading
import time

import pytest

from benchmarks import jobs
from benchmarks.__main__ import main, parser
from benchmarks.checkpoints import write_checkpoint
from benchmarks.networks import build
from benchmarks.rows import read_rows
from benchmarks.settings import plain
from benchmarks.sweep import Outcome, attempt, executor_for, specs_of

TABLE = """
method = "prune_then_quantize"
title = "Quick rows"
[[row]]
name = "trained"
task = "digits"
network = "resnet18w2"
budget = { density = 0.5, bits = 8 }
config = { retrain = { epochs = 4, lr = 0.01 } }
[[row]]
name = "second"
task = "digits"
network = "resnet18w4"
budget = { density = 0.5, bits = 4 }
"""
SECONDS = {"cpu_seconds", "wall_seconds"}


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "quick.toml").write_text(TABLE)
    write_checkpoint(tmp_path / "start.safetensors", build("resnet18w2", 10, 1).eval().state_dict(), {})
    monkeypatch.setattr(jobs, "CONFIGS", tmp_path)
    return tmp_path


def words(place, results, *more):
    return ["sweep", str(place / "quick.toml"), "--checkpoint", str(place / "start.safetensors"), "--threads", "1",
            "--results", str(place / results), *more]


def without_seconds(rows):
    found = [dict(row) for row in rows]
    return [row | {"difficulty": {k: v for k, v in row["difficulty"].items() if k not in SECONDS}} for row in found]


def rows_in(folder):
    return read_rows(folder / "rows" / "quick", print)


def test_a_killed_worker_loses_no_row(place):
    """Each seed is a row; the worker is killed, by its pid, once it has saved a state."""
    assert main(words(place, "plain", "--seeds", "2", "--row", "trained", "--workers", "0")) == 0
    wanted = without_seconds(rows_in(place / "plain"))
    specs = specs_of(parser().parse_args(words(place, "swept", "--seeds", "2", "--row", "trained")))
    killed = []

    def kill(pids):
        states = place / "swept" / "runs"
        while not list(states.rglob("state.pt")):
            time.sleep(0.01)
        os.kill(pids[0], signal.SIGKILL)
        killed.append(pids[0])

    with executor_for(1) as executor:
        pids = list(executor.map(_pid, range(1)))
        killer = threading.Thread(target=kill, args=(pids,))
        killer.start()
        outcomes = list(executor.map(attempt, [plain(spec) for spec in specs]))
        killer.join()
        assert killed and list(executor.map(_pid, range(1))) != pids
    assert without_seconds(rows_in(place / "swept")) == wanted and len(wanted) == 2
    assert without_seconds(outcome.row for outcome in outcomes) == wanted
    assert not list((place / "swept" / "runs").rglob("*.pt"))
    assert all(spec.resume for spec in specs)


def _pid(_):
    return os.getpid()


def test_a_finished_row_is_not_run_again_and_a_bad_one_stops_no_other(place, capsys):
    command = words(place, "results", "--workers", "0")  # the checkpoint does not fit the second row's network
    assert main(command) == 1
    err = capsys.readouterr().err
    assert "quick, second, seed 0: the checkpoint does not fit" in err and "1 of 2 rows could not be made" in err
    (row,) = rows_in(place / "results")
    files = {path: path.stat().st_mtime_ns for path in (place / "results").rglob("*.j*")}
    assert main([*command, "--row", "trained"]) == 0 and "is in" in capsys.readouterr().err
    assert rows_in(place / "results") == [row]
    assert {path: path.stat().st_mtime_ns for path in (place / "results").rglob("*.j*")} == files


@pytest.mark.parametrize("more, fault", [
    (["--seeds", "0"], "--seeds 0"), (["--workers", "-1"], "--workers -1"), (["--row", "third"], "no row 'third'"),
    (["--cluster", "nonsense:0"], "--cluster nonsense:0: no Dask scheduler answers")])
def test_mistakes(place, capsys, monkeypatch, more, fault):
    monkeypatch.setattr("benchmarks.sweep.PATIENCE", 0.1)
    assert main(words(place, "results", *more)) == 1
    err = capsys.readouterr().err
    assert fault in err and err.count("\n") == 1 and not (place / "results" / "rows").exists()


def test_any_executor_will_do(monkeypatch):
    monkeypatch.setattr("benchmarks.sweep.run_one", lambda spec, session: spec)
    with executor_for(0) as executor:
        assert list(executor.map(attempt, [1, 2])) == [Outcome(1), Outcome(2)]
