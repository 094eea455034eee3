"""A file opened once: what it hands out is what each part makes by itself, and nothing is made twice."""

import pytest
import torch
from torch import nn

from benchmarks.measure import measure
from methods.core.errors import CompressError, ConfigError, FormatError
from methods.core.file.storage import decode, encode, load
from methods.core.fit.calibrate import calibrate
from methods.core.fit.quantize import fit_symmetric, quantize
from methods.core.graph import graph as graphs
from methods.core.graph.build import apply, assemble, own_copy, weight_layers
from methods.engine import exact, opened
from methods.engine.costs import hardware_costs, shapes
from methods.engine.exact import IntegerNetwork
from methods.engine.layers import layer_costs
from methods.engine.opened import open_file

SHAPE = (3, 8, 8)


@pytest.fixture
def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                             nn.Flatten(), nn.Linear(8, 4)).eval()


@pytest.fixture
def x():
    return torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def path(net, x, tmp_path):
    weights = {name: quantize(layer.weight, fit_symmetric(layer.weight, 8), 8)
               for name, layer in weight_layers(net).items()}
    encode(assemble(net, weights, activations=calibrate(net, x)), tmp_path / "net.jc")
    return tmp_path / "net.jc"


def test_it_hands_out_what_each_part_makes(net, x, path):
    one, compressed = open_file(path, net, SHAPE), decode(path)
    assert torch.equal(one(x), IntegerNetwork(compressed, net)(x))
    assert torch.equal(one.module(x), apply(compressed, net)(x))
    assert one.costs() == layer_costs(compressed, net, SHAPE)
    assert one.hardware(x) == hardware_costs(compressed, net, SHAPE, IntegerNetwork(compressed, net), x)
    assert one.hardware(array="ws16") == hardware_costs(compressed, net, SHAPE, array="ws16")
    assert one.verify([(x, None)], 16, 4).wrong == 0
    assert one.exact is one.fast.exact and one.exact.module is one.module and one.exact.graph is one.graph


def test_a_layer_in_float_costs_as_such(net, x, path):
    assert open_file(path, net, SHAPE, float_policy=("0",)).costs()["0"].operand_bits == 32
    assert open_file(path, net, SHAPE).costs()["0"].operand_bits == 8


def test_one_measurement_traces_each_network_once(net, x, path, monkeypatch):
    """The stored network and the dense one, whatever is computed of them; the weights are put in once."""
    traced, applied, trace = [], [], graphs.trace
    for module in (graphs, exact, opened, shapes):
        monkeypatch.setattr(module, "trace", lambda model: traced.append(model) or trace(model))
    for module in (exact, opened):
        monkeypatch.setattr(module, "apply", lambda *given, _f=apply: applied.append(given) or _f(*given))
    row = measure(path, net, [(x, torch.zeros(16, dtype=torch.int64))], SHAPE)
    assert len(traced) == 2 and net not in traced and len(applied) == 1
    assert row["dense_macs"] == row["cost"]["macs"] == 8 * 27 * 64 + 32


def test_onnx_in_two_words(net, path, tmp_path):
    pytest.importorskip("onnx", reason="onnx is not installed")
    assert open_file(path, net, SHAPE).to_onnx(tmp_path / "net.onnx").layers == {"0": "int8", "5": "int8"}


def test_a_damaged_file_is_refused(net, path):
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(FormatError):
        open_file(path, net)


# --- what is given by mistake ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape, message", [
    ("a", "shape = 'a': needed is that of one input, without the batch"), (None, "shape = None: needed"),
    (3, "shape = 3: needed"), ((3, 0, 8), "needed is"), ((3.0, 8, 8), "needed is"), ((True, 8, 8), "needed is"),
    ((1, 8, 8), r"shape = \(1, 8, 8\): 0 reads inputs of the shape \(3, height, width\), without the batch"),
    ((16, 3, 8, 8), r"shape = \(16, 3, 8, 8\): 0 reads"), ((3,), "0 reads")])
def test_a_shape_that_is_none_or_does_not_fit_is_refused_when_the_file_is_opened(shape, message, net, path):
    with pytest.raises(ConfigError, match=message) as caught:
        open_file(path, net, shape)
    assert "\n" not in str(caught.value)


def test_shapes_that_fit_are_taken(net, path):
    for shape in ((), (3, 8, 8), [3, 8, 8], torch.Size((3, 5, 9))):
        assert open_file(path, net, shape).shape == shape
    linear = nn.Sequential(nn.Linear(6, 2), nn.ReLU())
    opened.check_first(graphs.trace(linear), (4, 6))
    with pytest.raises(ConfigError, match=r"shape = \(4, 5\): 0 reads inputs of the shape \(..., 6\)"):
        opened.check_first(graphs.trace(linear), (4, 5))
    opened.check_first(graphs.trace(nn.Sequential(nn.Flatten(), nn.Linear(6, 2))), (1, 2, 3))  # not read as it is


@pytest.mark.parametrize("wrong, message", [
    (lambda x: x[:, :1], r"Sequential cannot take inputs float32 \[16, 1, 8, 8\]: .*to have 3 channels, but got 1"),
    (lambda x: x[0], "0 reads inputs of 3 dimensions"), (lambda x: x.numpy(), "inputs = a ndarray: needed"),
    (lambda x: None, "inputs = a NoneType: needed is a tensor")])
def test_inputs_that_do_not_fit_are_refused_in_one_line(wrong, message, net, path, x):
    with pytest.raises(CompressError, match=message) as caught:
        open_file(path, net, SHAPE)(wrong(x))
    assert "\n" not in str(caught.value)


def test_an_error_that_is_not_the_inputs_is_not_laid_on_them(net, path, x):
    found = open_file(path, net, SHAPE)
    found.fast.steps["0"], found.fast.unsupported = (lambda inputs: [][1]), ""
    with pytest.raises(IndexError):
        found(x)


@pytest.mark.parametrize("call, message", [
    (lambda net, made, path: apply(net, made), "apply.compressed, network. was given a Sequential first"),
    (lambda net, made, path: apply(made, path), "a PosixPath was given where a network"),
    (lambda net, made, path: encode(net, path), "encode.compressed, path. was given a Sequential first"),
    (lambda net, made, path: encode(path, made), "encode.compressed, path. was given a PosixPath first"),
    (lambda net, made, path: encode(made, net), "a Sequential was given where the path of a file"),
    (lambda net, made, path: decode(net), "a Sequential was given where the path of a file"),
    (lambda net, made, path: load(net, path), "a PosixPath was given where a network"),
    (lambda net, made, path: open_file(net, path), "a PosixPath was given where a network"),
    (lambda net, made, path: open_file(path, made), "a CompressedModel was given where a network"),
    (lambda net, made, path: opened.Opened(net, made), "Opened.compressed, network. was given a Sequential first"),
    (lambda net, made, path: own_copy(made), "a CompressedModel was given where a network")])
def test_swapped_arguments_are_named(call, message, net, path):
    with pytest.raises(ConfigError, match=message) as caught:
        call(net, decode(path), path)
    assert "\n" not in str(caught.value)


def test_a_model_of_the_other_copy_of_the_package_is_taken(net, path):
    """The harness runs `methods`, a method from elsewhere imports `jointcompress.methods`."""
    made = decode(path)
    other = type("CompressedModel", (), {"__getattr__": lambda self, name: getattr(made, name)})()
    assert torch.equal(apply(other, net)[0].weight, apply(made, net)[0].weight)
