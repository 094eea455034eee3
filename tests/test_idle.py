"""Settings that do nothing: refused where they are set, and not counted."""

import pytest

from benchmarks.settings import build, count_knobs
from methods import admm, annc, bayesian_bits, clip_q, deep_compression, sparq
from methods.core.errors import ConfigError
from methods.core.train.finetune import Recipe

RECIPE = count_knobs(Recipe(1, 0.1))


@pytest.mark.parametrize("method, given, message", [
    (deep_compression, {"tune": {"lr": 1e-3, "weight_decay": 1e-3}}, "tune.weight_decay = 0.001 does nothing"),
    (clip_q, {"search": "uniform", "lam": 2.0}, "lam = 2.0 does nothing: search = 'uniform'"),
    (clip_q, {"search": "uniform", "evaluations": 3}, "evaluations = 3 does nothing"),
    (clip_q, {"search": "random", "initial": 3}, "initial = 3 does nothing: search = 'random'"),
    (admm, {"grid": "clusters", "fix_rounds": 2}, "fix_rounds = 2 does nothing: grid = 'clusters'"),
    (annc, {"mode": "prune", "rho": 0.1}, "rho = 0.1 does nothing: mode = 'prune'"),
    (annc, {"mode": "quantize", "fill": True}, "fill = True does nothing"),
    (sparq, {"windows": "none", "paired": False}, "paired = False does nothing"),
    (bayesian_bits, {"fixed_range_lr": 0.1}, "fixed_range_lr = 0.1 does nothing: there is no phase 2")])
def test_a_setting_without_effect_is_refused_where_it_is_set(method, given, message):
    with pytest.raises(ConfigError, match=message):
        build(method.Config, given)


def test_a_recipe_written_out_keeps_the_defaults_of_its_class():
    assert deep_compression.Config(tune=Recipe(1, 1e-4)).tune.epochs == 1  # its weight decay is nobody's choice
    assert deep_compression.Config(tune=Recipe(1, 1e-4, weight_decay=0.0)).rounds == 3


def test_what_does_nothing_is_no_knob():
    assert count_knobs(deep_compression.Config()) == 2 + 2 * RECIPE - 1
    searched, uniform, random = (clip_q.Config(search=s) for s in ("bayes", "uniform", "random"))
    assert count_knobs(searched) - count_knobs(uniform) == len(clip_q.SEARCHING)
    assert count_knobs(searched) - count_knobs(random) == 1
    assert count_knobs(sparq.Config()) - count_knobs(sparq.Config(windows="none")) == 2
    phase_2 = bayesian_bits.Config(fixed=bayesian_bits.FixedRecipe(1, 1e-3))
    assert count_knobs(phase_2) - count_knobs(bayesian_bits.Config()) == RECIPE  # fixed itself becomes a recipe
