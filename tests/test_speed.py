"""The measurement of speed: what it runs and says, not how fast anything is."""

import math

import pytest
import torch

from benchmarks import speed, speed_training
from benchmarks.__main__ import main
from benchmarks.networks import build
from methods.core.file.storage import encode
from methods.core.fit.quantize import fit_symmetric, quantize
from methods.core.train.task import Task
from methods.engine import onednn


def test_candidates_run_in_turn(monkeypatch):
    order, clock = [], iter(range(100))
    monkeypatch.setattr(speed.time, "process_time", lambda: next(clock) ** 2)
    timings = speed.in_turn({name: lambda name=name: order.append(name) for name in ("a", "b")}, 2)
    assert order == ["a", "b"] * 3
    assert [t.seconds for t in timings] == [[9, 17], [13, 21]]
    assert [t.ratios for t in timings] == [[1, 1], [9 / 13, 17 / 21]]


def test_the_command(capsys):
    threads = torch.get_num_threads()
    try:
        assert main(["speed", "--network", "resnet20", "--batch", "2", "--rounds", "2", "--part", "kernels"]) == 0
    finally:
        torch.set_num_threads(threads)
    out = capsys.readouterr().out
    for words in (speed.BASELINE, speed.EXACT, *speed.SPARQ, "8 bits, symmetric", "8 bits, asymmetric by channel",
                  "tables of 16 bits", "1.00 to 1.00", "CPU: "):
        assert words in out
    lines = [line for line in out.splitlines() if "outputs that differ" in line]
    assert len(lines) == 7 and all("outputs that differ from the exact ones: 0" in line for line in lines)
    assert onednn.unsupported() or all("no slow node" in line for line in lines)


def test_stored_files_are_timed(tmp_path):
    """Products a MAC: 1 for symmetric weights, 2 and more for two digits."""
    threads, model = torch.get_num_threads(), build("lenet5_caffe", 10, 1).eval()
    x, paths = torch.randn(8, 1, 28, 28), {}
    for name, made in {"plain": lambda w: quantize(w, fit_symmetric(w, 8), 8), "table": speed.wide_table}.items():
        paths[name] = tmp_path / f"{name}.jc"
        encode(speed.on_grid(model, x, made), paths[name])
    try:
        found = speed.measure_speed("lenet5_caffe", list(paths.values()), 2, 1, 1)
    finally:
        torch.set_num_threads(threads)
    assert [timing.name for timing in found.timings] == [speed.BASELINE, "plain", "table"]
    if not onednn.unsupported():
        plain, table = (profile.products for profile in found.profiles.values())
        again = 128 // onednn.largest_weight(model.ip1)  # without VNNI inputs of weights of 8 bits are read twice
        assert plain == again and 2 * again <= table <= 3 * again  # and twice for the higher digit, where it is largest


def test_the_training_command(capsys):
    threads = torch.get_num_threads()
    try:
        words = "speed --network resnet20 --train-batch 4 --rounds 1 --part training"
        assert main(words.split()) == 0
    finally:
        torch.set_num_threads(threads)
    out = capsys.readouterr().out
    for words in (*speed_training.METHODS, "distilled step", "images/s", "1.00 to 1.00", "270,896 weights",
                  "knapsack of bits"):
        assert words in out


@pytest.mark.parametrize("name", speed_training.METHODS)
def test_a_step_is_that_of_its_method(name):
    """Each step trains: weights move, and the methods' own state acts on them."""
    model = build("resnet20", 10, 3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    data = torch.randn(4, 3, 32, 32), torch.arange(4)
    task = Task(None, [], channels_last=True)
    prepared, hooks = speed_training.METHODS[name](task.placed(model), data[0])
    for part, moved in ((hooks, "toward"), (prepared, "phi")):
        assert hasattr(part, moved) == (name in {"toward": ("ADMM", "ANNC"), "phi": ("Bayesian Bits",
                                                                                    "Bayesian Bits, fast")}[moved])
    gates = prepared.phi.detach().clone() if hasattr(prepared, "phi") else None
    speed_training.stepper(prepared, hooks, task, data)()
    after = {name.replace("parametrizations.weight.original", "weight"): p for name, p in model.named_parameters()}
    assert set(before) <= set(after) and all(not torch.equal(before[name], after[name]) for name in before)
    assert gates is None or not torch.equal(gates, prepared.phi)
    through = {"CLIP-Q", "QAT under masks", "LSQ under masks", "RPTQ, trained"}
    assert ("parametrizations" in dict(model.conv1.named_children())) == (name in through)
    assert ("LSQ" in name) == any(key.endswith("scale") for key in after)
    if "masks" in name:
        kept, weights = int((model.conv1.weight != 0).sum()), model.conv1.weight.numel()
        assert 0 < kept <= math.ceil(speed_training.DENSITY * weights)


def test_mistakes(capsys):
    assert main(["speed", "--rounds", "0"]) == 1
    assert main(["speed", "--network", "resnet7"]) == 1
    assert main(["speed", "--train-batch", "0", "--part", "training"]) == 1
    assert "--rounds 0: at least 1" in capsys.readouterr().err
