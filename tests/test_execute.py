"""Rows: measured from the file that this run wrote, with all that chance and provenance say, and not made twice."""

from pathlib import Path

import pytest
import torch

from benchmarks import baselines, execute, jobs, measure
from benchmarks.baselines import Baseline
from benchmarks.chance import unpack
from benchmarks.data import open_dataset
from benchmarks.execute import Place, Start, run_job
from benchmarks.jobs import Job
from benchmarks.metrics import OF_A_LAYER, OF_A_ROW
from benchmarks.networks import build
from benchmarks.report import against_paper
from benchmarks.rows import read_rows
from methods.core.errors import BudgetError, ConfigError, GraphError
from methods.core.file.storage import decode, encode
from methods.core.graph.build import weight_layers

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits():
    return open_dataset("digits")


class Screen:
    """Keeps what it is told."""

    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)

    def update(self, label, step, total, metrics):
        pass


def job(**changes):
    return Job(**{"name": "a ü", "method": "prune_then_quantize", "task": "digits", "network": "resnet18w2",
                  "budget": {"density": 0.5, "bits": 8}, "paper": {"error_float": 1.0}} | changes)


@pytest.fixture
def run(digits, tmp_path):
    """run(job, resume) -> (row, lines said); with rows and models under tmp_path."""
    scores = {}

    def run(one, resume=False, seed=0, provenance=None):
        screen = Screen()
        name = f"{seed}" * 16
        baseline = Baseline(build("resnet18w2", 10, 1, seed=seed).eval(), name, "source", provenance or {})
        place = Place(tmp_path, CPU, screen, resume, scores)
        return run_job(one, digits, Start(baseline, torch.arange(360) % 2 == 0, 50.0), place, "own"), screen.lines

    return run


def rows_in(folder):
    return read_rows(folder / "rows" / "own", print)


def test_a_row_knows_chance(run):
    """Standard error, held-out top-1, and the pairs of the baseline, which has every second picture right."""
    row, _ = run(job())
    for kind in ("float", "integer"):
        right, pairs, share = unpack(row["right"][kind], 360), row["against_baseline"][kind], row[f"top1_{kind}"] / 100
        assert int(right.sum()) == round(3.6 * row[f"top1_{kind}"])
        assert row["standard_error"][kind] == pytest.approx(100 * (share * (1 - share) / 360) ** 0.5)
        assert pairs["change"] == pytest.approx(row[f"top1_{kind}"] - 50) and pairs["low"] < pairs["high"]
        assert (pairs["lost"], pairs["gained"]) == (int((~right[::2]).sum()), int(right[1::2].sum()))
    assert row["baseline_top1"] == 50 and row["n_test"] == 360 and 0 <= row["held_out_top1"] <= 100


def test_a_row_describes_its_file(run, tmp_path):
    row, _ = run(job())
    path = tmp_path / "models" / row["file"]
    assert row["bytes"] == path.stat().st_size == sum(row["bytes_split"].values())
    kept = sum(tensor.kept for tensor in decode(path).weights.values())
    assert row["cost"]["kept_weights"] == kept and row["cost"]["density"] == kept / row["dense_weights"]
    assert row["dense_macs"] == row["cost"]["macs"] and row["ranges_by"] == "method"
    assert rows_in(tmp_path) == [row] and row["file_digest"] == execute.digest_of(path)
    assert row["config"]["scope"] == "local" and row["budget"]["bits"] == 8
    assert not list((tmp_path / "runs").rglob("*.pt"))


@pytest.mark.parametrize("asked, multiplied, found", [
    (True, True, "bfloat16"), (True, False, "float32"), (False, True, "float32")])
def test_a_row_says_in_which_precision_it_was_trained(asked, multiplied, found, run, monkeypatch):
    """A CPU that would emulate bf16 trains in float32, whatever the setup asks for."""
    monkeypatch.setattr("benchmarks.baselines.multiplies_bf16", lambda device: multiplied)
    row, _ = run(job(setup={"autocast": asked}))
    assert row["setup"]["autocast"] == asked and row["precision"] == found


