"""ADMM: levels and clusters of the survivors, what is fixed, and what moves together."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from methods import admm
from methods.admm import Config, Training, compress, fix_levels
from methods.admm.hooks import HoldHooks, TieHooks
from methods.core.artifact import Codebook, Levels
from methods.core.budget import Budget
from methods.core.errors import ConfigError
from methods.core.fit.project import Clusters, Intervals, project_sparse
from methods.core.fit.prune import keep_count
from methods.core.graph.build import weight_layers
from methods.core.train.finetune import Recipe, train
from methods.core.train.run import NullRun

LAYERS = ("conv1", "conv2", "conv3", "fc")
EPOCH = Recipe(epochs=1, lr=0.02)
SHORT = Config(rho=(0.1,), prune_iterations=2, prune=EPOCH, retrain=EPOCH, quantize_rho=(0.1,), quantize_iterations=1,
               quantize=EPOCH, fix_rounds=2, fix=EPOCH)


def on(grid):
    """SHORT for a grid: clusters have no rounds of fixing."""
    return SHORT if grid == "levels" else replace(SHORT, grid=grid, fix_rounds=Config.fix_rounds)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def weights_of(model):
    return {name: layer.weight for name, layer in weight_layers(model).items()}


@pytest.mark.parametrize("grid, refit", [("levels", False), ("levels", True), ("clusters", False)])
def test_survivors_end_on_their_grid(tiny, grid, refit):
    bits = {"conv1": 3, "conv2": 2, "conv3": 4, "fc": 1}
    config = replace(on(grid), refit=refit, quantize_iterations=2)
    out = compress(tiny.model(), tiny.task(), Budget(density=0.3, bits=bits), config, seeded())
    for name, tensor in out.weights.items():
        values = tensor.decode()[tensor.mask]
        assert tensor.kept == keep_count(tensor.mask.numel(), 0.3) and tensor.bits == bits[name]
        assert len(values.unique()) <= 2 ** bits[name]
        if grid == "levels":
            assert isinstance(tensor.grid, Levels)
            half = 2 ** (bits[name] - 1)
            assert tensor.grid.levels.tolist() == [*range(-half, 0), *range(1, half + 1)]
        else:
            assert isinstance(tensor.grid, Codebook) and not tensor.grid.has_zero()


def test_levels_are_fitted_again_only_if_asked(tiny):
    scales = [compress(tiny.model(), tiny.task(), Budget(density=0.5, bits=3), replace(SHORT, refit=refit), seeded())
              .weights["conv2"].grid.scale for refit in (False, False, True)]
    assert torch.equal(scales[0], scales[1]) and not torch.equal(scales[0], scales[2])


def test_density_1_quantizes_only(tiny):
    run = tiny.Run()
    out = compress(tiny.model(), tiny.task(), Budget(density=1.0, bits=3), SHORT, seeded(), run=run)
    assert all(tensor.density == 1.0 for tensor in out.weights.values())
    assert run.calls and not any("prune" in name for name, _ in run.calls)


def test_fixed_and_pruned_weights_never_change_again(tiny, monkeypatch):
    model = tiny.model()
    weights = weights_of(model)
    masks = {name: w.detach().abs() > w.detach().abs().median() for name, w in weights.items()}
    with torch.no_grad():
        for name, w in weights.items():
            w.mul_(masks[name])
    grids = {name: Intervals(w.detach()[masks[name]], 3) for name, w in weights.items()}
    before, plain = [], admm.train

    def watch(model, task, recipe, generator, *, hooks=None, run=None):
        free = {name: f.bool() for name, f in zip(weights, hooks.free, strict=True)}
        before.append((free, {name: w.detach().clone() for name, w in weights.items()}))
        plain(model, task, Recipe(epochs=3, lr=0.05, momentum=0.9, weight_decay=0.05), generator, hooks=hooks, run=run)
        for name, w in weights.items():
            assert torch.equal(w[~free[name]], before[-1][1][name][~free[name]]), name  # bit for bit
            assert not torch.equal(w, before[-1][1][name])

    monkeypatch.setattr(admm, "train", watch)
    first = {name: w.detach().clone() for name, w in weights.items()}
    config = replace(SHORT, fix_rounds=3, fix_fraction=0.4)
    fix_levels(weights, masks, grids, Training(model, tiny.task(), config, seeded(), NullRun(), {}))
    last = masks
    for r, (free, values) in enumerate(before):
        for name in LAYERS:
            assert bool((last[name] | ~free[name]).all())  # fixed stays fixed
            done = last[name] & ~free[name]
            levels = grids[name].interval * torch.tensor([-4.0, -3, -2, -1, 1, 2, 3, 4])
            assert bool(((values[name][done][:, None] - levels).abs().amin(1) < 1e-6).all())
            if r == 0:  # per level, not per layer
                near = grids[name].values(first[name][masks[name]])
                for level in near.unique():
                    members = near == level
                    assert int(done[masks[name]][members].sum()) == math.ceil(0.4 * int(members.sum()) - 1e-9)
        last = free
    assert all(not bool(w[~masks[name]].any()) for name, w in weights.items())


def test_held_weights_survive_momentum(tiny):
    model = tiny.model()
    weights = weights_of(model)
    free = {name: torch.rand(w.shape, generator=seeded()) < 0.5 for name, w in weights.items()}
    before = {name: w.detach().clone() for name, w in weights.items()}
    train(model, tiny.task(), Recipe(epochs=2, lr=0.05, optimizer="adam"), seeded(), hooks=HoldHooks(weights, free))
    for name, w in weights.items():
        assert torch.equal(w[~free[name]], before[name][~free[name]])
        assert bool((w[free[name]] != before[name][free[name]]).any())


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_members_of_a_cluster_move_by_the_sum_of_their_gradients(tiny, optimizer):
    model = tiny.model()
    weights = weights_of(model)
    masks = {name: w.detach().abs() > 0.1 for name, w in weights.items()}
    grids = {name: Clusters(w.detach()[masks[name]], 2) for name, w in weights.items()}
    codes = {name: grids[name].codes(w.detach()[masks[name]]) for name, w in weights.items()}
    hooks = TieHooks(weights, masks, grids)
    for name, w in weights.items():
        assert torch.equal(w[masks[name]], grids[name].grid().values[codes[name]]) and not bool(w[~masks[name]].any())
    inputs = tiny.Batches(24, 5)
    nn.functional.cross_entropy(model.train()(inputs.inputs), inputs.targets).backward()
    single = {name: w.grad.clone() for name, w in weights.items()}
    hooks.after_backward(model, 0.1)
    for name, w in weights.items():
        for code in range(4):
            summed = single[name][masks[name]][codes[name] == code].double().sum()
            assert torch.allclose(w.grad[masks[name]][codes[name] == code].double(), summed, atol=1e-6)
        assert not bool(w.grad[~masks[name]].any())
    train(model, tiny.task(), Recipe(epochs=2, lr=1e-3, optimizer=optimizer), seeded(), hooks=hooks)
    for name, w in weights.items():
        kept = w.detach()[masks[name]]
        assert len(kept.unique()) == 4 and not bool(w[~masks[name]].any())
        for code in range(4):
            assert len(kept[codes[name] == code].unique()) == 1
        assert not torch.equal(kept[codes[name] == 0][0], grids[name].grid().values[0])
    with torch.no_grad():  # whatever rounding an optimizer adds, members stay one value
        for w in weights.values():
            w.add_(1e-3 * torch.randn(w.shape, generator=seeded()))
    hooks.after_step(model, 0.1)
    for name, w in weights.items():
        assert len(w.detach()[masks[name]].unique()) == 4 and not bool(w[~masks[name]].any())


def test_clusters_refuse_an_optimizer_whose_steps_differ_within_one():
    with pytest.raises(ConfigError, match="fix.optimizer = 'muon'.*sgd and adam"):
        Config(grid="clusters", fix=Recipe(epochs=1, lr=0.1, optimizer="muon"))


def test_channels_last_and_frozen_layers(tiny):
    outs = [compress(tiny.model(), tiny.task(channels_last=last), Budget(density=0.3, bits=3),
                     replace(SHORT, prune=Recipe(epochs=0, lr=0.1), retrain=Recipe(epochs=0, lr=0.1), fix_rounds=4,
                             quantize=Recipe(epochs=0, lr=0.1), fix=Recipe(epochs=0, lr=0.1)), seeded())
            for last in (False, True)]
    for name in LAYERS:  # nothing is trained: only the order of memory differs
        assert torch.equal(outs[0].weights[name].decode(), outs[1].weights[name].decode())
    model = tiny.model()
    model.conv2.weight.requires_grad_(False)
    out = compress(model, tiny.task(channels_last=True), Budget(density=0.3, bits=3), SHORT, seeded())
    wanted = project_sparse(model.conv2.weight, keep_count(model.conv2.weight.numel(), 0.3))
    assert torch.equal(out.weights["conv2"].mask, wanted != 0)


def test_layers_without_a_weight_are_named(tiny):
    """A centroid of exactly 0 prunes its members: here all of a layer that is 0 and stays so."""
    model = tiny.model()
    with torch.no_grad():
        model.conv2.weight.zero_().requires_grad_(False)
    pruned = Config(rho=(0.1,), prune_iterations=2, prune=EPOCH, retrain=EPOCH)
    for config, bits, empty in ((on("clusters"), 2, ["conv2"]), (pruned, None, ["conv2"]), (on("levels"), 2, [])):
        out = compress(model, tiny.task(), Budget(density=0.5, bits=bits), config, seeded())
        assert out.notes["empty_layers"] == empty, (config.grid, bits)
