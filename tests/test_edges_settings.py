"""Weights and settings at the edge of what methods take: zeros, frozen ones, refusals before the work, advice."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from methods import (
    admm,
    annc,
    clip_q,
    deep_compression,
    df_mpc,
    dfq,
    iterative_sensitivity,
    neuron_merging,
    pipeline,
    prune_then_quantize,
    rptq,
    udfc,
)
from methods import sequential_reconstruction as sequential
from methods.admm import Training, prune
from methods.core.budget import Budget
from methods.core.errors import BudgetError, CompressError, ConfigError
from methods.core.fit.cluster import EXACT_CELLS, check_cells
from methods.core.fit.size import compress_to_size
from methods.core.graph.build import apply
from methods.core.train.recipe import Distill, Recipe
from methods.core.train.run import NullRun
from methods.core.train.task import Task
from methods.pipeline.pruning import Rewind, started_anew
from tests.edge_networks import NONE, SMALL, chain, seeded, task

# --- weights -----------------------------------------------------------------------------------------------------


def test_what_is_given_as_zero_stays_zero_in_admm():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        model[1].weight[torch.rand(8, 192, generator=seeded()) < 0.7] = 0
    gone = model[1].weight == 0
    config = admm.Config(prune_iterations=0, retrain=NONE, quantize_iterations=0, fix_rounds=0)
    for density, most in ((1.0, int((~gone).sum())), (0.25, 384)):
        made = admm.compress(model, task(), Budget(density=density, bits=3), config, seeded())
        mask = made.weights["1"].mask
        assert not mask[gone].any() and int(mask.sum()) == most <= int((~gone).sum())
    weights = {"1": model[1].weight}
    masks = prune(weights, {"1": 1.0}, Training(model, task(), config, seeded(), NullRun(), {}))
    assert torch.equal(masks["1"], ~gone)


@pytest.mark.parametrize("rounding", ["gptq", "descent"])
def test_rounding_again_knows_what_was_pruned_and_may_wake_what_was_rounded_to_zero(rounding, monkeypatch):
    """Without training the float weights outside the mask are handed on, with training there are none; at 3 bits many
    kept weights are nearest to 0, and the sum of an output may be better with other codes for some."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 4))
    seen = {}

    def spy(folded, weights, *others, masks, **more):
        made = real(folded, weights, *others, masks=masks, **more)
        seen.update(floats=folded.get_submodule("1").weight, mask=masks["1"], near=weights["1"], far=made[1]["1"])
        return made

    real = prune_then_quantize.round_again
    monkeypatch.setattr(prune_then_quantize, "round_again", spy)
    config = prune_then_quantize.Config(rounding=rounding, scheme="mse", calibration_inputs=32)
    prune_then_quantize.compress(model, task(), Budget(density=0.5, bits=3), config, seeded())
    assert torch.equal(seen["floats"], model[1].weight) and int(seen["mask"].sum()) == 1536
    assert not bool(seen["far"].mask[~seen["mask"]].any())
    prune_then_quantize.compress(model, task(), Budget(density=1.0, bits=3), config, seeded())
    assert bool((seen["far"].mask & ~seen["near"].mask).any())
    prune_then_quantize.compress(model, task(), Budget(density=0.5, bits=3),
                                 replace(config, retrain=Recipe(1, 0.01)), seeded())
    assert not seen["floats"][~seen["mask"]].any()


@pytest.mark.parametrize("criterion", ["taylor", "movement"])
def test_frozen_weights_have_the_scores_that_others_have(criterion):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 4))
    config = pipeline.Config(order=("prune", "quantize"), prune=pipeline.Prune(criterion=criterion))
    masks = []
    for frozen in ((), (1,), (1, 3)):
        for i in (1, 3):
            model[i].weight.requires_grad_(i not in frozen)
            model[i].bias.requires_grad_(len(frozen) < 2)
        made = pipeline.compress(model, task(), Budget(density=0.5, bits=8), config, seeded())
        masks.append({name: tensor.mask for name, tensor in made.weights.items()})
    assert all(torch.equal(one[name], masks[0][name]) for one in masks for name in ("1", "3"))
    assert int(masks[0]["1"].sum()) > 700 and not torch.equal(masks[0]["1"].flatten(), torch.arange(1536) < 768)


