"""The command: files, a picture whose lines can be told apart, resuming, and mistakes in one line."""

import json

import pytest

from benchmarks import sensitivity
from benchmarks.__main__ import main
from benchmarks.checkpoints import write_checkpoint
from benchmarks.networks import build
from methods.pipeline import Sensitivity


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    write_checkpoint(tmp_path / "start.safetensors", build("resnet18w2", 10, 1).eval().state_dict(), {})

    def run(text):
        capsys.readouterr()
        code = main(["sensitivity", "--network", "resnet18w2", "--checkpoint", str(tmp_path / "start.safetensors"),
                     "--results", str(tmp_path / "out"), *text.split()])
        return code, *capsys.readouterr()

    return run


def test_curves_picture_and_rates(run, tmp_path, monkeypatch):
    code, out, err = run("--bits 4 2 --budget bits=3")
    assert code == 0, err
    folder = tmp_path / "out" / "sensitivity"
    assert {path.suffix for path in folder.iterdir()} == {".json", ".svg", ".png"}
    (path,) = folder.glob("*.json")
    found = json.loads(path.read_text())
    assert found["level"] == "bits" and found["measure"] == "top1" and len(found["curves"]) == 21
    assert all(list(curve) == ["32", "4", "2"] for curve in found["curves"].values())
    assert "layer4.1.conv2" in out and "chosen" in out and "layer4.1.conv2" in path.with_suffix(".svg").read_text()

    monkeypatch.setattr(sensitivity, "measured", None)  # what is there is not measured again
    assert run("--bits 4 2 --resume")[0] == 0 and json.loads(path.read_text()) == found
    with pytest.raises(TypeError):
        run("--bits 4 3 --resume")


def test_lines_differ():
    curves = {str(i): {1.0: 0.1, 0.5: 0.1 + i / 100} for i in range(40)}
    found = Sensitivity("density", "top1", True, curves, dict.fromkeys(curves, 1))
    lines = sensitivity.picture(found, "many").axes[0].lines[:-1]
    assert len({(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}) == 40
    assert list(lines[7].get_ydata()) == pytest.approx([0, 7]) and "most is lost by 39: 39.00" in sensitivity.alt(found)


@pytest.mark.parametrize("text, message", [
    ("--rates 0.5 0", "rate = 0.0: allowed are numbers in (0, 1]"),
    ("--bits 4 1", "bits = 1: allowed are whole numbers in 2..16"),
    ("--bits 4 --rates 0.5", "--rates prunes and --bits rounds: choose"),
    ("--rates 0.5 --scheme mse", "--scheme mse is a grid of --bits: give --bits"),
    ("--bits 4 --scheme best", "scheme = 'best': allowed are"),
    ("--criterion fpgm", "criterion = 'fpgm' ranks no single weight"),
    ("--criterion entropy", "criterion = 'entropy': allowed are"),
    ("--rates 0.5 --budget bits=3", "--budget bits=3: allowed here is density=NUMBER"),
    ("--bits 4 2 --budget bits=1", "budget bits = 1: the narrowest widths that were measured take 2 a weight")])
def test_mistakes_are_one_line(run, text, message):
    code, _, err = run(text)
    assert code == 1 and message in err.splitlines()[-1]
