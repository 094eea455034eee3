"""The pipeline that takes whole residual blocks out of a network."""

import copy
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.settings import build
from methods import data_of, pipeline
from methods.core.budget import Budget
from methods.core.errors import BudgetError, CompressError, ConfigError
from methods.core.file.storage import from_bytes, to_bytes
from methods.core.graph.build import apply
from methods.core.graph.residual import find_blocks
from methods.core.graph.weights import weight_layers
from methods.core.train.finetune import train
from methods.core.train.recipe import Recipe
from methods.engine.exact import IntegerNetwork
from methods.engine.layers import layer_macs

SHORT = {"epochs": 1, "lr": 0.01}
BLOCKS = ("a", "b", "d")


class Block(nn.Module):
    def __init__(self, into, out=None):
        super().__init__()
        out = into if out is None else out
        self.conv, self.norm = nn.Conv2d(into, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.last, self.shortcut = nn.Conv2d(out, out, 1), nn.Identity() if into == out else nn.Conv2d(into, out, 1)

    def forward(self, x):
        return torch.relu(self.last(torch.relu(self.norm(self.conv(x)))) + self.shortcut(x))


def net(**blocks):
    blocks = blocks if blocks else dict(a=Block(8), b=Block(8), c=Block(8, 12), d=Block(12))
    return nn.Sequential(OrderedDict(stem=nn.Conv2d(3, 8, 3), relu=nn.ReLU(), **blocks,
                                     pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(12, 4)))


TRAINED: dict[str, torch.Tensor] = {}


@pytest.fixture
def model(tiny):
    found = net()
    if not TRAINED:
        train(found, tiny.task(), Recipe(epochs=3, lr=0.01, optimizer="adam"), torch.Generator().manual_seed(0))
        TRAINED.update(copy.deepcopy(found.state_dict()))
    found.load_state_dict(TRAINED)
    return found.eval()


BITS_8 = Budget(bits=8)


def made(tiny, model, prune, *, task=None, budget=BITS_8, run=None, **config):
    config = build(pipeline.Config, {"prune": {"granularity": "block", "criterion": "loss", **prune}, **config})
    return pipeline.compress(model, tiny.task() if task is None else task, budget, config,
                             torch.Generator().manual_seed(0), run=run)


@torch.no_grad()
def held_out_loss(tiny, model, gone):
    """Of the network that skips `gone`, over all held-out pictures at once."""
    found = tiny.task().held_out
    x = found.inputs
    for name, layer in model.named_children():
        x = x if name in gone else layer(x)
    return float(F.cross_entropy(x, found.targets))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_next_block_is_the_one_without_which_the_held_out_loss_is_least(count, tiny, model):
    before = tiny.fingerprint(model)
    out = made(tiny, model, {"blocks": count})
    gone = []
    for _ in range(count):
        losses = {name: held_out_loss(tiny, model, [*gone, name]) for name in BLOCKS if name not in gone}
        gone.append(min(losses, key=losses.get))
        assert out.notes["removed"][len(gone) - 1] == [gone[-1], pytest.approx(losses[gone[-1]], rel=1e-5)]
    assert out.topology.removed == tuple(gone) and tiny.same(tiny.fingerprint(model), before)
    left = {name for name in weight_layers(model) if name.split(".")[0] not in gone}
    assert set(out.weights) == left and {t.bits for t in out.weights.values()} == {8}
    assert set(layer_macs(apply(out, model), tiny.shape)) == left
    whole = pipeline.compress(model, tiny.task(), BITS_8, pipeline.Config(order=("quantize",)), torch.Generator())
    assert len(to_bytes(out)[0]) < len(to_bytes(whole)[0])
    back = from_bytes(to_bytes(out)[0])
    with torch.no_grad():
        real, integer = (network(tiny.Batches(24, 9).inputs) for network in (apply(back, net()),
                                                                             IntegerNetwork(back, net())))
    assert float((real - integer).square().mean().sqrt()) < 0.1 * float(real.std())


def test_only_held_out_batches_are_needed_to_choose(tiny, model):
    one, other = (made(tiny, model, {"blocks": 2}, task=task) for task in (
        tiny.task(), tiny.task().seen_as("held_out")))
    assert to_bytes(one)[0] == to_bytes(other)[0]


def test_rounds_of_equally_many_are_trained_between(tiny, model, monkeypatch):
    seen = []

    def spy(network, *args, **kwargs):
        seen.append([name for name in BLOCKS if isinstance(network.get_submodule(name), nn.Identity)])
        return train(network, *args, **kwargs)

    monkeypatch.setattr(pipeline.blocks, "train", spy)
    out = made(tiny, model, {"blocks": 3, "schedule": "geometric", "updates": 2, "recipe": SHORT})
    assert [len(gone) for gone in seen] == [2, 3] and len(out.topology.removed) == 3
    seen.clear()
    made(tiny, model, {"blocks": 2, "recipe": SHORT, "before": SHORT})
    assert [len(gone) for gone in seen] == [0, 2]


def test_what_is_left_is_trained(tiny, model):
    one, other = (made(tiny, model, {"blocks": 1, **more}) for more in ({}, {"recipe": {"epochs": 3, "lr": 0.05}}))
    assert one.topology.removed == other.topology.removed
    assert not torch.equal(one.rest["fc.bias"], other.rest["fc.bias"])


def test_random_blocks_need_no_data_and_depend_on_the_seed(tiny, model):
    config = build(pipeline.Config, {"prune": {"granularity": "block", "criterion": "random", "blocks": 1},
                                     "activations": "float"})
    assert data_of(pipeline, config) == "none"
    found = {pipeline.compress(model, None, Budget(bits=8), config, torch.Generator().manual_seed(seed)
                               ).topology.removed for seed in range(12)}
    assert found == {("a",), ("b",), ("d",)}


@pytest.mark.parametrize("quantizer", ["qat", "float16", "bnn"])
@pytest.mark.parametrize("order", [["quantize", "prune"], ["prune", "quantize", "distil"]])
def test_in_any_order_with_any_quantizer(order, quantizer, tiny, model):
    more = {"distil": SHORT} if "distil" in order else {}
    recipe = {} if quantizer == "float16" else {"recipe": SHORT}
    bits = {"qat": {"bits": 4}, "float16": {}, "bnn": {"bits": 1}}[quantizer]
    out = made(tiny, model, {"blocks": 2, "recipe": SHORT}, budget=Budget(**bits), order=order,
               quantize={"quantizer": quantizer, **recipe}, **more)
    back = from_bytes(to_bytes(out)[0])
    assert len(back.topology.removed) == 2 and to_bytes(back)[0] == to_bytes(out)[0]
    with torch.no_grad():
        assert apply(back, net())(tiny.Batches(24, 9).inputs).isfinite().all()


@pytest.mark.parametrize("prune", [
    {"blocks": 3, "schedule": "geometric", "updates": 3, "recipe": SHORT}, {"blocks": 2, "before": SHORT},
    {"blocks": 2, "criterion": "random", "recipe": SHORT}])
def test_a_cut_run_goes_on_to_the_same_bytes(prune, tiny, model):
    counted = tiny.Run()
    whole = to_bytes(made(tiny, model, prune, run=counted))[0]
    for calls in range(len(counted.calls)):
        states = {}
        with pytest.raises(tiny.Interrupted):
            made(tiny, model, prune, run=tiny.Run(states, calls))
        assert to_bytes(made(tiny, model, prune, run=tiny.Run(states)))[0] == whole, calls


# --- which may go ------------------------------------------------------------------------------------------


def test_layers_left_alone_and_linked_ones_keep_their_blocks(tiny, model):
    budget = Budget(bits=8).leaving(["a.last", "fc"])
    assert set(made(tiny, model, {"blocks": 2}, budget=budget).topology.removed) == {"b", "d"}
    linked = {**SHORT, "distill": {"temperature": 2.0, "links": [{"student": "b.last"}, {"student": "d"}]}}
    assert made(tiny, model, {"blocks": 1, "recipe": linked}).topology.removed == ("a",)
    with pytest.raises(ConfigError, match="blocks = 2: at most 1 blocks can go, a"):
        made(tiny, model, {"blocks": 2, "recipe": linked})


class Grown(nn.Module):
    """x [N, 12] + f [2, N, 12]: the sum is of another shape than x."""

    def __init__(self):
        super().__init__()
        self.f = nn.Linear(12, 12)

    def forward(self, x):
        return torch.stack([self.f(x), x]) + x


class First(nn.Module):
    def forward(self, x):
        return x[0]


class Guided(Block):
    def forward(self, x, strength=None):
        return super().forward(x) if strength is None else super().forward(x * strength)


class Guiding(nn.Sequential):
    def forward(self, x):
        return self[0](x, 1.0)


def test_a_block_that_takes_more_or_grows_is_none(tiny):
    model = net(a=Guiding(Guided(8)), b=Block(8), c=Block(8, 12)).eval()
    assert made(tiny, model, {"blocks": 1}).topology.removed == ("b",)
    with pytest.raises(ConfigError, match="blocks = 2: at most 1"):
        made(tiny, model, {"blocks": 2})
    grown = nn.Sequential(nn.Flatten(), nn.Linear(192, 12), Grown(), First(), nn.Linear(12, 4)).eval()
    assert find_blocks(grown) == ["2"]
    with pytest.raises(CompressError, match="no residual block that could go"):
        made(tiny, grown, {"blocks": 1})


@pytest.mark.parametrize("prune, message", [
    ({}, "blocks = 0: granularity = 'block' removes 1 or more"),
    ({"blocks": -1}, "blocks = -1"),
    ({"blocks": 4}, "blocks = 4: at most 3 blocks can go, a, b, d"),
    ({"blocks": 1, "scope": "global"}, "scope = 'global' does nothing: granularity = 'block' has one ranking"),
    ({"blocks": 1, "schedule": "agp", "recipe": SHORT}, "'agp' chooses masks anew.*: allowed are one_shot, geometric"),
    ({"blocks": 1, "schedule": "lottery", "recipe": SHORT}, "schedule = 'lottery'"),
    ({"blocks": 2, "schedule": "geometric", "recipe": SHORT}, "updates = 10: 2 blocks go in at most as many rounds"),
    ({"blocks": 1, "criterion": "l1"}, "criterion = 'l1' ranks no single block: allowed are loss, random"),
    ({"blocks": 1, "granularity": "weight", "criterion": "level"}, "blocks = 1 does nothing"),
    ({"blocks": 1, "granularity": "channel"}, "criterion = 'loss' ranks no single channel"),
    ({"blocks": 1, "rates": "sensitivity"}, "rates = 'sensitivity'")])
def test_settings_without_sense_are_refused_in_one_line(prune, message, tiny, model):
    with pytest.raises(ConfigError, match=message) as caught:
        made(tiny, model, prune)
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_is_refused_in_one_line(tiny, model):
    with pytest.raises(CompressError, match="the network has no residual block that could go") as caught:
        made(tiny, tiny.model(), {"blocks": 1})
    assert "\n" not in str(caught.value)
    with pytest.raises(BudgetError, match="cannot honour the budget field 'density'; it takes: bits"):
        made(tiny, model, {"blocks": 1}, budget=Budget(bits=8, density=0.5))
    with pytest.raises(ConfigError, match="with these settings pipeline needs a task"):
        pipeline.compress(model, None, Budget(bits=8), build(pipeline.Config, {"prune": {
            "granularity": "block", "criterion": "loss", "blocks": 1}}), torch.Generator())
    with pytest.raises(ConfigError, match="a block is there or not"):
        pipeline.pruning_curves(model, tiny.task(), torch.Generator(), [0.5], criterion="loss", granularity="block")
    with pytest.raises(CompressError, match="nothing to score"):
        made(tiny, model, {"blocks": 1}, task=replace(tiny.task(), held_out=tiny.Batches(0, 1)))
