"""Densities of layers by sensitivity: curves measured one layer at a time, equal drops found by trying all."""

import itertools

import pytest
import torch

from benchmarks.settings import build
from methods import pipeline
from methods.core.budget import Budget
from methods.core.errors import ConfigError
from methods.core.fit.layer_rates import LEVELS, equal_drop, measure_curves

SIZES = {"a": 100, "b": 40, "c": 60}


def curve(slope, power):
    return {d: 0.1 + slope * (1 - d) ** power for d in LEVELS}


CURVES = {"a": curve(0.2, 2), "b": curve(0.9, 1), "c": curve(0.5, 3)}


def test_the_levels_are_distillers():
    assert len(LEVELS) == 20 and LEVELS[0] == 1.0 and LEVELS[-1] == 0.05


@pytest.mark.parametrize("density", [1.0, 0.7777, 0.5, 0.2013, 0.05, 0.01])
def test_together_the_layers_keep_the_density(density):
    found = equal_drop(CURVES, SIZES, density)
    assert sum(found[name] * n for name, n in SIZES.items()) == pytest.approx(density * 200)
    assert all(0 < d <= 1 for d in found.values())


def test_drops_are_equal_to_one_level():
    found = equal_drop(CURVES, SIZES, 0.5)
    slopes = {"a": (0.2, 2), "b": (0.9, 1), "c": (0.5, 3)}
    drops = {name: s * (1 - found[name]) ** p for name, (s, p) in slopes.items()}
    for one, other in itertools.permutations(SIZES, 2):
        slope, power = slopes[other]
        assert drops[one] <= slope * (1 - found[other] + 0.1) ** power, (one, other)
    assert found["b"] > found["a"]


def test_a_bump_is_not_jumped_over():
    bumpy = {"a": {1.0: 0.0, 0.5: 0.9, 0.1: 0.0}, "b": {1.0: 0.0, 0.5: 0.1, 0.1: 0.2}}
    found = equal_drop(bumpy, {"a": 10, "b": 10}, 0.55)
    assert found == pytest.approx({"a": 1.0, "b": 0.1})


def test_curves_prune_one_layer_at_a_time_and_leave_it_dense():
    state, seen = {"a": 1.0, "b": 1.0}, []

    def error():
        seen.append(dict(state))
        return 1 - state["a"] * state["b"]

    curves = measure_curves(["a", "b"], state.__setitem__, error, levels=(1.0, 0.5, 0.25))
    assert curves == {name: {1.0: 0.0, 0.5: 0.5, 0.25: 0.75} for name in "ab"} and state == {"a": 1.0, "b": 1.0}
    assert all(list(one.values()).count(1.0) >= 1 for one in seen) and len(seen) == 5


def test_a_pipeline_prunes_by_sensitivity(tiny):
    model = tiny.model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = build(pipeline.Config, {"prune": {"rates": "sensitivity"}, "activations": "float"})
    assert config.data == "held_out"
    out, even = (pipeline.compress(model, tiny.task(), Budget(density=0.4, bits=8), c, torch.Generator())
                 for c in (config, pipeline.Config(activations="float")))
    total = sum(tensor.mask.numel() for tensor in out.weights.values())
    kept = {name: tensor.kept for name, tensor in out.weights.items()}
    assert 0.38 * total < sum(kept.values()) <= 0.4 * total + len(kept)
    assert kept != {name: tensor.kept for name, tensor in even.weights.items()}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("given, message", [
    ({"rates": "guess"}, "rates = 'guess': allowed are budget, sensitivity"),
    ({"rates": "sensitivity", "scope": "global"}, "granularity = 'weight' and scope = 'local'"),
    ({"rates": "sensitivity", "granularity": "channel", "criterion": "l1"}, "granularity = 'weight'")])
def test_settings_that_do_not_fit(given, message):
    with pytest.raises(ConfigError, match=message):
        build(pipeline.Prune, given)


def test_sensitivity_takes_one_density(tiny):
    config = build(pipeline.Config, {"prune": {"rates": "sensitivity"}, "activations": "float"})
    with pytest.raises(ConfigError, match="rates = 'sensitivity' takes one density, not"):
        pipeline.compress(tiny.model(), tiny.task(), Budget(density={"*": 0.5, "fc": 0.9}, bits=8), config,
                          torch.Generator())