@pytest.mark.parametrize("flags, native", [
    ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, False), ({"neon": True}, True), ({}, True),
    ({"avx512_bf16": True, "amx_bf16": False}, True), ({"avx512_bf16": False, "amx_bf16": True}, True)])
def test_bf16_that_avx512_emulates_is_not_multiplied(flags, native, monkeypatch):
    """oneDNN says yes to it; of a CPU or a torch that names no such instructions its word is taken."""
    monkeypatch.setattr("benchmarks.baselines.cpu_flags", lambda: flags)
    monkeypatch.setattr("torch.ops.mkldnn._is_mkldnn_bf16_supported", lambda: True)
    assert baselines.multiplies_bf16(CPU) == native


def test_every_metric_that_a_paper_may_print_is_in_a_row(run):
    row, _ = run(job())
    lacking = [metric for metric in OF_A_ROW if against_paper.lookup(row, metric) is None]
    assert lacking == ["top1_float_bn_reestimated"]  # a row has it where it is asked for
    assert set(OF_A_LAYER) == set(row["layers"]["conv1"])


def test_the_same_weights_are_scored_once(run, monkeypatch):
    counted, whole = [], measure.right_of
    monkeypatch.setattr(measure, "right_of", lambda networks, _: counted.append(len(networks)) or whole(networks, _))
    rows = [run(job(config={"activation_bits": bits}))[0] for bits in (8, 4)]
    rows.append(run(job(budget={"density": 0.4, "bits": 8}))[0])
    assert counted[::2] == [2, 1, 2] and counted[1::2] == [1, 1, 1]  # test, then held out
    assert rows[0]["top1_float"] == rows[1]["top1_float"]


def test_widths_of_the_index_by_layer(run):
    layers = weight_layers(build("resnet18w2", 10, 1))
    widths = {name: 2 + i % 4 for i, name in enumerate(layers)}
    row, _ = run(job(index_bits=widths))
    assert {name: facts["index_bits"] for name, facts in row["layers"].items()} == widths


def test_resume_does_not_repeat_a_finished_job(run, tmp_path):
    first, _ = run(job())
    again, lines = run(job(paper={"error_float": 2.0}, note="other"), resume=True)
    assert first.changed(paper={"error_float": 2.0}, note="other") == again and "in" in lines[0]
    assert rows_in(tmp_path) == [first]
    other, _ = run(job(budget={"density": 0.4, "bits": 8}), resume=True)
    seeded, _ = run(job(seed=1), resume=True)
    assert rows_in(tmp_path) == [other, seeded]  # one of another budget takes the place of the first
    assert len(list((tmp_path / "rows" / "own" / "superseded").iterdir())) == 1
    path = tmp_path / "models" / seeded["file"]
    path.write_bytes(b"other bytes")
    assert run(job(seed=1), resume=True)[0]["file_digest"] == seeded["file_digest"] == execute.digest_of(path)


def test_another_baseline_is_another_row(run, tmp_path):
    """Its file, too: two commands at once cannot measure each other's."""
    one, two = run(job())[0], run(job(), seed=1)[0]
    assert len(rows_in(tmp_path)) == 2 and one["file"] != two["file"] and one["file_digest"] != two["file_digest"]
    assert all(execute.is_of(tmp_path / "models" / row["file"], row) for row in (one, two))


def test_what_is_measured_is_what_this_run_wrote(run, tmp_path, monkeypatch):
    """Another process writes the same row while this one measures: each row has its own bytes until the end."""
    whole, inner = execute.measure, []

    def meanwhile(path, *given, **more):
        monkeypatch.setattr(execute, "measure", whole)
        inner.append(run(job(budget={"density": 0.1, "bits": 8}))[0])
        return whole(path, *given, **more)

    monkeypatch.setattr(execute, "measure", meanwhile)
    outer = run(job())[0]
    assert outer["file"] == inner[0]["file"] and outer["file_digest"] != inner[0]["file_digest"]
    assert outer["cost"]["density"] > 0.4 and inner[0]["cost"]["density"] < 0.2
    assert rows_in(tmp_path) == [outer] and execute.is_of(tmp_path / "models" / outer["file"], outer)


