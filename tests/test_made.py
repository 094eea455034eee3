"""Files that wait for their measuring: made once, found by the run that resumes, made anew where they are damaged."""

import json
import os
import time
from dataclasses import replace

import pytest
import torch

from benchmarks import execute, made
from benchmarks.baselines import Baseline
from benchmarks.data import open_dataset
from benchmarks.execute import Place, Start, run_job
from benchmarks.jobs import Job, prepare
from benchmarks.networks import build
from benchmarks.runs import Screen, clean_up, jobs_done, state_name

ONE = Job("one", "prune_then_quantize", "digits", "resnet18w2", {"density": 0.5, "bits": 8})
TRAINED = replace(ONE, name="trained", config={"retrain": {"epochs": 1, "lr": 0.05}})


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(job, **place) -> row; run.makings counts how often files were made."""
    baseline, counted = Baseline(build("resnet18w2", 10, 1).eval(), "0" * 16, "source", {}), []
    monkeypatch.setattr(execute, "make", lambda *given, _f=execute.make: counted.append(1) or _f(*given))

    def run(job=ONE, table="own", **place):
        there = Place(tmp_path, torch.device("cpu"), Screen(bars=False), **place)
        return run_job(job, open_dataset("digits"), Start(baseline, torch.arange(360) % 2 == 0, 50.0), there, table)

    run.makings = counted
    return run


def without_seconds(row):
    return {key: value for key, value in row.items() if key != "difficulty"}


def test_a_file_made_apart_gives_the_row_of_one_run(run, tmp_path):
    whole = run(TRAINED, table="whole")
    assert run(TRAINED, measure=False) is None and not (tmp_path / "models" / "own").exists()
    (folder,) = (tmp_path / "runs").iterdir()
    assert {path.name for path in folder.iterdir()} == {made.FILE, made.FACTS}
    row = run(TRAINED, resume=True)
    assert len(run.makings) == 2 and not list((tmp_path / "runs").glob("*"))
    assert {**without_seconds(row), "table": "whole", "file": whole["file"]} == without_seconds(whole)
    assert row["difficulty"].keys() == whole["difficulty"].keys()
    assert (tmp_path / "models" / row["file"]).read_bytes() == (tmp_path / "models" / whole["file"]).read_bytes()


def test_what_is_printed_beside_a_row_is_that_of_its_measuring(run):
    run(measure=False)
    row = run(replace(ONE, note="later", paper={"error_float": 2.0}), resume=True)
    assert (row["note"], row["paper"]) == ("later", {"error_float": 2.0}) and len(run.makings) == 1


def test_without_resume_the_file_is_made_again(run):
    run(measure=False)
    run()
    assert len(run.makings) == 2


@pytest.mark.parametrize("spoil", [lambda folder: (folder / made.FILE).write_bytes(b"x"),
                                   lambda folder: (folder / made.FILE).unlink(),
                                   lambda folder: (folder / made.FACTS).write_text("{}"),
                                   lambda folder: (folder / made.FACTS).write_text("[")])
def test_a_damaged_file_is_made_again(run, tmp_path, spoil):
    run(measure=False)
    (folder,) = [path for path in (tmp_path / "runs").iterdir() if path.is_dir()]
    spoil(folder)
    assert run(resume=True)["name"] == "one" and len(run.makings) == 2


def test_the_row_says_what_the_file_was_made_with(run, monkeypatch):
    monkeypatch.setattr(execute, "surroundings", lambda: {"torch": "other", "gpu": "one"})
    run(measure=False)
    monkeypatch.undo()
    row = run(resume=True)
    assert row["made_with"] == {"torch": "other", "gpu": "one"} and row["torch"] == torch.__version__


def test_the_code_of_both_parts_counts(run, monkeypatch):
    monkeypatch.setattr("benchmarks.runs.origin", lambda: ("a" * 40, True))
    run(measure=False)
    monkeypatch.setattr(execute, "origin", lambda: ("b" * 40, False))
    row = run(resume=True)
    assert row["dirty"] is True and row["mixed"] is True and row["commit"] == "b" * 40


def test_a_file_made_anew_beside_an_old_row_is_measured_and_not_thrown_away(run, tmp_path):
    """A row of this very job is there; its file is made again, here or elsewhere: the row is to be of that."""
    run()
    (row,) = (tmp_path / "rows" / "own").glob("*.json")
    before = row.stat().st_mtime_ns
    run(measure=False)
    clean_up(tmp_path, jobs_done(tmp_path), Screen(bars=False))
    run(resume=True)
    assert len(run.makings) == 2 and row.stat().st_mtime_ns > before and not list((tmp_path / "runs").glob("*"))
    run(resume=True)
    assert len(run.makings) == 2


def test_a_file_that_waits_outlives_a_row_that_looks_younger(run, tmp_path):
    """Copies keep the times of files, and a checkout gives rows that of the day."""
    run()
    (row,) = (tmp_path / "rows" / "own").glob("*.json")
    before = row.stat().st_mtime_ns
    run(measure=False)
    for path in (tmp_path / "runs").glob("*/*"):
        os.utime(path, (row.stat().st_mtime - 3600,) * 2)
    clean_up(tmp_path, jobs_done(tmp_path), Screen(bars=False))
    run(resume=True)
    assert len(run.makings) == 2 and row.stat().st_mtime_ns > before


def test_states_of_other_settings_outlive_the_row(run, tmp_path):
    """The row is from before a default changed: the states beside it are of the job as it is today."""
    row = run()
    _, _, config = prepare(ONE)
    folders = {scope: tmp_path / "runs" / state_name(row["job"], replace(config, scope=scope))
               for scope in ("local", "global")}
    for folder in folders.values():
        folder.mkdir(parents=True)
        (folder / "state.pt").write_bytes(b"x")
        os.utime(folder / "state.pt", (time.time() - 86_400,) * 2)
    clean_up(tmp_path, jobs_done(tmp_path), Screen(bars=False))
    assert config.scope == "local" and not folders["local"].exists() and folders["global"].exists()


def test_a_row_of_other_settings_is_not_this_jobs(run, tmp_path):
    """The row is from when a default was another one: the job says nothing of it, so that its key is the same."""
    run()
    (path,) = (tmp_path / "rows" / "own").glob("*.json")
    values = json.loads(path.read_text())
    assert values["config"]["scope"] == "local"
    path.write_text(json.dumps(values | {"config": values["config"] | {"scope": "global"}}))
    row = run(resume=True)
    assert len(run.makings) == 2 and row["config"]["scope"] == "local"
    (old,) = (tmp_path / "rows" / "own" / "superseded").glob("*.json")
    assert json.loads(old.read_text())["config"]["scope"] == "global"


def test_a_state_of_other_settings_is_not_continued(run, tmp_path, monkeypatch):
    run(measure=False)
    whole = execute.prepare
    monkeypatch.setattr(execute, "prepare", lambda job: (*whole(job)[:2], replace(whole(job)[2], scope="global")))
    row = run(resume=True)
    assert len(run.makings) == 2 and row["config"]["scope"] == "global"
