"""ADMM: what is pruned stays 0 through every later training, and has no part in the levels."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from methods.admm import Config, Training, prune, quantize
from methods.core.graph.build import weight_layers
from methods.core.train.finetune import Recipe
from methods.core.train.run import NullRun

EPOCH = Recipe(epochs=1, lr=0.05)
SHORT = Config(rho=(0.1,), prune_iterations=1, prune=EPOCH, retrain=replace(EPOCH, epochs=2), quantize_rho=(0.1,),
               quantize_iterations=2, quantize=EPOCH)
BITS = {"conv1": 4, "conv2": 3, "conv3": 2, "fc": 3}


def pruned(tiny, config=SHORT):
    """(weights, masks, training) after pruning to 40 % and retraining."""
    model = tiny.model()
    weights = {name: layer.weight for name, layer in weight_layers(model).items()}
    training = Training(model, tiny.task(), config, torch.Generator().manual_seed(0), NullRun(), {})
    return weights, prune(weights, dict.fromkeys(weights, 0.4), training), training


def outside(weights, masks):
    """Non-zero weights that the masks prune."""
    return {name: int((weight.detach()[~masks[name]] != 0).sum()) for name, weight in weights.items()}


def test_retraining_leaves_what_is_pruned_at_zero(tiny):
    weights, masks, _ = pruned(tiny)
    assert set(outside(weights, masks).values()) == {0}
    assert all(int(mask.sum()) == -(-mask.numel() * 4 // 10) for mask in masks.values())


@pytest.mark.parametrize("live", [False, True])
def test_weights_that_change_no_output_give_their_places_to_others(tiny, live):
    """In a chain of linear layers: a weight is live if its input has a path from an input of the network, and its
    output one to an output."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(),
                              nn.Linear(30, 4)).eval()
    weights = {name: model.get_submodule(name).weight for name in ("1", "3", "5")}
    config = replace(SHORT, live=live, prune_iterations=0, retrain=replace(EPOCH, epochs=0))
    training = Training(model, tiny.task(), config, torch.Generator().manual_seed(0), NullRun(), {})
    masks = prune(weights, {"1": 0.01, "3": 0.06, "5": 0.25}, training)
    from_input, to_output, forward, backward = torch.ones(192), torch.ones(4), {}, {}
    for name in ("1", "3", "5"):
        forward[name], from_input = from_input > 0, masks[name].float() @ from_input
    for name in ("5", "3", "1"):
        backward[name], to_output = to_output > 0, to_output @ masks[name].float()
    dead = {name: int((mask & ~(backward[name][:, None] & forward[name])).sum()) for name, mask in masks.items()}
    assert (sum(dead.values()) == 0) is live, dead
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"1": 58, "3": 54, "5": 30}
    assert set(outside(weights, masks).values()) == {0}


@pytest.mark.parametrize("grid", ["levels", "clusters"])
def test_quantizing_leaves_what_is_pruned_at_zero(tiny, grid):
    weights, masks, training = pruned(tiny, replace(SHORT, grid=grid))
    quantize(weights, masks, BITS, training)
    assert set(outside(weights, masks).values()) == {0}
    assert all((weight.detach()[masks[name]] != 0).float().mean() > 0.9 for name, weight in weights.items())


@pytest.mark.parametrize("refit", [False, True])
def test_levels_are_fitted_to_the_survivors_alone(tiny, refit):
    """The interval against a scan of 2,000: a pruned zero is one interval away from the nearest level."""
    config = replace(SHORT, refit=refit, quantize_iterations=int(refit), quantize=replace(EPOCH, epochs=0))
    weights, masks, training = pruned(tiny, config)
    for name, grid in quantize(weights, masks, BITS, training).items():
        values, top = weights[name].detach()[masks[name]].double().numpy(), 1 << BITS[name] - 1
        levels = np.array([n for n in range(-top, top + 1) if n])

        def error(q, values=values, levels=levels):
            return float(np.square(values[:, None] - q * levels).min(1).sum())

        scanned = min(error(q) for q in np.linspace(1e-3, 1.2, 2000) * np.abs(values).max())
        assert error(grid.interval) <= 1.001 * scanned