def test_a_row_goes_on_from_the_states_of_another_commit(run, monkeypatch):
    config = {"retrain": {"epochs": 1, "lr": 0.01}, "aware": {"epochs": 1, "lr": 0.01}}
    method, whole = jobs.find_method("prune_then_quantize"), jobs.find_method("prune_then_quantize").compress

    def cut(model, task, budget, config, generator, *, run=None):
        whole(model, task, budget, config, generator, run=run)
        raise KeyboardInterrupt

    monkeypatch.setattr("benchmarks.runs.origin", lambda: ("first", True))
    monkeypatch.setattr(method, "compress", cut)
    with pytest.raises(KeyboardInterrupt):
        run(job(config=config))
    monkeypatch.setattr(method, "compress", whole)
    for module in ("runs", "execute"):
        monkeypatch.setattr(f"benchmarks.{module}.origin", lambda: ("second", False))
    row, _ = run(job(config=config), resume=True)
    assert (row["commit"], row["dirty"], row["mixed"]) == ("second", True, True) and not row.clean
    assert row["made_by"] == [["first", True], ["second", False]]
    assert run(job(config=config))[0].clean
    assert not run(job(config=config), provenance={"commit": "x", "dirty": True})[0].clean


def test_an_unknown_float_layer_is_refused_before_any_work(run, tmp_path):
    with pytest.raises((ConfigError, GraphError), match="float_policy names 'conv9'; resnet18w2 has: conv1, layer1"):
        run(job(float_policy=("conv9",)))
    with pytest.raises(ConfigError, match="index_bits names conv1; resnet18w2 has: conv1, layer1"):
        run(job(index_bits={"conv1": 3}))
    assert not (tmp_path / "models").exists()


def test_a_failing_method_leaves_no_row(run, tmp_path):
    with pytest.raises(BudgetError, match="cannot honour the budget field 'data_ratio'; it takes: density, bits"):
        run(job(budget={"density": 0.5, "bits": 8, "data_ratio": 0.1}))
    assert not Path(tmp_path / "rows").exists()


def test_a_damaged_file_is_never_measured(run, monkeypatch, tmp_path):
    def damaging(compressed, path, **options):
        encode(compressed, path, **options)
        path.write_bytes(path.read_bytes()[:-1])

    monkeypatch.setattr(execute, "encode", damaging)
    with pytest.raises(ValueError, match="checksum"):
        run(job())
    assert not (tmp_path / "rows").exists() and not (tmp_path / "models").exists()
    monkeypatch.undo()
    row, _ = run(job(), resume=True)
    assert row["bytes"] == (tmp_path / "models" / row["file"]).stat().st_size


def test_densities_by_one_ranking(run):
    """Not the same in each layer, but of all weights the density that was asked for; known by a key of its own."""
    even, _ = run(job())
    row, _ = run(job(name="other", densities="global"))
    shares = [layer["density"] for layer in row["layers"].values()]
    assert row["densities"] == "global" and max(shares) - min(shares) > 0.1
    assert row["cost"]["density"] == pytest.approx(0.5, abs=0.01) and row["job"] != even["job"]
    with pytest.raises(ConfigError, match="densities = 'some': allowed are uniform, global"):
        run(job(densities="some"))


def test_the_keys_of_older_jobs_are_as_they_were(digits):
    one = job()
    key = execute.job_key(one, digits, execute.setup_of(one, digits), Baseline(None, "0" * 16, "source", {}))
    assert key == "af36068ce5547e39"
