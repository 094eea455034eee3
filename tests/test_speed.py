"""The measurement of speed: what it runs and says, not how fast anything is."""

import torch

from benchmarks import speed
from benchmarks.__main__ import main
from benchmarks.networks import build


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
        assert main(["speed", "--network", "resnet20", "--batch", "2", "--rounds", "2"]) == 0
    finally:
        torch.set_num_threads(threads)
    out = capsys.readouterr().out
    for words in (speed.BASELINE, speed.EXACT, speed.FAST, speed.WINDOWED, "1.00 to 1.00",
                  "outputs that differ from the exact ones: 0", "CPU: "):
        assert words in out


def test_mistakes(capsys):
    assert main(["speed", "--rounds", "0"]) == 1
    assert main(["speed", "--network", "resnet7"]) == 1
    assert "--rounds 0: at least 1" in capsys.readouterr().err
