"""Each control of the lottery is what it says: seen at the start of its last training, beside the ticket's."""

import pytest
import torch

from benchmarks.settings import build
from methods import pipeline
from methods.core.budget import Budget
from methods.core.errors import ConfigError
from methods.core.train.finetune import train

RECIPE = {"epochs": 1, "lr": 0.05}


def last_start(tiny, monkeypatch, **settings):
    """What the last training starts from, and the result."""
    starts = []

    def spy(model, *args, **kw):
        starts.append({name: value.clone() for name, value in model.state_dict().items()})
        return train(model, *args, **kw)

    monkeypatch.setattr(pipeline.pruning, "train", spy)
    config = build(pipeline.Config, {"prune": {"schedule": "lottery", "updates": 2, "rewind": 2, "recipe": RECIPE,
                                               **settings}, "activations": "float"})
    budget = Budget(bits=8, **{"channel_density" if "granularity" in settings else "density": 0.3})
    pipeline.compress(tiny.model(), tiny.task(), budget, config, torch.Generator().manual_seed(0))
    return starts[-1]


def split(state):
    masks = {name: value for name, value in state.items() if name.endswith(".mask")}
    return masks, {name: value for name, value in state.items() if name not in masks}


def test_reinitialised_keeps_the_masks_and_nothing_else(tiny, monkeypatch):
    (masks, values), (own, drawn) = (split(last_start(tiny, monkeypatch, control=control))
                                     for control in ("none", "reinitialised"))
    assert masks and tiny.same(masks, own)
    weights = [name for name in values if name.endswith("original")]
    assert len(weights) == 4 and all(
        torch.isclose(values[name], drawn[name]).double().mean() < 0.05
        for name in weights)
    net = tiny.net()
    for name in ("conv1", "conv2", "conv3", "fc"):  # uniform within the bound that torch draws from
        bound = net.get_submodule(name).weight[0].numel() ** -0.5
        assert 0.9 * bound < drawn[f"{name}.parametrizations.weight.original"].abs().max() <= bound
    assert bool((drawn["bn1.weight"] == 1).all()) and bool((drawn["bn1.running_mean"] == 0).all())
    assert not bool((values["bn1.running_mean"] == 0).any())


@pytest.mark.parametrize("more", [{}, {"criterion": "l1", "granularity": "channel"}])
def test_shuffled_keeps_values_and_densities_and_no_mask(more, tiny, monkeypatch):
    (masks, values), (own, same) = (split(last_start(tiny, monkeypatch, control=control, **more))
                                    for control in ("none", "shuffled"))
    assert tiny.same(values, same)
    for name, mask in masks.items():
        assert int(own[name].sum()) == int(mask.sum()), name
    large = [name for name in masks if "conv" in name and "weight" in name]
    shares = [float(own[name][masks[name]].float().mean()) for name in large]
    assert large and all(share < 0.8 for share in shares)  # of what the ticket keeps: about the density, by chance


def test_shuffled_keeps_what_each_layer_got_by_one_ranking(tiny, monkeypatch):
    (masks, _), (own, _) = (split(last_start(tiny, monkeypatch, control=control, scope="global"))
                            for control in ("none", "shuffled"))
    counts = [int(mask.sum()) for mask in masks.values()]
    assert counts == [int(mask.sum()) for mask in own.values()]
    assert len({round(float(mask.float().mean()), 2) for mask in masks.values()}) > 1


@pytest.mark.parametrize("given, message", [
    ({"schedule": "lottery", "recipe": RECIPE, "control": "luck"}, "control = 'luck': allowed are none, reinit"),
    ({"control": "shuffled"}, "control = 'shuffled' does nothing: schedule = 'one_shot' winds nothing back")])
def test_mistakes_are_one_line(given, message):
    with pytest.raises(ConfigError, match=message):
        build(pipeline.Prune, given)
