"""SPARQ: its quantizers, ranges and batch norm against their definitions, and what it refuses."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from methods import sparq
from methods.core.artifact import Window
from methods.core.budget import Budget
from methods.core.errors import CompressError
from methods.core.fit.windows import find_window, follows_24, keep_24, windowed_sum
from methods.core.graph.build import apply, weight_layers
from methods.core.graph.graph import trace
from methods.core.train.task import Task
from methods.engine.exact import IntegerNetwork
from methods.sparq import Config, QuantizedLayer, quantize_filters

from .sparq_networks import Inputs, chain, compress, draw, layer_of

# --- weights (Q1) ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_weights_are_on_the_papers_grid(bits):
    weight = torch.randn(16, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    tensor, exact = quantize_filters(weight, bits), weight.double()
    step = 2 * exact.abs().flatten(1).amax(1) / (2**bits - 1)
    assert torch.allclose(tensor.grid.scale.double(), step, rtol=1e-6) and tensor.bits == bits
    want = (exact / step.reshape(-1, 1, 1, 1)).round().clamp(-2 ** (bits - 1), 2 ** (bits - 1) - 1)
    edge = exact.abs() == exact.abs().flatten(1).amax(1).reshape(-1, 1, 1, 1)
    assert torch.equal(tensor.codes[~edge].double(), want[~edge])
    assert (tensor.codes[edge] - want[edge]).abs().max() <= 1  # +-127.5: float32 decides between -128 and -127
    assert (tensor.decode().double() - exact).abs().max() <= 0.5001 * step.max()


def test_the_largest_weight_lies_between_two_codes():
    tensor = quantize_filters(torch.tensor([[1.0, 0.5, 0.0], [-1.0, 0.25, 0.0], [0.0, 0.0, 0.0]]), 8)
    assert tensor.codes[0].tolist() == [127, 64, 0] and tensor.codes[2].tolist() == [0, 0, 0]
    assert int(tensor.codes[1, 0]) in (-128, -127) and int(tensor.codes[1, 1]) == 32
    assert torch.allclose(tensor.grid.scale[:2], torch.full((2,), 1 / 127.5))
    found = {int(quantize_filters(torch.tensor([[-top, 0.1]]), 8).codes[0, 0]) for top in torch.rand(200).add(0.5)}
    assert -128 in found and found <= {-128, -127}  # the grids of core/quantize.py never use -128


def test_a_bias_is_quantized_with_one_step():
    model = chain(bias=True)
    compressed = compress(model, draw(8))
    bias = model[3].bias.detach()
    step = 2 * bias.abs().max() / 255
    assert torch.allclose(compressed.rest["3.bias"], (bias / step).round().clamp(-128, 127) * step, atol=1e-6)
    assert torch.equal(compressed.rest["9.bias"], model[9].bias)  # of the classifier it is left as it is


@pytest.mark.parametrize("config, budget, want", [
    (Config(), {}, {"0": 8, "3": 8, "6": 8, "9": 8}), (Config(), {"bits": 4}, {"0": 4, "3": 4, "6": 4, "9": 4}),
    (Config(excluded_bits=8), {"bits": 4}, {"0": 8, "3": 4, "6": 4, "9": 8}),
    (Config(), {"bits": {"0": 8, "3": 4, "6": 5, "9": 6}}, {"0": 8, "3": 4, "6": 5, "9": 6})])
def test_bits_of_the_weights(config, budget, want):
    compressed = compress(chain(), draw(8), config, **budget)
    assert {name: tensor.bits for name, tensor in compressed.weights.items()} == want
    assert all(int(t.codes.abs().max()) >= 2 ** (t.bits - 1) - 1 for t in compressed.weights.values())


# --- activations (Q1, Q2) ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
def test_the_range_is_the_mean_of_the_largest_values_of_images(bits):
    x = torch.rand(11, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 12).reshape(-1, 1, 1, 1)
    layer = layer_of(bits)
    tops = x.double().flatten(1).amax(1)
    for start, end in ((0, 5), (5, 8), (8, 11)):  # batch i is quantized with the mean over the batches up to i
        layer.watch(x[start:end])
        assert layer.quantizer().scale == pytest.approx(float(tops[:end].mean()) / (2**bits - 1), rel=1e-6)
    assert layer.quantizer().code_range == (0, 2**bits - 1) and layer.quantizer().zero == 0
    codes = layer.quantizer().encode(x)
    assert codes[10].max() == 2**bits - 1 and float(tops[10]) > float(tops.mean())  # what lies above saturates
    step = layer.quantizer().scale
    assert torch.equal(codes, torch.round(x / step).clamp(0, 2**bits - 1))


def test_every_batch_is_quantized_with_what_was_seen_so_far():
    layer, x = layer_of(), torch.rand(6, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    for batch, seen in ((x[:2], x[:2]), (x[2:], x)):
        scale = seen.flatten(1).amax(1).mean() / 255
        codes = torch.round(batch / scale).clamp(0, 255)
        want = F.conv2d(codes.double() * scale, layer.codes.double() * layer.scale[:, None].double())
        assert torch.allclose(layer(batch).double(), want, atol=1e-5)
    layer.freeze(find_window("5opt"))
    before = layer.quantizer()
    layer(10 * x)
    assert layer.quantizer() == before


@pytest.mark.parametrize("window", [None, find_window("5opt"), find_window("2opt", sparse24=True)])
@pytest.mark.parametrize("channels", [3, 4])
def test_a_simulated_layer_is_a_convolution_of_what_the_windows_leave(window, channels):
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(channels, 5, 3, padding=1)
    conv.weight.data *= keep_24(conv.weight)
    layer = QuantizedLayer("conv", conv, quantize_filters(conv.weight, 8), 8)
    x = torch.randn(4, channels, 5, 5, generator=generator).relu()
    layer.watch(x)
    layer.freeze(window)
    codes = torch.round(x / layer.quantizer().scale).clamp(0, 255)
    total = windowed_sum(conv, codes.long(), layer.codes.long(), window).double()
    if window is None:  # 8-bit weights and activations: the convolution of the fake-quantized tensors
        values = layer.codes.double() * layer.scale[:, None].double()
        want = F.conv2d(codes.double() * layer.quantizer().scale, values, padding=1)
    else:
        want = total * layer.quantizer().scale * layer.scale.double()
    assert torch.allclose(layer(x).double(), want + conv.bias.double()[:, None, None], atol=1e-5)


# --- batch norm (B1) ---------------------------------------------------------------------------------------


def moving(model, batches, passes):
    """Running statistics of the first batch norm, by the formula: its input is the first convolution, in float."""
    mean, var = model[1].running_mean.double(), model[1].running_var.double()
    with torch.no_grad():
        for x in batches * passes:
            y = model[0](x).double().transpose(0, 1).flatten(1)
            mean, var = 0.9 * mean + 0.1 * y.mean(1), 0.9 * var + 0.1 * y.var(1)
    return mean, var


@pytest.mark.parametrize("passes", [0, 1, 2])
def test_batch_norm_follows_the_calibration_inputs(passes):
    model, inputs = chain(), draw(300)
    compressed = compress(model, inputs, Config(recalibrations=passes))
    mean, var = moving(model, [inputs[:100], inputs[100:200], inputs[200:]], passes)  # batches of at most 128
    assert torch.allclose(compressed.rest["1.running_mean"].double(), mean, atol=1e-6)
    assert torch.allclose(compressed.rest["1.running_var"].double(), var, atol=1e-6)
    second = torch.equal(compressed.rest["4.running_mean"], model[4].running_mean)
    assert second == (passes == 0)
    assert torch.equal(compressed.rest["1.weight"], model[1].weight)
    network = apply(compressed, model)
    assert torch.equal(network(inputs), network(inputs))


class Augmented(Inputs):
    """Epochs with a generator are shifted by what it draws."""

    def epoch(self, generator):
        shift = 0.0 if generator is None else float(torch.rand((), generator=generator))
        self.shifts = [*getattr(self, "shifts", []), shift]
        yield self.inputs + self.shifts[-1], torch.zeros(len(self.inputs), dtype=torch.int64)


@pytest.mark.parametrize("passes", [0, 1, 2])
def test_batch_norm_moves_on_images_augmented_as_in_training(passes):
    model, seen = chain(), Augmented(draw(100))
    task = Task(None, seen, calibration=seen)
    config = Config(recalibrations=passes)
    compressed = sparq.compress(model, task, Budget(), config, torch.Generator().manual_seed(1))
    shifts = [shift for shift in seen.shifts if shift]
    assert len(set(shifts)) == passes  # every pass draws anew; the ranges of the other edges are those of plain images
    mean, _ = moving(model, [seen.inputs + shift for shift in shifts], 1)
    assert torch.allclose(compressed.rest["1.running_mean"].double(), mean, atol=1e-6)
    other = Augmented(seen.inputs)  # where there are training batches, it is those
    sparq.compress(model, Task(other, seen, calibration=Inputs(seen.inputs)), Budget(), config, torch.Generator())
    assert len(getattr(other, "shifts", [])) == passes


def test_the_second_pass_sees_the_windows():
    model, inputs = chain(), draw(128)
    means = [compress(model, inputs, config).rest["4.running_mean"]
             for config in (Config(), Config(windows="7opt"), Config(windows="none"))]
    assert not torch.equal(means[0], means[1]) and not torch.equal(means[0], means[2])
    first = [compress(model, inputs, config).rest["4.running_mean"]
             for config in (Config(recalibrations=1), Config(windows="7opt", recalibrations=1))]
    assert torch.equal(*first)  # the windows are off while ranges are calibrated


def test_one_input_is_no_batch():
    with pytest.raises(CompressError, match="on one input"):
        compress(chain(), draw(1))
    assert compress(chain(), draw(1), Config(recalibrations=0)).windows


# --- the whole ---------------------------------------------------------------------------------------------


def test_windows_are_on_all_layers_but_the_first_and_the_last(tiny):
    compressed = sparq.compress(tiny.model(), tiny.task(), Budget(), Config(windows="6opt", rounding=False),
                                torch.Generator())
    window = Window(3, (0, 1, 2, 3, 4, 5), rounding=False)
    assert compressed.windows == {"conv2": window, "conv3": window} and set(compressed.weights) == {
        "conv1", "conv2", "conv3", "fc"}
    graph = trace(apply(compressed, tiny.net()))
    assert set(compressed.activations) == set(graph.edges()) - set(graph.accumulator_edges())
    for edge in compressed.windows:
        assert compressed.activations[edge].zero == 0
    assert compressed.activations["conv1"].zero > 0  # the network's input has negative values


@pytest.mark.parametrize("config, windows", [
    (Config(windows="none"), {}), (Config(windows="none", activation_bits=4), {}), (Config(), {"3", "6"})])
def test_baselines_have_no_windows(config, windows):
    compressed = compress(chain(), draw(8), config)
    assert set(compressed.windows) == set(windows)
    assert {compressed.activations[edge].bits for edge in ("3", "6")} == {config.activation_bits}
    assert {compressed.activations[edge].bits for edge in ("0", "9")} == {8}


@pytest.mark.parametrize("channels, config", [
    (6, Config()), (5, Config(windows="3opt")), (6, Config(paired=False)), (6, Config(sparse24=True)),
    (5, Config(windows="7opt", sparse24=True))])
def test_the_integer_network_computes_what_was_simulated(channels, config):
    """Layer by layer: the integers of a file, on the codes that reach a layer, give the simulation's sums."""
    model, inputs = chain(channels), draw(64)
    compressed = compress(model, inputs, config)
    network, seen = IntegerNetwork(compressed, model), {}
    network.see = lambda layer, codes, total: seen.update({layer.node.name: (layer, codes, total)})
    network(inputs[:4])
    integer = IntegerNetwork(type(compressed)(compressed.weights, compressed.rest, compressed.activations), model)
    plain = {}
    integer.see = lambda layer, codes, total: plain.update({layer.node.name: codes})
    integer(inputs[:4])
    layer, _, total = seen["3"]  # the first windowed layer: nothing before it differs
    module = model.get_submodule("3")
    want = windowed_sum(module, plain["3"].long(), layer.weight.integers.long(), compressed.windows["3"])
    assert torch.equal(total.long(), want) and set(seen) == set(weight_layers(model))


