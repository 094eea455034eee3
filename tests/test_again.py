"""Rows measured again from their files: what an older harness did not measure comes in, and nothing else changes."""

import json
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from benchmarks import again, execute
from benchmarks.baselines import Baseline
from benchmarks.commands import reproduce
from benchmarks.data import open_dataset
from benchmarks.execute import Place, Start, run_job
from benchmarks.jobs import Job
from benchmarks.networks import build
from benchmarks.rows import Row, read_row
from benchmarks.runs import Screen
from benchmarks.specs import Session, Spec
from methods.core.errors import CompressError, ConfigError

ONE = Job("one", "prune_then_quantize", "digits", "resnet18w2", {"density": 0.5, "bits": 8}, paper={"error_float": 1.0})
YOUNGER = ("right", "against_baseline", "standard_error", "held_out_top1", "densities", "float_policy", "shrink",
           "sixteen_bit", "hardware")


@pytest.fixture
def there(tmp_path, monkeypatch):
    """(row of ONE under tmp_path, measured again: a function of a job); making anything is an error from then on."""
    baseline = Baseline(build("resnet18w2", 10, 1).eval(), "0" * 16, "source", {})
    given = (open_dataset("digits"), Start(baseline, torch.arange(360) % 2 == 0, 50.0),
             Place(tmp_path, torch.device("cpu"), Screen(bars=False)))
    row = run_job(ONE, *given, "own", 3)
    monkeypatch.setattr(execute, "make", None)
    monkeypatch.setattr(again, "origin", lambda: ("later", False))
    return row, lambda job=ONE, order=3: again.measured_again(job, *given, "own", order)


def written(tmp_path, row, lacking=(), **changes):
    path = tmp_path / "rows" / "own" / f"{row.stem}.json"
    path.write_text(json.dumps({key: value for key, value in {**row, **changes}.items() if key not in lacking}))
    return path


def test_a_row_that_comes_out_the_same_stays(there, tmp_path):
    row, measured_again = there
    path = tmp_path / "rows" / "own" / f"{row.stem}.json"
    before = path.read_bytes()
    assert measured_again() == row and path.read_bytes() == before


def test_what_an_old_row_lacks_comes_in(there, tmp_path):
    """And a number that is measured otherwise today; how the file was made stays, key for key."""
    row, measured_again = there
    path = written(tmp_path, row, YOUNGER, bytes=7, torch="1.0", notes={"old": 1}, commit="before", shrink=None)
    found = measured_again()
    assert read_row(path) == found and found["measured_by"] == ["later", False] and found["made_with"]["torch"] == "1.0"
    assert found["commit"] == "before" and found["notes"] == {"old": 1} and found["torch"] == row["torch"]
    assert found["shrink"] is False  # an old harness did not, whatever the job says today
    assert {key: found[key] for key in row if key not in ("commit", "notes", "shrink")} == {
        key: value for key, value in row.items() if key not in ("commit", "notes", "shrink")}
    assert not list((tmp_path / "rows" / "own").glob("superseded/*"))


def test_what_is_printed_and_where_the_row_stands_are_the_configurations(there):
    row, measured_again = there
    found = measured_again(replace(ONE, paper={"error_float": 2.0}, note="later"), 5)
    assert (found["paper"], found["note"], found["order"]) == ({"error_float": 2.0}, "later", 5)
    assert found["right"] == row["right"]


@pytest.mark.parametrize("job, what", [
    (replace(ONE, budget={"density": 0.4, "bits": 8}), "budget"), (replace(ONE, budget={"density": 0.5}), "budget"),
    (replace(ONE, config={"scope": "global"}), "config"), (replace(ONE, densities="global"), "densities"),
    (replace(ONE, setup={"batch_size": 7}), "setup"),
    (replace(ONE, method="quantize_then_prune"), "method")])
def test_a_row_of_other_settings_is_left(there, tmp_path, job, what):
    row, measured_again = there
    path = written(tmp_path, row, YOUNGER)
    before = path.read_bytes()
    with pytest.raises(CompressError, match=f"its row is of another {what} than the configuration"):
        measured_again(job)
    assert path.read_bytes() == before


def test_without_its_file_a_row_is_left(there, tmp_path):
    row, measured_again = there
    model = tmp_path / "models" / row["file"]
    model.write_bytes(model.read_bytes() + b"x")
    with pytest.raises(CompressError, match="is not the file that it was measured from"):
        measured_again()
    model.unlink()
    with pytest.raises(CompressError, match="no file "):
        measured_again()
    with pytest.raises(CompressError, match="cannot read the row"):
        measured_again(replace(ONE, name="two"))


@pytest.mark.parametrize("measured_by, clean", [(["a", False], True), (["a", True], False), ([None, None], False)])
def test_whoever_measured_counts(there, measured_by, clean):
    row = there[0].changed(dirty=False, mixed=False, checkpoint={"digest": "0" * 16, "source": "s"})
    assert Row({**row, "measured_by": measured_by}).clean is clean and row.clean


def test_the_command_says_what_it_leaves(tmp_path, capsys):
    """One row there, one without a file, one not there; the others are measured all the same."""
    config = tmp_path / "t.toml"
    config.write_text('method = "prune_then_quantize"\n' + "".join(
        f'[[row]]\nname = "{name}"\ntask = "digits"\nnetwork = "resnet18w16"\nbudget = {{ density = 0.5, bits = 8 }}\n'
        for name in ("a", "b", "c")))
    options = Namespace(configs=[config], row=[], network=[], seed=None, setup=[], results=tmp_path, data_dir=None,
                        device="cpu", checkpoint=None, epochs=None, resume=False, image_size=None)
    making = Namespace(**{**vars(options), "row": ["a", "b"], "config": config, "no_measure": False})
    reproduce(making, Console(width=100))
    capsys.readouterr()
    (gone,) = (tmp_path / "models" / "t").glob("b-*")
    gone.unlink()
    again.remeasure(options, Console(width=100))
    said = capsys.readouterr()
    assert "left as it is: t, b: no file" in said.err and "left as it is: t, c: no row in" in said.err
    assert "error_integer" in said.out
    with pytest.raises(CompressError, match="none of these rows is there with its file"):
        again.remeasure(Namespace(**{**vars(options), "row": ["c"]}), Console())


def test_no_baseline_is_trained(there, tmp_path):
    """A row of a network that the project ships no baseline of."""
    spec = Spec(ONE, "own", 0, "digits", str(tmp_path))
    with pytest.raises(ConfigError, match="no baseline of resnet18w2 on digits is shipped: give it as --checkpoint"):
        again.check_there(spec, Session(Screen(bars=False)))
    again.check_there(replace(spec, checkpoint="some.safetensors"), Session(Screen(bars=False)))
