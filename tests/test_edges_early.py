"""What cannot work, or does nothing, with a network or a budget is said before the work."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from methods import admm, annc, clip_q, dfq, pipeline, sequential_reconstruction, udfc
from methods.core.budget import Budget
from methods.core.errors import BudgetError, CompressError, ConfigError
from methods.core.fit.size import untrained
from methods.core.train.recipe import Recipe
from methods.core.train.task import Task
from methods.pipeline import Prune, Quantize
from methods.pipeline.pruning import started_anew
from tests.edge_networks import NONE, SMALL, chain, seeded, task

TRAINED = Recipe(epochs=1, lr=0.01)


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 4))


@pytest.mark.parametrize("method, config, budget, message", [
    (admm, admm.Config(grid="clusters"), {"density": 0.5}, "grid = 'clusters' does nothing: the budget has no 'bits'"),
    (admm, admm.Config(quantize_rho=(0.1,)), {"density": 0.5}, r"quantize_rho = \(0.1,\) does nothing"),
    (admm, admm.Config(fix=TRAINED), {"density": 0.5}, "fix = .* does nothing"),
    (udfc, udfc.Config(per_channel=True), {"channel_density": 0.5}, "per_channel = True does nothing: the budget"),
    (udfc, udfc.Config(criterion="gm"), {"bits": 4}, "criterion = 'gm' does nothing: the budget has no 'channel_den"),
    (sequential_reconstruction, replace(SMALL, scheme="mse"), {"channel_density": 0.5}, "scheme = 'mse' does nothing"),
    (sequential_reconstruction, replace(SMALL, alpha1=0.5), {"bits": 4}, "alpha1 = 0.5 does nothing")])
def test_settings_that_do_nothing_with_a_budget_are_refused(method, config, budget, message):
    with pytest.raises(ConfigError, match=message):
        method.compress(chain(), task(), Budget(**budget), config, seeded())


@pytest.mark.parametrize("make, message", [
    (lambda: annc.Config(bits_epochs=0, least_bits=2), "least_bits = 2 does nothing: bits_epochs = 0"),
    (lambda: annc.Config(mode="quantize", bits_epochs=0, most_bits=4), "most_bits = 4 does nothing"),
    (lambda: Prune(criterion="slim", granularity="channel", penalty=0.1), "penalty = 0.1 does nothing: .* `before`")])
def test_settings_that_do_nothing_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_recipe_without_epochs_is_nothing_to_refuse():
    config = admm.Config(fix_rounds=0, prune_iterations=0, quantize_iterations=0, retrain=NONE, quantize=TRAINED)
    assert untrained(config).fix.epochs == 0
    assert admm.compress(two_layers(), task(), Budget(density=0.5, bits=3), untrained(config), seeded()).weights
    slim = Prune(criterion="slim", granularity="channel", penalty=0.1, before=TRAINED)
    assert untrained(slim).penalty == 0.1


@pytest.mark.parametrize("config, bits, kind, message", [
    ({"quantize": Quantize(widths="sensitivity", scheme="asymmetric")}, {"bits": 1}, BudgetError,
     "budget bits = 1 with widths = 'sensitivity': allowed is 2 or more"),
    ({"quantize": Quantize(widths="sensitivity")}, {"bits": {"1": 4, "3": 3}}, ConfigError,
     r"takes one number of bits, not \[3, 4\]"),
    ({"quantize": Quantize(quantizer="float16")}, {}, CompressError, "a weight of 1 is 70000: float16 ends at 65504")])
def test_a_pipeline_says_before_its_training_what_cannot_be_stored(config, bits, kind, message, monkeypatch):
    monkeypatch.setattr(pipeline, "train", lambda *_, **__: pytest.fail("it trains first"))
    monkeypatch.setattr(Task, "error", lambda *_: pytest.fail("it measures first"))
    model = two_layers()
    with torch.no_grad():
        model[1].weight[0, 0] = 70_000.0
    config = pipeline.Config(order=("distil", "quantize"), distil=TRAINED, **config)
    with pytest.raises(kind, match=message):
        pipeline.compress(model, task(), Budget(**bits), config, seeded())


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        return torch.relu(self.inner(x) + x)


def test_widths_of_layers_that_went_with_their_block_are_not_looked_for():
    model = nn.Sequential(Residual(), nn.Flatten(), nn.Linear(192, 4)).eval()
    config = pipeline.Config(prune=Prune(granularity="block", criterion="loss", blocks=1),
                             quantize=Quantize(widths="sensitivity"), calibration_inputs=8)
    made = pipeline.compress(model, task(), Budget(bits={"0.inner": 4}), config, seeded())
    assert made.topology.removed == ("0",) and not made.weights


@pytest.mark.parametrize("equal, epochs", [(True, 1), (True, 0), (False, 0)])
def test_a_clipping_that_leaves_nothing_is_said_before_the_training(equal, epochs, monkeypatch):
    """p of equal weights are all of them, as p of every sign goes up to the largest clipped one."""
    monkeypatch.setattr(clip_q, "train", lambda *_, **__: pytest.fail("it trains first") if epochs else None)
    model = two_layers()
    with torch.no_grad():
        model[3].weight.fill_(0.5) if equal else None
    config = clip_q.Config(search="uniform", finetune=replace(TRAINED, epochs=epochs))
    if not equal:
        assert clip_q.compress(model, task(), Budget(density=0.5, bits=3), config, seeded()).weights
        return
    with pytest.raises(CompressError, match="clipping 0.5 of the weights of 3 leaves none: too many of them are equal"):
        clip_q.compress(model, task(), Budget(density=0.5, bits=3), config, seeded())


class Mixer(nn.Module):
    """A linear layer across the pixels: of 4 channels on 4 x 4 pixels, so that the numbers would fit."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.mix, self.head = nn.Linear(16, 16), nn.Linear(64, 4)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x))).flatten(2)
        return self.head(torch.flatten(self.mix(x), 1))


def test_biases_of_a_layer_across_pixels_are_not_corrected_by_what_channels_are():
    """Its inputs are pixels, of which nothing is known; the layer before reads the picture, and is corrected."""
    torch.manual_seed(0)
    model = Mixer().eval()
    with torch.no_grad():
        model.norm.bias.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    made = dfq.compress(model, None, Budget(bits=3), dfq.Config(equalize=False, absorb=False), seeded())
    assert torch.equal(made.rest["mix.bias"], model.mix.bias) and torch.equal(made.rest["head.bias"], model.head.bias)


def test_initial_weights_are_drawn_from_the_seed_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight  # tied
    torch.manual_seed(1)
    one, state = started_anew(model, seeded()), torch.get_rng_state()
    torch.manual_seed(2)
    other = started_anew(model, seeded())
    assert torch.equal(one[0].weight, other[0].weight) and one[1].weight is one[0].weight
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state) and not torch.equal(one[0].weight, model[0].weight)
