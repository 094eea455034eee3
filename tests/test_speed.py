"""The measurement of speed: what it runs and says, not how fast anything is."""

import pytest
import torch

from benchmarks import speed, speed_training
from benchmarks.__main__ import main
from benchmarks.networks import build
from methods.core.train.task import Task


def test_candidates_run_in_turn(monkeypatch):
    order, clock = [], iter(range(100))
    monkeypatch.setattr(speed.time, "process_time", lambda: next(clock) ** 2)
    timings = speed.in_turn({name: lambda name=name: order.append(name) for name in ("a", "b")}, 2)
    assert order == ["a", "b"] * 3
    assert [t.seconds for t in timings] == [[9, 17], [13, 21]]
    assert [t.ratios for t in timings] == [[1, 1], [9 / 13, 17 / 21]]


def test_windows_where_codes_allow_them():
    model = build("resnet20", 10, 3).eval()
    plain = speed.eight_bit(model, torch.randn(2, 3, 8, 8))
    found = speed.with_windows(plain, model).windows
    assert "conv1" not in found and "fc" not in found and "layer1.0.conv1" in found and "layer3.2.conv2" in found


def test_the_command(capsys):
    threads = torch.get_num_threads()
    try:
        assert main(["speed", "--network", "resnet20", "--batch", "2", "--rounds", "2", "--part", "kernels"]) == 0
    finally:
        torch.set_num_threads(threads)
    out = capsys.readouterr().out
    for words in (speed.BASELINE, speed.EXACT, speed.FAST, speed.WINDOWED, "1.00 to 1.00",
                  "outputs that differ from the exact ones: 0", "CPU: "):
        assert words in out


def test_the_training_command(capsys):
    threads = torch.get_num_threads()
    try:
        words = "speed --network resnet20 --train-batch 4 --rounds 1 --part training"
        assert main(words.split()) == 0
    finally:
        torch.set_num_threads(threads)
    out = capsys.readouterr().out
    for words in (*speed_training.METHODS, "1.00 to 1.00", "270,896 weights", "knapsack of bits"):
        assert words in out


@pytest.mark.parametrize("name", speed_training.METHODS)
def test_a_step_is_that_of_its_method(name):
    """Each step trains: weights move, and the methods' own state acts on them."""
    model = build("resnet20", 10, 3)
    before = [p.detach().clone() for p in model.parameters()]
    data = torch.randn(4, 3, 32, 32), torch.arange(4)
    task = Task(None, [], channels_last=True)
    prepared, hooks = speed_training.METHODS[name](task.placed(model), data[0])
    for part, moved in ((hooks, "toward"), (prepared, "phi")):
        assert hasattr(part, moved) == (name in {"toward": ("ADMM", "ANNC"), "phi": ("Bayesian Bits",
                                                                                    "Bayesian Bits, fast")}[moved])
    gates = prepared.phi.detach().clone() if hasattr(prepared, "phi") else None
    speed_training.stepper(prepared, hooks, task, data)()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert gates is None or not torch.equal(gates, prepared.phi)
    assert ("parametrizations" in dict(model.conv1.named_children())) == (name == "CLIP-Q")


def test_mistakes(capsys):
    assert main(["speed", "--rounds", "0"]) == 1
    assert main(["speed", "--network", "resnet7"]) == 1
    assert main(["speed", "--train-batch", "0", "--part", "training"]) == 1
    assert "--rounds 0: at least 1" in capsys.readouterr().err