def test_a_network_started_anew_draws_all_but_what_is_frozen():
    model = nn.ModuleDict({"attend": nn.MultiheadAttention(8, 2), "fc": nn.Linear(8, 8), "held": nn.Linear(8, 8)})
    with torch.no_grad():
        for value in model.parameters():
            value.fill_(3.0)
    model["held"].requires_grad_(False)
    found = started_anew(model, seeded()).state_dict()
    for name, value in found.items():
        assert bool((value == 3).all() if name.startswith("held") else not (value == 3).any()), name


def test_a_module_called_quantizer_is_wound_back():
    model = nn.Sequential()
    model.add_module("quantizer", nn.Sequential(nn.Linear(2, 2)))
    model.quantizer.register_buffer("mask", torch.ones(2))
    assert set(Rewind(model, 0).values) == {"quantizer.0.weight", "quantizer.0.bias", "quantizer.mask"}


def test_widths_that_sensitivity_once_cannot_reach_are_refused_at_once(monkeypatch):
    """2 bits everywhere would do, but it lowers to 4."""
    monkeypatch.setattr(Task, "error", lambda *_: pytest.fail("it measures first"))
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 4))
    config = iterative_sensitivity.Config(bops_percent=2.0, order="once", calibration_inputs=16)
    with pytest.raises(BudgetError, match="bops_percent = 2: order = 'once' ends at 4 bits everywhere"):
        iterative_sensitivity.compress(model, task(), Budget(), config, seeded())


def test_a_frozen_network_may_be_compressed_without_training():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 4)).requires_grad_(False)
    config = deep_compression.Config(rounds=1, retrain=NONE, tune=replace(NONE, weight_decay=0.0))
    assert deep_compression.compress(model, task(), Budget(density=0.5, bits=3), config, seeded()).weights
    config = deep_compression.Config(rounds=1, retrain=Recipe(1, 0.01), tune=replace(NONE, weight_decay=0.0))
    with pytest.raises(ConfigError, match="no parameter of the network requires a gradient"):
        deep_compression.compress(model, task(), Budget(density=0.5, bits=3), config, seeded())


def test_a_search_that_probes_has_a_teacher_even_if_nothing_is_tuned_afterwards():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 4))
    config = clip_q.Config(search="random", evaluations=2, probe=1, finetune=replace(NONE, distill=Distill()))
    assert clip_q.compress(model, task(), Budget(), config, seeded()).weights


def test_a_mean_width_that_no_choice_has_is_refused_before_training(monkeypatch):
    monkeypatch.setattr(prune_then_quantize, "train", lambda *_, **__: pytest.fail("it trains first"))
    config = prune_then_quantize.Config(scheme="asymmetric", widths="sensitivity", retrain=Recipe(1, 0.01))
    with pytest.raises(BudgetError, match="budget bits = 1 with widths = 'sensitivity': allowed is 2 or more"):
        prune_then_quantize.compress(chain(), task(), Budget(density=0.5, bits=1), config, seeded())


def test_an_error_that_is_no_number_never_wins_a_search(monkeypatch):
    errors = iter([float("nan"), 0.5, 0.1] * 4)
    monkeypatch.setattr(Task, "error", lambda self, model: next(errors))
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 4))
    config = clip_q.Config(search="random", evaluations=3, probe=0, lam=0.0, finetune=NONE)
    found = clip_q.compress(model, task(), Budget(), config, seeded()).notes
    for trace_of in found["trace"].values():
        assert min(one["objective"] for one in trace_of) == 0.1
        assert sum(one["objective"] == math.inf for one in trace_of) == 1
    monkeypatch.setattr(Task, "error", lambda self, model: float("nan"))
    with pytest.raises(CompressError, match="no choice for 1 has a finite error"):
        clip_q.compress(model, task(), Budget(), config, seeded())