def test_two_of_four_weights():
    model = chain(8)
    compressed = compress(model, draw(16), Config(sparse24=True))
    assert all(window.sparse24 for window in compressed.windows.values())
    for name in ("3", "6"):
        assert follows_24(compressed.weights[name].codes) and compressed.weights[name].density <= 0.5
    assert compressed.weights["0"].density > 0.9
    decoded = apply(compressed, model)
    again = compress(decoded, draw(16), Config(sparse24=True))  # a network that has the pattern keeps its weights
    assert all(torch.equal(again.weights[name].mask, compressed.weights[name].mask) for name in ("3", "6"))
    assert IntegerNetwork(compressed, model)(draw(4)).isfinite().all()


def test_dropout_is_off_and_the_generator_unused_where_images_are_plain(tiny):
    generator = torch.Generator().manual_seed(5)
    before = generator.get_state()
    sparq.compress(tiny.model(), tiny.task(), Budget(), Config(recalibrations=0), generator)
    assert torch.equal(generator.get_state(), before)


def test_windows_cost_more_the_narrower_they_are():
    """Mean squared error of the outputs, of the windows alone: batch norm stays as it is."""
    model, inputs = chain(8), draw(64)
    reference = IntegerNetwork(compress(model, inputs, Config(windows="none", recalibrations=0)), model)(inputs)
    errors = {}
    for name, config in {"5": Config(), "3": Config(windows="3opt"), "2": Config(windows="2opt"),
                         "alone": Config(paired=False), "trim": Config(rounding=False),
                         "2 bits": Config(windows="7opt")}.items():
        network = IntegerNetwork(compress(model, inputs, replace(config, recalibrations=0)), model)
        errors[name] = float((network(inputs) - reference).square().mean())
    assert errors["5"] < errors["3"] < errors["2"] and errors["5"] < errors["alone"] < errors["2 bits"]
    assert errors["5"] < errors["trim"]
