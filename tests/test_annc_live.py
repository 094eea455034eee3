"""ANNC with `live`: no kept weight is idle, and what idle ones cost buys the worthiest others, position included."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from methods.annc import Config, JointHooks, compress
from methods.core.budget import Budget
from methods.core.graph.build import apply
from methods.core.train.finetune import Recipe, train

LIVE = Config(recipe=Recipe(epochs=2, lr=0.02), live=True, fill=True)
NAMES = ("1", "3", "5")


def chain():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(),
                              nn.Linear(30, 4)).eval()
        model[1].weight.data *= 2.5  # as large as those of the others: else the whole layer goes
        return model


def useful(kept):
    """{layer: bool [O, I]} in a chain: a path of kept weights from an input to I, and one from O to an output."""
    from_input, to_output, before, after = torch.ones(192), torch.ones(4), {}, {}
    for name in NAMES:
        before[name], from_input = from_input > 0, kept[name].float() @ from_input
    for name in reversed(NAMES):
        after[name], to_output = to_output > 0, to_output @ kept[name].float()
    return {name: after[name][:, None] & before[name] for name in NAMES}


def greedy(items, limit):
    """(bits spent, {(layer, place)}) of a pass over [(worth, cost, layer, place)] that takes all that still fit."""
    spent, taken = 0, set()
    for _, cost, layer, place in sorted(items, key=lambda item: (-item[0], item[2:])):
        if spent + cost <= limit:
            spent, taken = spent + cost, taken | {(layer, place)}
    return spent, taken


def as_masks(taken, model):
    masks = {name: torch.zeros(model.get_submodule(name).weight.numel(), dtype=torch.bool) for name in NAMES}
    for layer, place in taken:
        masks[layer][place] = True
    return {name: mask.reshape(model.get_submodule(name).weight.shape) for name, mask in masks.items()}


@pytest.mark.parametrize("limit, bits", [(700, (3, 3, 3)), (1000, (4, 3, 2)), (2500, (2, 3, 2))])
def test_freed_bits_go_to_the_worthiest_live_weights(limit, bits):
    model = chain()
    each = dict(zip(NAMES, bits, strict=True))
    weights = {name: model.get_submodule(name).weight.detach().double().reshape(-1) for name in NAMES}
    square = [(float(w) ** 2, each[name], name, place) for name in NAMES for place, w in enumerate(weights[name])]
    _, first = greedy([(worth / cost, cost, name, place) for worth, cost, name, place in square], limit)
    masks = as_masks(first, model)
    worth_it = useful(masks)
    kept = {(name, place) for name, place in first if worth_it[name].reshape(-1)[place]}
    assert 0 < len(kept) < len(first)  # else there is nothing to see
    free, position = useful(as_masks(kept, model)), {}
    for name in NAMES:
        n, k = len(weights[name]), max(sum(layer == name for layer, _ in kept), 1)
        position[name] = (k * math.log2(n / k) + (n - k) * math.log2(n / (n - k))) / k
    others = [(worth / (cost + position[name]), cost, name, place) for worth, cost, name, place in square
              if free[name].reshape(-1)[place] and (name, place) not in first]
    _, more = greedy(others, limit - sum(each[name] for name, _ in kept))
    want = as_masks(kept | more, model)

    hooks = JointHooks(model, limit, LIVE)
    hooks.bits = list(bits)
    hooks.project()
    for name, weight in hooks.named.items():
        assert torch.equal(weight != 0, want[name]), name
    assert not any(bool((want[name] & ~positions).any()) for name, positions in useful(want).items())


def idle(model):
    kept = {name: model.get_submodule(name).weight.detach() != 0 for name in NAMES}
    return sum(int((kept[name] & ~positions).sum()) for name, positions in useful(kept).items())


def test_training_ends_without_an_idle_weight_and_the_limit_holds(tiny):
    """In the file there may be some again, where the 0 of a codebook took the last weight of a unit."""
    trained, stored, config = {}, {}, replace(LIVE, least_bits=3, start_bits=4)
    for live in (False, True):
        model, now = chain(), replace(config, live=live)
        hooks = JointHooks(model, 4000, now)
        train(model, tiny.task(), now.recipe, torch.Generator().manual_seed(0), hooks=hooks)
        trained[live] = idle(model)
        assert sum(b * k for b, k in zip(hooks.bits, hooks.count_kept(), strict=True)) <= 4000
        found = compress(chain(), tiny.task(), Budget(data_ratio=4000 / 32 / 6780), now,
                         torch.Generator().manual_seed(0))
        stored[live] = idle(apply(found, chain()))
        assert sum(t.kept * t.bits for t in found.weights.values()) <= found.notes["limit"] == 4000
    assert trained[True] == 0 < trained[False] and stored[True] < stored[False], (trained, stored)


def test_a_network_that_is_cut_stays_as_the_projection_leaves_it():
    """Without a weight in its first layer nothing changes an output: there is no place for what is idle."""
    kept = {}
    for live in (False, True):
        model = chain()
        with torch.no_grad():
            model[1].weight.mul_(1e-6)
        hooks = JointHooks(model, 300, replace(LIVE, live=live))
        hooks.project()
        kept[live] = {name: weight != 0 for name, weight in hooks.named.items()}
    assert not kept[True]["1"].any() and kept[True]["5"].any()
    assert all(torch.equal(kept[False][name], kept[True][name]) for name in NAMES)


def test_what_the_graph_does_not_follow_stays():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(192, 30), nn.Linear(30, 4)

        def forward(self, x):
            x = self.a(x.flatten(1))
            return self.b(x) if float(x.sum()) > 0 else self.b(-x)

    kept = {}
    for live in (False, True):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            hooks = JointHooks(Branching(), 300, replace(LIVE, live=live))
        hooks.project()
        kept[live] = [weight != 0 for weight in hooks.named.values()]
    assert all(torch.equal(a, b) for a, b in zip(kept[False], kept[True], strict=True))