# --- settings and advice -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make, message", [
    (lambda: udfc.Config(criterion="l3"), "criterion = 'l3'"), (lambda: neuron_merging.Config(criterion="l3"), "'l3'"),
    (lambda: sequential.Config(criterion="l3"), "criterion = 'l3'"),
    (lambda: neuron_merging.Config(threshold=float("nan")), "threshold = nan"),
    (lambda: dfq.Config(tolerance=float("nan")), "tolerance = nan"),
    (lambda: dfq.Config(scheme="odd"), "scheme = 'odd'"),
    (lambda: dfq.Config(activation_bits=2.5), "activation_bits = 2.5"),
    (lambda: dfq.Config(activation_bits=None, sigmas=3.0), "sigmas = 3.0 does nothing"),
    (lambda: dfq.Config(equalize=False, rounds=3), "rounds = 3 does nothing"),
    (lambda: df_mpc.Config(compensate=False, lambda1=9.0), "lambda1 = 9.0 does nothing"),
    (lambda: neuron_merging.Config(merge=False, lam=0.5), "lam = 0.5 does nothing"),
    (lambda: udfc.Config(reconstruct=False, nonneg=True), "nonneg = True does nothing"),
    (lambda: udfc.Config(image_size=8), "image_size = 8 does nothing: batchnorm = 'keep'"),
    (lambda: annc.Config(live=True, at_least=3), "live = True with at_least = 3"),
    (lambda: annc.Config(stages=(float("nan"), 1.0)), "stages ="),
    (lambda: admm.Config(steps=(float("nan"), 1.0)), "steps ="),
    (lambda: annc.Config(mode="quantize", start_bits=5), "start_bits = 5 does nothing"),
    (lambda: admm.Config(rho=()), r"rho = \(\)"),
    (lambda: admm.Config(fix_rounds=0, fix_fraction=0.5), "fix_fraction = 0.5 does nothing"),
    (lambda: check_cells(EXACT_CELLS // 3 + 1, 3), "needs too much memory")])
def test_what_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_exact_k_means_is_refused_before_the_pruning(monkeypatch):
    monkeypatch.setattr("methods.core.fit.cluster.EXACT_CELLS", 1000)
    monkeypatch.setattr(deep_compression, "train", lambda *_, **__: pytest.fail("it prunes first"))
    with pytest.raises(ConfigError, match="needs too much memory"):
        deep_compression.compress(chain(), task(), Budget(density=0.5, bits=4), deep_compression.Config(init="exact"),
                                  seeded())


@pytest.mark.parametrize("channels", [3, 12, 48, 64, 512])
def test_the_least_density_that_is_named_is_enough(channels):
    model = nn.Sequential(nn.Conv2d(1, channels, 1), nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, 4, 1),
                          nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4)).eval()
    with pytest.raises(BudgetError, match="leaves no channel") as caught:
        udfc.compress(model, None, Budget(channel_density=0.001), udfc.Config(), seeded())
    density = float(str(caught.value).rpartition("allowed is ")[2].split()[0])
    assert udfc.compress(model, None, Budget(channel_density={"0": density}), udfc.Config(), seeded()).rest


def test_the_least_size_that_is_named_is_enough():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 4))
    config = deep_compression.Config(rounds=1, retrain=NONE, tune=replace(NONE, weight_decay=0.0))
    with pytest.raises(BudgetError, match="allowed are numbers of about") as caught:
        compress_to_size(deep_compression, model, task(), Budget(size_ratio=0.02, bits=3), config, seeded())
    ratio = float(str(caught.value).rpartition("of about ")[2].split()[0])
    assert compress_to_size(deep_compression, model, task(), Budget(size_ratio=ratio, bits=3), config, seeded()).weights


def test_the_bits_that_df_mpc_turns_are_those_that_it_takes():
    with pytest.raises(BudgetError, match="the smallest file that bits reaches"):
        compress_to_size(df_mpc, chain(), None, Budget(size_ratio=0.02), df_mpc.Config(low_bits=3), seeded())


def test_ridges_that_are_too_small_are_said():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 8),
                          nn.ReLU(), nn.Linear(8, 4)).eval()
    with pytest.raises(CompressError, match="ridge = 1e-10 is too small for 8 values of 512 inputs"):
        sequential.compress(model, None, Budget(bits=4), replace(SMALL, ridge=1e-10), seeded())


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("method, budget, config", [
    (deep_compression, {"density": 0.5, "bits": 3}, deep_compression.Config(rounds=1, retrain=NONE, tune=replace(
        NONE, weight_decay=0.0))),
    (prune_then_quantize, {"density": 0.5, "bits": 3}, prune_then_quantize.Config(calibration_inputs=16)),
    (rptq, {"size_ratio": 0.3}, rptq.Config(sensitivity_inputs=16, calibration_inputs=16)),
    (dfq, {"bits": 8}, dfq.Config())])
def test_a_layer_without_a_single_weight_is_left_alone(method, budget, config):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.none = nn.Linear(192, 8), nn.Linear(8, 4), nn.Linear(8, 0)

        def forward(self, x):
            return self.b(torch.relu(self.a(torch.flatten(x, 1))))

    torch.manual_seed(0)
    made = method.compress(Net(), task(), Budget(**budget), config, seeded())
    assert set(made.weights) == {"a", "b"} and apply(made, Net())(torch.rand(2, 3, 8, 8)).shape == (2, 4)
