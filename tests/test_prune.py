"""Magnitude pruning: exact counts, one ranking or many, and masks that survive every optimizer."""

import math
from fractions import Fraction

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from methods.core.errors import BudgetError
from methods.core.fit.prune import MaskHooks, apply_masks, keep_count, keep_global, keep_largest, keep_local
from methods.core.train.finetune import Hooks, Recipe, train

DENSITIES = ["0.01", "0.07", "0.1", "0.29", "0.3", "0.5", "0.58", "0.7", "0.9", "0.99", "1"]


@pytest.mark.parametrize("n", [1, 9, 10, 100, 12345, 37_748_736, 138_000_000, 10**9])
def test_count_is_the_density_rounded_up(n):
    for text in DENSITIES:
        exact = Fraction(text) * n  # what the user wrote, not the nearest binary number
        assert keep_count(n, float(text)) == max(math.ceil(exact), 1)
        assert n - keep_count(n, float(text)) == min(math.floor((1 - Fraction(text)) * n), n - 1)


def test_exact_number_whatever_ties():
    scores = torch.tensor([[3.0, 1.0, 1.0], [1.0, 1.0, 2.0]])
    wanted = {0: [], 1: [0], 2: [0, 5], 3: [0, 1, 5], 4: [0, 1, 2, 5], 5: [0, 1, 2, 3, 5], 6: [0, 1, 2, 3, 4, 5]}
    for count, kept in wanted.items():
        assert keep_largest(scores, count).reshape(-1).nonzero()[:, 0].tolist() == kept
    assert int(keep_largest(torch.zeros(1000), 333).sum()) == 333  # a threshold would keep 0 or 1000
    for count in (-1, 7):
        with pytest.raises(BudgetError, match="of 6"):
            keep_largest(scores, count)


@pytest.mark.parametrize("seed", range(5))
def test_no_pruned_weight_is_larger_than_a_kept_one(seed):
    scores = torch.randint(0, 8, (7, 11), generator=torch.Generator().manual_seed(seed)).float()
    for count in range(1, 77):
        mask = keep_largest(scores, count)
        assert int(mask.sum()) == count
        if count < 77:
            assert scores[~mask].max() <= scores[mask].min()
            assert bool((keep_largest(scores, count + 1) | ~mask).all())  # nested: what is kept at less stays at more


def layers(seed=0):
    draw = torch.Generator().manual_seed(seed)
    return {"wide": torch.randn(8, 3, 3, 3, generator=draw), "small": 0.01 * torch.randn(5, 4, generator=draw)}


def test_local_ranks_each_layer():
    weights = layers()
    masks = keep_local(weights, {"wide": 0.25, "small": 0.5})
    assert int(masks["wide"].sum()) == 54 and int(masks["small"].sum()) == 10
    for name, weight in weights.items():
        bar = weight.abs().reshape(-1).sort().values[-int(masks[name].sum())]
        assert torch.equal(masks[name], weight.abs() >= bar)  # no ties here: the definition by threshold


def test_global_ranks_all_layers_together():
    weights = {"a": torch.tensor([[5.0, -4.0], [0.3, 0.2]]), "b": torch.tensor([[-3.0, 0.1]])}
    masks = keep_global(weights, 0.5)
    assert masks["a"].tolist() == [[True, True], [False, False]] and masks["b"].tolist() == [[True, False]]
    assert keep_global(weights, 1.0)["b"].all()


def test_no_layer_is_lost_and_the_count_still_holds():
    weights = layers()
    masks = keep_global(weights, 0.1)
    assert int(masks["small"].sum()) == 1 and bool(masks["small"].reshape(-1)[weights["small"].abs().argmax()])
    assert sum(int(mask.sum()) for mask in masks.values()) == keep_count(236, 0.1) == 24
    assert all(int(mask.sum()) == 1 for mask in keep_global(weights, 0.0001).values())
    assert int(keep_local({"w": torch.rand(3, 3)}, {"w": 0.001})["w"].sum()) == 1


