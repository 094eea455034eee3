"""Commands that take a file elsewhere, export and bench; their mistakes are one line, before anything is written."""

import importlib.util

import pytest
import torch

from benchmarks.networks import build
from methods.core.file.storage import encode
from methods.core.fit.calibrate import calibrate
from methods.core.fit.quantize import fit_symmetric, quantize
from methods.core.graph.build import apply, assemble, weight_layers

ON_DIGITS = ("--task", "digits", "--network", "resnet18w2")
needs_onnx = pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="onnxruntime is not installed")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A resnet18w2 of random weights in 8 bits."""
    net = build("resnet18w2", 10, 1).eval()
    weights = {name: quantize(layer.weight, fit_symmetric(layer.weight, 8), 8)
               for name, layer in weight_layers(net).items()}
    inputs = torch.randn(64, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    ranges = calibrate(apply(assemble(net, weights), net), inputs, 8)
    path = tmp_path_factory.mktemp("elsewhere") / "net.jc"
    encode(assemble(net, weights, activations=ranges), path)
    return path


@needs_onnx
def test_an_onnx_file_is_compared_with_our_integers(run, file, tmp_path):
    code, out, _ = run("export", file, tmp_path / "net.onnx", *ON_DIGITS, "--inputs", 250)
    assert code == 0 and "21 layers as int8" in out and "250 test inputs: top-1 " in out and "in ONNX Runtime" in out


def test_a_header_is_written(run, file, tmp_path):
    code, out, _ = run("export", file, tmp_path / "net.h", *ON_DIGITS)
    assert code == 0 and "21 layers as int8_t" in out
    assert "static const int8_t net_conv1_codes[18] = {" in (tmp_path / "net.h").read_text()


@pytest.mark.parametrize("words, found", [
    (("export", "FILE", "net.txt"), "net.txt: written are only .onnx and .h"),
    (("export", "FILE", "net.h", "--opset", "21"), "--opset is of .onnx files"),
    (("export", "FILE", "net.h", "--float-policy", "fc"), "--float-policy is of .onnx files"),
    (("export", "FILE", "net.h", "--windows", "keep"), "windows = 'keep': allowed are refuse, drop"),
    (("export", "FILE", "net.onnx", "--opset", "14"), "opset = 14: allowed are 13, 21"),
    (("export", "FILE", "net.onnx", "--inputs", "0"), "--inputs 0: at least 1 is needed"),
    (("export", "FILE", "net.onnx", "--float-policy", "x"), "no layers ['x'] to run in float"),
    (("export", "absent.jc", "net.h"), "absent.jc: there is no such file"),
    (("export", "DAMAGED", "net.onnx"), "damaged.jc"), (("bench", "DAMAGED"), "damaged.jc"),
    (("bench", "absent.jc"), "absent.jc: there is no such file"),
    (("bench", "FILE", "--batch", "0"), "--batch 0: at least 1 is needed"),
])
def test_mistakes_are_one_line(run, file, tmp_path, monkeypatch, words, found):
    monkeypatch.chdir(tmp_path)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "damaged.jc").write_bytes(data)
    names = {"FILE": file, "DAMAGED": tmp_path / "damaged.jc"}
    code, out, err = run(*(names.get(word, word) for word in words), *ON_DIGITS)
    assert code == 1 and not out and len(err.splitlines()) == 1 and found in err
    assert [path.name for path in tmp_path.iterdir()] == ["damaged.jc"]


@needs_onnx
def test_a_bench_names_every_engine_that_is_installed(run, file):
    code, out, _ = run("bench", file, *ON_DIGITS, "--batch", 2, "--rounds", 1)
    assert code == 0 and "float32" in out and "ONNX Runtime, sums in int8" in out
