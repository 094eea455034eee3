"""What a row says of a file, each key from its own definition."""

import dataclasses

import pytest
import torch
from torch import nn

from benchmarks.measure import measure, reestimate_batchnorm, with_ranges
from methods import neuron_merging
from methods.core.budget import Budget
from methods.core.errors import ConfigError
from methods.core.file.storage import encode
from methods.core.fit.calibrate import calibrate
from methods.core.fit.quantize import fit_symmetric, quantize
from methods.core.graph.build import apply, assemble, weight_layers
from methods.engine.exact import IntegerNetwork

from .test_accounting import huffman_bits

FLOATS = 8 * 27 + 4 * 8 + 8 * 72 + 8 + 4 * 8 + 12 * 72 + 4 * 12 + 4 * 12 + 4  # of TinyNet: weights, biases, batch norms
SHAPE = (3, 8, 8)


@pytest.fixture
def stored(tiny, tmp_path):
    """(model, compressed, path): sparse 3-bit weights, 2-bit activations."""
    model = tiny.model()
    weights = {}
    for name, layer in weight_layers(model).items():
        mask = layer.weight.abs() >= layer.weight.abs().flatten().median()
        weights[name] = quantize(layer.weight, fit_symmetric(layer.weight, 3), 3, mask)
    compressed = assemble(model, weights)
    x = tiny.task().calibration_inputs(100)
    compressed = dataclasses.replace(compressed, activations=calibrate(apply(compressed, model), x, 2))
    encode(compressed, tmp_path / "a.jc")
    return model, compressed, tmp_path / "a.jc"


def accuracy(network, batches):
    right = [int(network(x[None]).argmax()) == int(y) for inputs, targets in batches
             for x, y in zip(inputs, targets, strict=True)]
    return 100 * sum(right) / len(right)


def gaps_of(mask, width):
    """Relative positions with fillers, by a loop over the flat tensor."""
    gaps, last = [], -1
    for position in mask.flatten().nonzero().flatten().tolist():
        while position - last > 1 << width:
            gaps, last = [*gaps, (1 << width) - 1], last + (1 << width)
        gaps, last = [*gaps, position - last - 1], position
    return gaps


@torch.no_grad()
def test_scores_sizes_and_layers(tiny, stored):
    model, compressed, path = stored
    test = list(tiny.task().held_out.epoch(None))
    row = measure(path, model, test, SHAPE, index_bits=2)
    assert row["top1_float"] == accuracy(apply(compressed, model), test)
    assert row["top1_integer"] == accuracy(IntegerNetwork(compressed, model), test) != row["top1_float"]
    assert row["float32_bytes"] == 4 * FLOATS and row["bytes"] == path.stat().st_size
    assert row["size_ratio"] == row["bytes"] / row["float32_bytes"] and sum(row["bytes_split"].values()) == row["bytes"]
    assert row["paper_mode_bytes"] != measure(path, model, test, SHAPE, index_bits=7)["paper_mode_bytes"]
    for name, tensor in compressed.weights.items():
        layer, gaps, codes = row["layers"][name], gaps_of(tensor.mask, 2), tensor.codes[tensor.mask].tolist()
        fillers = len(gaps) - len(codes)
        assert layer["fillers"] == fillers and layer["weights"] == tensor.mask.numel()
        assert layer["density"] == pytest.approx(len(codes) / tensor.mask.numel())
        assert layer["levels"] == len(set(codes)) and layer["bits"] == 3
        entries = [*codes, *["filler"] * fillers]
        assert layer["code_bits_huffman"] == pytest.approx(huffman_bits(entries) / len(entries))
        assert layer["index_bits_huffman"] == pytest.approx(huffman_bits(gaps) / len(gaps))
        scales = 32 * tensor.grid.scale.numel()
        plain, huffman = len(gaps) * (3 + 2), huffman_bits(entries) + huffman_bits(gaps)
        assert layer["rate_prune_quantize"] == pytest.approx((plain + scales) / (32 * layer["weights"]))
        assert layer["rate_prune_quantize_huffman"] == pytest.approx((huffman + scales) / (32 * layer["weights"]))


def test_index_widths_of_layers_that_store_no_codes(tiny, stored, tmp_path):
    model, compressed, _ = stored
    weights = {name: tensor for name, tensor in compressed.weights.items() if name != "fc"}
    rest = {**compressed.rest, "fc.weight": model.fc.weight.detach()}
    encode(dataclasses.replace(compressed, weights=weights, rest=rest), tmp_path / "b.jc")
    test = list(tiny.task().held_out.epoch(None))
    row = measure(tmp_path / "b.jc", model, test, SHAPE, index_bits=dict.fromkeys(weight_layers(model), 4))
    assert row["layers"]["conv2"]["index_bits"] == 4 and "index_bits" not in row["layers"]["fc"]


def test_ratios_are_against_the_network_that_was_compressed(tiny, tmp_path):
    """Not against what is left of it: a file without half of the channels."""
    model = tiny.model()
    budget, config = Budget(channel_density=0.5), neuron_merging.Config()
    small = neuron_merging.compress(model, None, budget, config, torch.Generator())
    small = with_ranges(small, model, tiny.task())
    left = sum(layer.weight.numel() for layer in weight_layers(apply(small, model)).values())
    encode(small, tmp_path / "small.jc")
    row = measure(tmp_path / "small.jc", model, tiny.task().held_out.epoch(None), SHAPE)
    whole = sum(layer.weight.numel() for layer in weight_layers(model).values())
    assert row["dense_weights"] == whole > left and row["float32_bytes"] == 4 * FLOATS
    assert row["size_ratio"] == row["bytes"] / (4 * FLOATS)
    counted = row["accounting"]
    assert counted["ratios"]["data_only"] == pytest.approx(32 * whole / counted["bits"]["data_only"])
    assert row["dense_macs"] > row["cost"]["macs"]


def test_ranges_are_those_of_training_images(tiny, stored):
    """The held-out images choose between methods: the harness's ranges may not be taken from them."""

    class Forbidden:
        def __len__(self):
            raise AssertionError("held-out images were looked at")

        def epoch(self, generator):
            raise AssertionError("held-out images were looked at")

    model, compressed, _ = stored
    task = dataclasses.replace(tiny.task(), held_out=Forbidden())
    found = with_ranges(dataclasses.replace(compressed, activations={}), model, task)
    wanted = calibrate(apply(compressed, model), tiny.task().calibration_inputs(1024))
    assert found.activations == wanted and found.ranges_by == "harness"


def test_batch_norm_takes_the_statistics_of_what_it_reads():
    norm = nn.BatchNorm1d(3)
    x = torch.randn(260, 3, generator=torch.Generator().manual_seed(0)) * 2 + 1
    x[-4:] += 30  # would weigh 64 times as much in a batch of their own
    found = reestimate_batchnorm(nn.Sequential(norm).eval(), x)[0]
    assert torch.allclose(found.running_mean, x.mean(0), atol=1e-5) and not found.training and found.momentum == 0.1
    halves = torch.stack([x[:130].var(0), x[130:].var(0)]).mean(0)
    assert torch.allclose(found.running_var, halves, rtol=1e-4)
    assert torch.equal(reestimate_batchnorm(nn.Sequential(norm), x[:257])[0].running_mean, norm.running_mean)
    with pytest.raises(ConfigError, match="bn_reestimation = 1: .* 2 inputs or more"):
        reestimate_batchnorm(nn.Sequential(norm), x[:1])
    with pytest.raises(ConfigError, match="none left"):
        reestimate_batchnorm(nn.Sequential(nn.Linear(3, 2)), x)