def test_global_masks_are_nested():
    weights, before = layers(3), None
    for density in (0.9, 0.6, 0.3, 0.05):
        masks = keep_global(weights, density)
        assert before is None or all(bool((before[name] | ~masks[name]).all()) for name in masks)
        before = masks


def test_apply_masks_touches_the_named_weights_only():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    kept, other, bias = (t.detach().clone() for t in (model[0].weight, model[1].weight, model[0].bias))
    mask = kept > 0
    apply_masks(model, {"0": mask})
    assert torch.equal(model[0].weight, torch.where(mask, kept, torch.zeros(())))
    assert torch.equal(model[1].weight, other) and torch.equal(model[0].bias, bias)


class AdamW(MaskHooks):
    def optimizers(self, model, recipe):
        return [torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=0.1)]


OPTIMIZERS = {
    "sgd": (MaskHooks, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}),
    "adam": (MaskHooks, {"lr": 0.01, "optimizer": "adam", "weight_decay": 0.01}),
    "adamw": (AdamW, {"lr": 0.01}),
    "ema": (MaskHooks, {"lr": 0.05, "ema": 0.9}),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_pruned_weights_stay_zero_and_survivors_move(tiny, kind):
    model, (hooks, settings) = tiny.model(), OPTIMIZERS[kind]
    masks = keep_local({name: model.get_submodule(name).weight for name in ("conv2", "fc")}, {"conv2": 0.3, "fc": 0.5})
    apply_masks(model, masks)
    before = {name: model.get_submodule(name).weight.detach().clone() for name in masks}
    bias = model.fc.bias.detach().clone()
    train(model, tiny.task(), Recipe(epochs=2, **settings), torch.Generator().manual_seed(0), hooks=hooks(masks))
    for name, mask in masks.items():
        after = model.get_submodule(name).weight
        assert torch.equal(after[~mask], torch.zeros(int((~mask).sum())))
        assert bool((after[mask] != before[name][mask]).all())
    assert not torch.equal(model.fc.bias, bias)


class GradientOnly(Hooks):
    """The naive way: pruned weights get no gradient."""

    def __init__(self, masks, optimizer):
        self.masks, self.optimizer = masks, optimizer

    def optimizers(self, model, recipe):
        return [self.optimizer]

    def after_backward(self, model, lr):
        for name, mask in self.masks.items():
            model.get_submodule(name).weight.grad.mul_(mask)


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
                                  lambda p: torch.optim.Adam(p, lr=0.01)], ids=["sgd", "adam"])
def test_masking_the_gradient_alone_fails(tiny, make):
    """simple_combos, section 4: momentum gathered while dense moves 60 % zeros to none in one step."""
    model, task, recipe = tiny.model(), tiny.task(), Recipe(epochs=1, lr=0.05)
    optimizer = make(model.parameters())
    train(model, task, recipe, torch.Generator().manual_seed(0), hooks=GradientOnly({}, optimizer))  # dense phase
    masks = {"conv2": keep_largest(model.conv2.weight.detach().abs(), keep_count(576, 0.4))}
    apply_masks(model, masks)
    train(model, task, recipe, torch.Generator().manual_seed(1), hooks=GradientOnly(masks, optimizer))
    naive = float((model.conv2.weight == 0).float().mean())
    assert naive < 0.01
    apply_masks(model, masks)
    hooks = MaskHooks(masks)
    hooks.optimizers = lambda model, recipe: [optimizer]  # the same stale momentum, masked after the step
    train(model, task, recipe, torch.Generator().manual_seed(1), hooks=hooks)
    assert int((model.conv2.weight == 0).sum()) == 576 - keep_count(576, 0.4)


def test_torch_prune_then_remove_regrows(tiny):
    """The tutorials' recipe: after `remove` one step of SGD brings every pruned weight back."""
    model = tiny.model()
    prune.l1_unstructured(model.conv2, "weight", amount=0.6)
    prune.remove(model.conv2, "weight")
    assert float((model.conv2.weight == 0).float().mean()) == pytest.approx(0.6, abs=2e-3)
    train(model, tiny.task(), Recipe(epochs=1, lr=0.01), torch.Generator().manual_seed(0))
    assert float((model.conv2.weight == 0).float().mean()) < 0.01
