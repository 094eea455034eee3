"""Curves of one layer at a time against plain torch, and the widths of equal drop against all there are."""

import itertools
import random

import pytest
import torch

from benchmarks.settings import build
from methods import pipeline, prune_then_quantize
from methods.core.budget import Budget
from methods.core.errors import BudgetError, ConfigError
from methods.core.fit.layer_rates import equal_drop, equal_drop_bits
from methods.pipeline import pruning_curves, quantization_curves

SIZES = {"a": 30, "b": 7, "c": 12}


def seeded():
    return torch.Generator().manual_seed(0)


def worst_drop(curves, chosen, whole):
    """The greatest drop of a choice, where a level counts as bad as the worst larger one."""
    return max(max(e for level, e in curve.items() if level >= chosen[name]) - curve[whole]
               for name, curve in curves.items())


@pytest.mark.parametrize("seed", range(20))
def test_no_choice_of_widths_drops_less(seed):
    draw, widths = random.Random(seed), (2, 3, 4, 6, 8)
    curves = {name: {32: 0.1, **{b: 0.1 + draw.random() / b for b in widths}} for name in SIZES}
    bits = draw.choice([2.2, 3.0, 4.5, 6.0])
    found = equal_drop_bits(curves, SIZES, bits)
    fitting = [choice for choice in (dict(zip(SIZES, some, strict=True))
                                     for some in itertools.product(widths, repeat=len(SIZES)))
               if sum(choice[name] * n for name, n in SIZES.items()) <= bits * sum(SIZES.values())]
    assert found in fitting
    assert worst_drop(curves, found, 32) == min(worst_drop(curves, choice, 32) for choice in fitting)


@pytest.mark.parametrize("seed", range(20))
def test_no_choice_of_densities_drops_less(seed):
    draw, levels = random.Random(seed), (1.0, 0.75, 0.5, 0.25, 0.1)
    curves = {name: {1.0: 0.2, **{d: 0.2 + draw.random() * (1 - d) for d in levels[1:]}} for name in SIZES}
    density = draw.choice([0.2, 0.4, 0.7])
    found = equal_drop(curves, SIZES, density)
    fitting = [choice for choice in (dict(zip(SIZES, some, strict=True))
                                     for some in itertools.product(levels, repeat=len(SIZES)))
               if sum(choice[name] * n for name, n in SIZES.items()) <= density * sum(SIZES.values())]
    below = {name: max(level for level in levels if level <= d + 1e-9) for name, d in found.items()}
    assert worst_drop(curves, below, 1.0) == min(worst_drop(curves, choice, 1.0) for choice in fitting)


def test_widths_out_of_reach():
    with pytest.raises(BudgetError, match="bits = 1: the narrowest widths that were measured take 2 a weight"):
        equal_drop_bits({"a": {32: 0.0, 2: 0.5}}, {"a": 10}, 1)


def test_a_pruned_layer_is_what_zeros_in_its_weight_give(tiny):
    model, task = tiny.model(), tiny.task()
    before = tiny.fingerprint(model)
    found = pruning_curves(model, task, seeded(), [0.3])
    assert tiny.same(tiny.fingerprint(model), before)
    assert found.level == "density" and found.measure == "top1" and found.percent
    for name in ("conv1", "conv3", "fc"):
        other = tiny.model()
        weight = other.get_submodule(name).weight.data
        assert found.sizes[name] == weight.numel()
        weight[weight.abs() < weight.abs().flatten().sort().values[int(0.7 * weight.numel())]] = 0
        assert found.curves[name] == {1.0: task.error(model), 0.3: task.error(other)}


def test_pruned_channels_take_bias_and_batch_norm_along(tiny):
    model, task = tiny.model(), tiny.task()
    found = pruning_curves(model, task, seeded(), [0.5], criterion="l1", granularity="channel")
    assert set(found.curves) == {"conv1, conv2", "conv3"}
    weight = model.conv3.weight.detach()
    least = weight.abs().flatten(1).sum(1).argsort()[:6]
    for tensor in (model.bn3.weight, model.bn3.bias):
        tensor.data[least] = 0
    assert found.curves["conv3"][0.5] == task.error(model) and found.sizes["conv3"] == weight.numel()


def test_criteria_that_see_batches(tiny):
    model, task = tiny.model(), tiny.task()
    found = {criterion: pruning_curves(model, task, seeded(), [0.2], criterion=criterion, batches=2)
             for criterion in ("taylor", "movement", "random", "level")}
    assert len({str(one.curves) for one in found.values()}) == 4
    assert len({one.curves["fc"][1.0] for one in found.values()}) == 1


