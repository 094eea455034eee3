"""CLIP-Q: Fig. 2, the operator against its definition, and training through it."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from methods import clip_q
from methods.clip_q import ClipQuantize, Config, Theta, clip_counts, compress, encode, partition
from methods.core.budget import Budget
from methods.core.errors import CompressError, ConfigError, TrainingDiverged
from methods.core.train.finetune import Hooks, Recipe
from methods.core.train.run import NullRun

FIGURE = torch.tensor([[0.1, -0.1, 0.7, -0.4], [0.7, -0.5, 0.9, -0.1], [-1.0, -0.6, -1.6, 0.8], [-0.5, 1.1, 0.2, 1.2]])
QUANTIZED = torch.tensor([[0, 0, 0.9, -0.5], [0.9, -0.5, 0.9, 0], [-1.3, -0.5, -1.3, 0.9], [-0.5, 0.9, 0, 0.9]])
LAYERS = ("conv1", "conv2", "conv3", "fc")
SHORT = Recipe(epochs=1, lr=0.02)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def quantized(weight, p, bits, split="A"):
    codes, levels = partition(weight, Theta(p, bits), split)
    assert codes.shape == weight.shape and len(levels) == 2**bits and levels[0] == 0
    return levels[codes]


def cases(count):
    """Random layers of different weights, neither sign absent, with p, bits and split."""
    draw = np.random.default_rng(0)
    for i in range(count):
        n = int(draw.integers(4, 300))
        weight = draw.normal(draw.normal() * 0.3, 1, n) ** draw.choice([1, 3])
        weight[:2] = -0.5 - draw.random(), 0.5 + draw.random()
        p, bits = float(draw.uniform(0, 0.95)), int(draw.integers(2, 7))
        yield torch.tensor(weight, dtype=torch.float32), p, bits, "AB"[i % 2]


# --- Fig. 2 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["A", "B"])
def test_figure_2(split):
    assert torch.allclose(quantized(FIGURE, 0.25, 2, split), QUANTIZED, atol=1e-6)
    tensor = encode("layer", FIGURE, Theta(0.25, 2), split)
    assert tensor.grid.values.tolist() == pytest.approx([0.0, 0.9, -1.3, -0.5], abs=1e-6) and tensor.bits == 2
    assert torch.allclose(tensor.decode(), QUANTIZED, atol=1e-6)


# --- the operator against its definition --------------------------------------------------------------------


def defined(weight, p, bits, split):
    """W^ by the definition, weight by weight in float64: section 2 of the note, one sign at a time."""
    values = weight.double().tolist()
    sides = {+1: sorted(v for v in values if v > 0), -1: sorted(-v for v in values if v < 0)}
    clipped = {sign: math.floor(p * len(side)) for sign, side in sides.items()}
    if sum(clipped.values()) + values.count(0) < math.floor(p * len(values)):
        clipped[max(sides, key=lambda sign: p * len(sides[sign]) % 1)] += 1
    edge = {sign: side[clipped[sign] - 1] if clipped[sign] else 0.0 for sign, side in sides.items()}
    length = {sign: side[-1] - edge[sign] for sign, side in sides.items()}
    count = {-1: 2 ** (bits - 1), +1: 2 ** (bits - 1) - 1}
    if split == "B":
        share = (2**bits - 1) * length[-1] / sum(length.values())
        best = min(range(1, 2**bits - 1), key=lambda down: abs(down - share))
        count = {-1: best, +1: 2**bits - 1 - best}

    def interval(value):
        sign = int(math.copysign(1, value))
        if abs(value) <= edge[sign]:
            return 0
        return sign * next(j for j in range(1, count[sign] + 1)
                           if abs(value) <= edge[sign] + j * length[sign] / count[sign] + 1e-12 or j == count[sign])

    members = [interval(value) for value in values]
    means = {j: np.mean([v for v, k in zip(values, members, strict=True) if k == j]) if j else 0.0 for j in members}
    return torch.tensor([means[j] for j in members], dtype=torch.float32), length, count


def test_the_operator_is_its_definition():
    for weight, p, bits, split in cases(120):
        if weight.numel() * (1 - p) > 6:
            wanted, _, _ = defined(weight, p, bits, split)
            assert torch.allclose(quantized(weight, p, bits, split), wanted, rtol=1e-6, atol=0), (p, bits, split)


def test_what_holds_for_every_layer():
    for weight, p, bits, split in cases(200):
        out, n = quantized(weight, p, bits, split), len(weight)
        pruned = out == 0
        positive, negative = weight > 0, weight < 0
        counts = [math.floor(p * int(side.sum())) for side in (negative, positive)]
        clipped = [int((pruned & side).sum()) for side in (negative, positive)]
        assert sum(clipped) == math.floor(p * n)  # exactly, whichever signs the weights have
        assert all(have - want in (0, 1) for have, want in zip(clipped, counts, strict=True))
        for side in (positive, negative):  # the smallest of each sign
            if bool((side & pruned).any()) and bool((side & ~pruned).any()):
                assert weight[side & pruned].abs().max() < weight[side & ~pruned].abs().min()
        assert len(out.unique()) <= 2**bits
        assert bool((out[weight.argsort()].diff() >= 0).all())  # monotone
        assert bool((out * weight >= 0).all()) and bool((out[pruned] == 0).all())  # no sign flips
        for level in out[~pruned].unique():  # sums are conserved, interval by interval
            group = weight[out == level].double()
            assert float(group.sum()) == pytest.approx(float(level) * len(group), rel=1e-6)
        assert torch.equal(quantized(4 * weight, p, bits, split), 4 * out)
        order = torch.randperm(n, generator=seeded())
        assert torch.allclose(quantized(weight[order], p, bits, split), out[order], rtol=1e-6, atol=0)
        if 0 < sum(clipped) < n - 2:
            _, length, count = defined(weight, p, bits, split)
            width = torch.where(positive, length[1] / count[1], length[-1] / count[-1])
            assert bool(((weight - out).abs() <= width + 1e-5)[~pruned].all())


def test_an_empty_interval_changes_no_other():
    """A public implementation let the interval behind an empty one swallow all before it."""
    weight = torch.tensor([0.10, 0.11, 0.12, 0.50, 0.51, 1.0, -1.0, -0.8])
    out = quantized(weight, 0.0, 4)
    assert torch.allclose(out, torch.tensor([0.11, 0.11, 0.11, 0.505, 0.505, 1.0, -1.0, -0.8]), atol=1e-6)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("split", ["A", "B"])
def test_a_missing_sign_leaves_its_intervals_to_the_other(sign, split):
    weight = sign * torch.arange(1, 15)  # in (0, 14] there are 7 intervals of 2
    means = sign * torch.arange(1, 15).reshape(7, 2).float().mean(1).repeat_interleave(2)
    assert torch.equal(quantized(weight.float(), 0.0, 3, split), means)
    assert torch.equal(quantized(weight.float(), 0.5, 3, split), weight * (weight.abs() > 7))  # 7 left, one each


def test_edge_cases():
    few = torch.tensor([0.3, -0.2, 0.0, 5.0, -1.0])
    assert torch.equal(quantized(few, 0.0, 8), few)  # fewer survivors than intervals: nothing is lost
    assert torch.equal(quantized(torch.zeros(3, 4), 0.5, 2), torch.zeros(3, 4))
    assert torch.equal(quantized(few, 0.99, 4).count_nonzero(), torch.tensor(1))
    ties = torch.tensor([1.0, 1.0, 2.0, 3.0, -1.0, -2.0])
    assert quantized(ties, 0.25, 4)[:2].tolist() == [0.0, 0.0]  # what equals c+ goes with it
    assert not bool(torch.signbit(quantized(torch.tensor([-0.0, 1.0, -1.0]), 0.0, 2)[0]))
    assert torch.equal(quantized(torch.full((8,), 1e-44), 0.0, 8), torch.full((8,), 1e-44))
    with pytest.raises(CompressError, match="0.5 of the weights of fc leaves none"):
        encode("fc", torch.ones(2, 4), Theta(0.5, 4), "A")
    assert encode("fc", torch.zeros(2, 4), Theta(0.5, 4), "A").kept == 0


def test_counts_do_not_follow_the_signs():
    for n, p in itertools.product((10, 37, 100), (0.0, 0.29, 1 - 0.3, 1 - 0.9, 0.5)):
        for negative in range(n + 1):
            assert sum(clip_counts(negative, n - negative, n, p)) == n - math.ceil(round((1 - p) * n, 9))
    assert sum(clip_counts(50, 50, 100, 1 - 1e-13)) == 99  # p < 1: one weight stays
    assert clip_counts(4, 4, 10, 0.5) == (2, 2)  # two zeros are pruned besides: 6 of 10


def test_a_layer_of_millions_of_weights():
    weight = torch.randn(1 << 21, generator=seeded()) * 0.02
    out = quantized(weight, 0.7, 4)
    assert int((out == 0).sum()) == pytest.approx(0.7 * len(weight), abs=10)  # ties are clipped together
    for level in out.unique()[[0, 7, -1]]:
        assert float(level) == pytest.approx(float(weight[out == level].double().mean()), rel=1e-6)


def test_only_levels_in_use_are_stored():
    tensor = encode("fc", torch.tensor([[-8.0, 0.1, 0.2], [3.0, 1.0, -0.1]]), Theta(0.34, 4), "A")
    assert tensor.codes.unique().tolist() == list(range(len(tensor.grid.values))) and tensor.grid.values[0] == 0
    assert tensor.kept == 4 and tensor.bits == 4


# --- training through the operator --------------------------------------------------------------------------


def parametrized(weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    parametrize.register_parametrization(layer, "weight", ClipQuantize(Theta(0.25, 2), "A"))
    return layer, layer.parametrizations.weight.original


def test_the_gradient_is_that_of_the_quantized_weight_at_every_entry():
    layer, shadow = parametrized(FIGURE)
    inputs, targets = torch.randn(6, 4, generator=seeded()), torch.tensor([0, 1, 2, 3, 0, 1])
    nn.functional.cross_entropy(layer(inputs), targets).backward()
    dense = QUANTIZED.clone().requires_grad_()
    nn.functional.cross_entropy(inputs @ dense.T, targets).backward()
    assert torch.allclose(shadow.grad, dense.grad, atol=1e-6)
    assert bool((shadow.grad[QUANTIZED == 0] != 0).all())  # clipped entries too
    assert torch.equal(shadow.detach(), FIGURE)  # and the forward pass wrote nothing
    assert torch.allclose(layer.eval().weight, QUANTIZED, atol=1e-6)
    assert torch.equal(layer.state_dict()["parametrizations.weight.original"], FIGURE)


def test_a_clipped_weight_comes_back():
    layer, shadow = parametrized(FIGURE + torch.arange(16).reshape(4, 4) / 1000)  # no two weights are equal
    optimizer, alive = torch.optim.SGD([shadow], lr=0.1), []
    for _ in range(8):
        alive.append(bool(layer.weight[0, 0] != 0))
        optimizer.zero_grad()
        (-layer.weight[0, 0]).backward()  # outwards, although its quantized value is 0
        optimizer.step()
        assert int((layer.weight == 0).sum()) == 4
    assert not alive[0] and alive[-1] and alive == sorted(alive)


def test_fine_tuning_clips_anew_in_every_minibatch(tiny, monkeypatch):
    model, theta, seen = tiny.model(), Theta(0.6, 3), []

    class Watch(Hooks):
        def after_step(self, model, lr):
            layer = model.get_submodule("conv2")
            shadow, out = layer.parametrizations.weight.original.detach(), layer.weight.detach()
            seen.append((float(shadow[(out == 0) & (shadow > 0)].max()), int((out == 0).sum()), out != 0))

    loop = clip_q.train
    monkeypatch.setattr(clip_q, "train", lambda *given, **named: loop(*given, hooks=Watch(), **named))
    before = {name: layer.weight.detach().clone() for name, layer in clip_q.weight_layers(model).items()}
    config = Config(finetune=Recipe(3, 0.05))
    clip_q.fine_tune(model, tiny.task(), dict.fromkeys(LAYERS, theta), config, seeded(), NullRun())
    thresholds, zeros, masks = zip(*seen, strict=True)
    assert len(set(thresholds)) == len(seen) == 12 and set(zeros) == {int(0.6 * 576)}
    assert bool((masks[-1] & ~masks[0]).any())  # some that were clipped are back
    for name in LAYERS:  # a plain parameter again, the shadow: neither the old weights nor quantized ones
        weight = model.get_submodule(name).weight
        assert isinstance(weight, nn.Parameter) and type(model.get_submodule(name)) in (nn.Conv2d, nn.Linear)
        assert not torch.equal(weight, before[name]) and len(weight.detach().unique()) > 8


@pytest.mark.parametrize("split", ["A", "B"])
def test_a_training_that_diverges_says_so(tiny, split):
    config = Config(search="uniform", split=split, finetune=Recipe(1, 1e12, schedule="constant"))
    with pytest.raises(TrainingDiverged, match=r"at step \d+ of 4 .*lower lr \(1e\+12\)"):
        compress(tiny.model(), tiny.task(), Budget(density=0.3, bits=3), config, seeded())


def test_statistics_that_overflow_are_a_training_that_diverged(tiny):
    """Batch norm keeps the loss finite while the weights explode; nothing infinite may be stored."""
    config = Config(search="uniform", finetune=Recipe(1, 1e3, schedule="constant"))
    with pytest.raises(TrainingDiverged, match=r"infinite or NaN values after .*lower lr \(1000\)"):
        compress(tiny.model(), tiny.task(), Budget(density=0.3, bits=3), config, seeded())


def test_a_layer_of_zeros_is_noted(tiny):
    model, config = tiny.model(), Config(search="uniform", finetune=Recipe(0, 0.1))
    with torch.no_grad():
        model.conv2.weight.zero_()
    out = compress(model, tiny.task(), Budget(density=0.3, bits=3), config, seeded())
    assert out.notes["empty_layers"] == ["conv2"] and out.weights["conv2"].kept == 0


def test_compress_with_a_budget(tiny):
    density = {"conv1": 0.5, "conv2": 0.25, "conv3": 0.1, "fc": 1.0}
    budget = Budget(density=density, bits={**dict.fromkeys(LAYERS, 3), "fc": 2})
    out = compress(tiny.model(), tiny.task(), budget, Config(search="uniform", finetune=SHORT), seeded())
    assert {name: tensor.kept for name, tensor in out.weights.items()} == {
        "conv1": 108, "conv2": 144, "conv3": 87, "fc": 48}  # ceil(density n)
    assert {name: tensor.bits for name, tensor in out.weights.items()} == budget.bits
    for tensor in out.weights.values():
        assert tensor.grid.values[0] == 0 and len(tensor.grid.values) <= 2**tensor.bits
    assert out.notes["theta"]["conv3"] == {"p": 0.9, "bits": 3} and out.notes["trace"] == {}


def test_what_is_stored_is_what_was_trained_with(tiny):
    for split, other in ("AB", "BA"):
        config = Config(search="uniform", split=split, finetune=Recipe(epochs=0, lr=0.1))
        model = tiny.model()
        out = compress(model, tiny.task(), Budget(density=0.5, bits=3), config, seeded())
        weight, theta = model.conv2.weight.detach(), Theta(**out.notes["theta"]["conv2"])
        want, not_this = (quantized(weight, *theta, each) for each in (split, other))
        assert torch.equal(out.weights["conv2"].decode(), want) and not torch.equal(want, not_this)


def test_settings_outside_what_is_allowed():
    for wrong in ({"search": "grid"}, {"split": "C"}, {"lam": -1.0}, {"lam": math.nan}, {"evaluations": 0},
                  {"initial": 0}, {"held_out_inputs": 0}, {"index_bits": 17}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))} = .*allowed") as caught:
            Config(**wrong)
        assert "\n" not in str(caught.value)


def test_a_size_is_looked_for_without_training(tiny, monkeypatch):
    """Not one step, in the search neither: an impossible size is refused at once."""
    def train(model, task, recipe, *given, **more):
        assert recipe.epochs == 0

    monkeypatch.setattr(clip_q, "train", train)
    config = clip_q.quick(clip_q.Config(evaluations=2, initial=1, probe=3, finetune=Recipe(epochs=2, lr=0.01)))
    made = clip_q.compress(tiny.model(), tiny.task(), Budget(density=0.5), config, torch.Generator().manual_seed(0))
    assert made.weights["conv1"].kept <= 0.5 * made.weights["conv1"].codes.numel()
    uniform = clip_q.Config(search="uniform")
    assert clip_q.quick(uniform).probe == uniform.probe
