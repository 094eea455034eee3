"""Settings, networks, budgets and data that a pipeline refuses, each in one line and before anything long."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks.settings import build
from methods import pipeline
from methods.core.budget import Budget
from methods.core.errors import BudgetError, CompressError, ConfigError

SHORT = {"epochs": 1, "lr": 0.01}
AGP = {"schedule": "agp", "recipe": SHORT}


def made(tiny, config, model=None, task=None, **budget):
    model = tiny.model() if model is None else model
    task = tiny.task() if task is None else task
    return pipeline.compress(model, task, Budget(**budget), build(pipeline.Config, config),
                             torch.Generator().manual_seed(0))


@pytest.mark.parametrize("config, message", [
    ({"quantize": {"quantizer": "bnn", "recipe": SHORT}}, "'bnn' has no 0 that a single weight could be pruned to"),
    ({"quantize": {"quantizer": "dorefa", "recipe": SHORT}}, "'dorefa' has no 0"),
    ({"quantize": {"quantizer": "lsq"}}, "'lsq' is trained through: give quantize.recipe"),
    ({"quantize": {"recipe": SHORT}}, "recipe = .* does nothing: quantizer = 'rtn' is not trained through"),
    ({"quantize": {"quantizer": "lsq", "scheme": "mse", "recipe": SHORT}}, "scheme = 'mse' does nothing"),
    ({"quantize": {"quantizer": "float8"}}, "quantizer = 'float8': allowed are rtn"),
    ({"order": ["prune"]}, "quantize has to be there"),
    ({"order": ["quantize", "prune", "prune"]}, "each at most once"),
    ({"order": ["quantize", "distil"]}, "give distil, its recipe"),
    ({"order": ["quantize"], "prune": {"scope": "global"}}, "prune = .* does nothing: order has no prune stage"),
    ({"distil": SHORT}, "distil = .* does nothing: order has no distil stage"),
    ({"activations": "dynamic"}, "a file holds fixed ranges"),
    ({"activations": "static16"}, "activations = 'static16': allowed are 'static', 'float'"),
    ({"activations": "float", "activation_bits": 4}, "activation_bits = 4 does nothing"),
    ({"prune": {"criterion": "fpgm"}}, "criterion = 'fpgm' ranks no single weight"),
    ({"prune": {"schedule": "agp"}}, "schedule = 'agp' prunes while it trains: give prune.recipe"),
    ({"prune": {"updates": 3}}, "updates = 3 does nothing: schedule = 'one_shot'"),
    ({"prune": {**AGP, "rewind": 3}}, "rewind = 3 does nothing"),
    ({"prune": {**AGP, "before": SHORT}}, "before = .* does nothing"),
    ({"prune": {**AGP, "updates": 0}}, "updates = 0: allowed is 1 or more"),
    ({"prune": {**AGP, "until": 0.0}}, "until = 0.0"),
    ({"prune": {"penalty": 1.0}}, "penalty = 1.0 does nothing: criterion = 'level'"),
    ({"prune": {"scope": "global", "floor": 1.5}}, "floor = 1.5: allowed is a number in"),
    ({"prune": {"floor": 0.5}}, "floor = 0.5 does nothing: scope = 'local'"),
    ({"prune": {"scope": "layer"}}, "scope = 'layer': allowed are local, global"),
    ({"order": ["quantize", "prune"], "prune": {"schedule": "lottery", "fresh": True, "recipe": SHORT}},
     "fresh = True starts from initial weights: prune has to be first")])
def test_settings_without_sense_are_refused_in_one_line(config, message):
    with pytest.raises(ConfigError, match=message) as caught:
        build(pipeline.Config, config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config, budget, kind, message", [
    ({"prune": {"criterion": "slim", "granularity": "channel"}}, {"channel_density": 0.5, "bits": 8}, ConfigError,
     "no affine one follows 0"),
    ({"quantize": {"quantizer": "bnn", "recipe": SHORT}, "order": ["quantize"]}, {"bits": 2}, ConfigError,
     "bits = 2: bnn takes 1"),
    ({"order": ["quantize"]}, {"bits": 1}, ConfigError, "bits = 1: a symmetric grid"),
    ({"prune": {"scope": "global"}}, {"density": {"0": 0.5, "2": 0.4}, "bits": 8}, ConfigError, "takes one density"),
    ({"prune": {"granularity": "channel", "criterion": "l1"}}, {"channel_density": {"2": 0.5}, "bits": 8},
     CompressError, "no layer of which channels could go"),
    ({}, {"channel_density": 0.5, "bits": 8}, BudgetError, "needs the budget field 'density'; it takes: density, bits"),
    ({"quantize": {"quantizer": "float16"}}, {"density": 0.5, "bits": 16}, BudgetError, "cannot honour .* 'bits'")])
def test_networks_and_budgets_that_do_not_fit_are_refused(config, budget, kind, message, tiny):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(kind, match=message) as caught:
        made(tiny, config, model=model, **budget)
    assert "\n" not in str(caught.value)


def test_layers_that_share_channels_take_one_density(tiny):
    with pytest.raises(BudgetError, match="conv1, conv2 share their channels: channel_density .* one number"):
        made(tiny, {"prune": {"granularity": "channel", "criterion": "l1"}}, bits=8,
             channel_density={"conv1": 0.5, "conv2": 0.25, "conv3": 0.5})


def test_data_that_is_not_there_is_said_before_anything(tiny):
    blind = replace(tiny.task(), train=None, calibration=tiny.task().train)
    with pytest.raises(ConfigError, match="criterion = 'taylor' needs training batches.*: without there are level, l1"):
        made(tiny, {"prune": {"criterion": "taylor"}}, task=blind, density=0.5, bits=8)
    with pytest.raises(ConfigError, match="no training batches"):
        made(tiny, {"prune": {"recipe": SHORT}}, task=blind, density=0.5, bits=8)
    with pytest.raises(ConfigError, match="with these settings pipeline needs a task"):
        pipeline.compress(tiny.model(), None, Budget(density=0.5, bits=8),
                          build(pipeline.Config, {"prune": {"recipe": SHORT}}), torch.Generator())
    with pytest.raises(ConfigError, match="updates = 10: the first 25% of prune.recipe are 1 steps"):
        made(tiny, {"prune": AGP}, density=0.5, bits=8)
    with pytest.raises(ConfigError, match="rewind = 99: prune.recipe has 4 steps"):
        made(tiny, {"prune": {"schedule": "lottery", "rewind": 99, "recipe": SHORT}}, density=0.5, bits=8)