def test_a_rounded_layer_is_its_grid(tiny):
    model, task = tiny.model(), tiny.task()
    found = quantization_curves(model, task, [2], per_channel=False, layers=["conv2"])
    weight = model.conv2.weight.data
    step = weight.abs().max()
    weight.copy_((weight / step).round().clamp(-1, 1) * step)
    assert list(found.curves) == ["conv2"] and found.curves["conv2"][2] == task.error(model)


def test_what_is_done_is_not_done_again(tiny):
    whole = quantization_curves(tiny.model(), tiny.task(), [4, 2])
    states = {}
    with pytest.raises(tiny.Interrupted):
        quantization_curves(tiny.model(), tiny.task(), [4, 2], run=tiny.Run(states, limit=4))
    assert states
    calls = []
    again = quantization_curves(tiny.model(), tiny.task(), [4, 2], run=tiny.Run(states, calls=calls))
    assert again == whole and sum(what == "save" for _, what in calls) == 2


@pytest.mark.parametrize("method, rates, widths", [
    (pipeline, {"prune": {"rates": "sensitivity"}}, {"quantize": {"widths": "sensitivity"}}),
    (prune_then_quantize, {"rates": "sensitivity"}, {"widths": "sensitivity"})])
def test_methods_choose_rates_of_layers(method, rates, widths, tiny):
    config = build(method.Config, {**rates, **widths})
    out = method.compress(tiny.model(), tiny.task(), Budget(density=0.5, bits=4), config, seeded())
    sizes = {name: tensor.mask.numel() for name, tensor in out.weights.items()}
    bits = {name: tensor.bits for name, tensor in out.weights.items()}
    kept = {name: tensor.kept / sizes[name] for name, tensor in out.weights.items()}
    assert sum(bits[name] * n for name, n in sizes.items()) <= 4 * sum(sizes.values()) and len(set(bits.values())) > 1
    assert max(kept.values()) - min(kept.values()) > 0.1
    assert sum(tensor.kept for tensor in out.weights.values()) <= 0.5 * sum(sizes.values()) + len(sizes)
    for budget, given in (({"density": {"*": 0.5, "fc": 0.9}, "bits": 4}, rates),
                          ({"density": 0.5, "bits": {"*": 4, "fc": 8}}, widths)):
        with pytest.raises(ConfigError, match="takes one"):
            method.compress(tiny.model(), tiny.task(), Budget(**budget), build(method.Config, given), seeded())


@pytest.mark.parametrize("call, message", [
    (lambda tiny: pruning_curves(tiny.model(), None, seeded()), "it needs a task, and there is none"),
    (lambda tiny: pruning_curves(tiny.model(), tiny.task(), seeded(), [0.0]), "rate = 0.0: allowed are numbers in"),
    (lambda tiny: pruning_curves(tiny.model(), tiny.task(), seeded(), []), "rate = nothing"),
    (lambda tiny: pruning_curves(tiny.model(), tiny.task(), seeded(), criterion="l1"), "ranks no single weight"),
    (lambda tiny: pruning_curves(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)), tiny.task(),
                                 seeded(), criterion="slim", granularity="channel"), "no affine one follows 0"),
    (lambda tiny: quantization_curves(tiny.model(), tiny.task(), [1]), "bits = 1: allowed are whole numbers in 2..16"),
    (lambda tiny: quantization_curves(tiny.model(), tiny.task(), layers=["fc9"]), "unknown layers"),
    (lambda tiny: build(pipeline.Quantize, {"widths": "guess"}), "widths = 'guess': allowed are budget, sensitivity"),
    (lambda tiny: build(prune_then_quantize.Config, {"rates": "sensitivity", "scope": "global"}), "scope = 'local'")])
def test_mistakes_are_one_line(call, message, tiny):
    with pytest.raises((ConfigError, BudgetError), match=message) as caught:
        call(tiny)
    assert "\n" not in str(caught.value)


def test_a_criterion_that_needs_batches_and_has_none(tiny):
    task = tiny.task()
    object.__setattr__(task, "train", None)
    with pytest.raises(ConfigError, match="'taylor' needs training batches, and this task holds none"):
        pruning_curves(tiny.model(), task, seeded(), [0.5], criterion="taylor")
