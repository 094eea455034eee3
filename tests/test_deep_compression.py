"""Deep Compression: Fig. 3 of the paper, the reserved code, thresholds, nested masks and the dropout rule."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from methods import deep_compression
from methods.core.budget import Budget
from methods.core.errors import BudgetError, ConfigError
from methods.core.fit.prune import keep_count
from methods.core.train.finetune import Recipe
from methods.deep_compression import Config, SharedWeight, compress, prune, scale_dropout, share, tune_centroids

WEIGHTS = torch.tensor([[2.09, -0.98, 1.48, 0.09], [0.05, -0.14, -1.08, 2.12],
                        [-0.91, 1.92, 0, -1.03], [1.87, 0, 1.53, 1.49]])
INDEX = torch.tensor([[3, 0, 2, 1], [1, 1, 0, 3], [0, 3, 1, 0], [3, 1, 2, 2]])
GRADIENT = torch.tensor([[-3, -1, 3, 2], [-1, 1, -2, 12], [-1, 2, 4, 1], [-7, -2, 1, -2]]) / 100
LAYERS = ("conv1", "conv2", "conv3", "fc")
SHORT = Config(rounds=2, retrain=Recipe(epochs=1, lr=0.02), tune=Recipe(epochs=2, lr=1e-3))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# --- Fig. 3 -------------------------------------------------------------------------------------------------


def figure_3_layer(centroids):
    """A linear layer whose weight is the figure's, shared: index 0..3 is code 1..4."""
    layer = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        layer.weight.copy_(centroids[INDEX])
    parametrize.register_parametrization(layer, "weight", SharedWeight((INDEX + 1).int()))
    return layer, layer.parametrizations.weight.original


def test_gradients_of_a_cluster_are_summed():
    layer, centroids = figure_3_layer(torch.tensor([-1.0, 0.0, 1.5, 2.0]))
    assert centroids.tolist() == [-1.0, 0.0, 1.5, 2.0]
    (layer.weight * GRADIENT).sum().backward()
    summed = torch.zeros(4).index_add_(0, INDEX.reshape(-1), GRADIENT.reshape(-1))
    assert torch.allclose(summed, torch.tensor([-0.03, 0.04, 0.02, 0.04]), atol=1e-6)
    assert torch.allclose(centroids.grad, summed, atol=1e-7)
    assert not torch.allclose(centroids.grad, summed / INDEX.reshape(-1).bincount(), atol=1e-3)  # not the mean
    torch.optim.SGD([centroids], lr=1.0).step()
    assert torch.allclose(centroids, torch.tensor([-0.97, -0.04, 1.48, 1.96]), atol=1e-6)
    assert torch.equal(layer.weight, centroids[INDEX])


def test_the_weights_of_the_figure_with_a_code_reserved():
    codebook, codes = share(WEIGHTS, torch.ones(4, 4, dtype=torch.bool), 2, "linear", np.random.default_rng(0))
    assert torch.allclose(codebook, torch.tensor([0.0, -1.0, 0.0, 12.5 / 7]), atol=1e-6)  # 2 bits leave 3 clusters
    assert torch.equal(codes, (INDEX.clamp_max(2) + 1).int())  # the upper two of the figure are one


@pytest.mark.parametrize("bits", [2, 3, 5])
def test_code_0_is_kept_for_the_pruned(bits):
    weight = torch.randn(20, 30, generator=seeded())
    mask = weight.abs() > 1
    codebook, codes = share(weight, mask, bits, "linear", np.random.default_rng(0))
    assert codebook[0] == 0 and len(codebook) <= 2**bits and codes.dtype == torch.int32
    assert codes.unique().tolist() == list(range(len(codebook)))  # every entry that is stored is used
    assert torch.equal(codes == 0, ~mask) and int(codes.max()) <= 2**bits - 1
    nearest = (weight[mask].double()[:, None] - codebook[1:].double()).abs().argmin(1)
    assert torch.equal(codes[mask].long() - 1, nearest)
    for code in codes[mask].unique():  # of the survivors alone: what is pruned attracts no centroid
        assert float(codebook[code]) == pytest.approx(float(weight[codes == code].mean()), abs=1e-5)


def test_fewer_survivors_than_codes():
    weight, mask = torch.tensor([[0.5, 0.0, -2.0, 0.5]]), torch.tensor([[True, False, True, True]])
    codebook, codes = share(weight, mask, 8, "linear", np.random.default_rng(0))
    assert torch.equal(codebook[codes.long()], weight)


# --- pruning ------------------------------------------------------------------------------------------------


@pytest.fixture
def watched(monkeypatch):
    """The masks of every round, as the training sees them."""
    seen = []

    def train(model, task, recipe, generator, *, hooks=None, run=None):
        if hooks is not None:
            seen.append({name: mask.clone() for name, mask in hooks.masks.items()})
            with torch.no_grad():  # retraining moves survivors, some of them to exactly 0
                for name, mask in hooks.masks.items():
                    weight = model.get_submodule(name).weight
                    weight.mul_(torch.rand(weight.shape, generator=seeded(len(seen))).round()).mul_(mask)

    monkeypatch.setattr(deep_compression, "train", train)
    return seen


def test_masks_are_nested_and_fall_geometrically(tiny, watched):
    density = {"conv1": 0.5, "conv2": 0.1, "conv3": 0.2, "fc": 1.0}
    masks, _ = prune(tiny.model(), tiny.task(), density, Config(rounds=3), seeded(), tiny.Run())
    assert len(watched) == 3
    for r, kept in enumerate(watched, 1):
        for name, mask in kept.items():
            assert int(mask.sum()) == keep_count(mask.numel(), density[name] ** (r / 3))
            assert r == 1 or bool((watched[r - 2][name] | ~mask).all())  # what was pruned does not come back
    assert tiny.same(masks, watched[-1])


def test_thresholds_are_per_layer_and_notes_give_them_in_standard_deviations(tiny):
    model = tiny.model()
    spread = {name: float(model.get_submodule(name).weight.detach().std()) for name in LAYERS}
    config = Config(rounds=1, retrain=Recipe(epochs=0, lr=0.1), tune=Recipe(epochs=0, lr=0.1))
    out = compress(model, tiny.task(), Budget(density=0.3, bits=8), config, seeded())
    assert set(out.notes["quality"]) == set(spread) and len(set(out.notes["quality"].values())) == 4
    for name, quality in out.notes["quality"].items():
        weight, mask = model.get_submodule(name).weight.detach(), out.weights[name].mask
        assert torch.equal(mask, weight.abs() >= quality * spread[name] * (1 - 1e-6))  # ties are kept
        assert torch.allclose(out.weights[name].decode()[mask], weight[mask], atol=float(weight.abs().max()) / 100)


def test_dropout_follows_the_density_of_the_layer_before():
    rates = {}
    for density in (1.0, 0.09):
        model = nn.Sequential(nn.Linear(10, 10), nn.Dropout(0.5), nn.Linear(10, 10), nn.ReLU(), nn.Dropout(0.2))
        mask = torch.zeros(100, dtype=torch.bool)
        mask[:round(100 * density)] = True
        masks = {"0": mask.reshape(10, 10), "2": torch.arange(100).reshape(10, 10) < 25}
        for _ in range(2):  # from the original rate each time, not from the last
            scale_dropout(model, masks, {"1": 0.5, "4": 0.2})
        rates[density] = model[1].p, model[4].p
    assert rates[1.0] == (0.5, pytest.approx(0.1))
    assert rates[0.09] == (pytest.approx(0.15), pytest.approx(0.1))


# --- the whole ----------------------------------------------------------------------------------------------


def test_every_round_trains_with_the_dropout_of_its_density(tiny, monkeypatch):
    """0.2 of TinyNet, sqrt(density) times it: half the weights, then a quarter."""
    rates = []
    monkeypatch.setattr(deep_compression, "train", lambda model, *_, **__: rates.append(model.drop.p))
    compress(tiny.model(), tiny.task(), Budget(density=0.25, bits=4), SHORT, seeded())
    assert rates[:2] == pytest.approx([0.2 * 0.5**0.5, 0.2 * 0.25**0.5], rel=0.01)


def test_tuning_moves_centroids_and_nothing_else(tiny):
    model = tiny.model()
    masks, _ = prune(model, tiny.task(), dict.fromkeys(LAYERS, 0.3), SHORT, seeded(), tiny.Run())
    rng = np.random.default_rng(0)
    shared = {name: share(model.get_submodule(name).weight, mask, 3, "linear", rng) for name, mask in masks.items()}
    tuned = tune_centroids(model, tiny.task(), shared, SHORT.tune, seeded(), tiny.Run())
    for name, (codebook, codes) in shared.items():
        weight = model.get_submodule(name).weight
        assert type(model.get_submodule(name)) in (nn.Conv2d, nn.Linear)
        assert torch.equal(weight, tuned[name][codes.long()])  # the codes are those of before
        assert torch.equal(weight[~masks[name]], torch.zeros(int((~masks[name]).sum())))
        assert len(weight[masks[name]].detach().unique()) <= 7
        used = codes[masks[name]].unique().long()
        assert tuned[name][0] == 0 and not bool((tuned[name][used] == codebook[used]).any())


def test_compress(tiny):
    model = tiny.model().train()
    before = tiny.fingerprint(model)
    out = compress(model, tiny.task(), Budget(density=0.25, bits=3), SHORT, seeded())
    assert tiny.same(tiny.fingerprint(model), before)  # dropout rates too
    for name, tensor in out.weights.items():
        assert tensor.kept <= keep_count(tensor.mask.numel(), 0.25) and tensor.bits == 3
        assert len(tensor.codes[tensor.mask].unique()) <= 7 and not bool((tensor.codes[tensor.mask] == 0).any())
        assert tensor.grid.values[0] == 0 and torch.equal(tensor.codes == 0, ~tensor.mask), name
    assert set(out.weights) == {"conv1", "conv2", "conv3", "fc"} and out.activations == {}


@pytest.mark.parametrize("init", ["density", "random", "exact"])
def test_every_start(tiny, init):
    config = Config(rounds=1, retrain=Recipe(0, 0.1), init=init, tune=Recipe(0, 0.1))
    one, two = (compress(tiny.model(), tiny.task(), Budget(density=0.3, bits=4), config, seeded(s)) for s in (0, 1))
    assert tiny.same(one.state_dict(), two.state_dict()) is (init != "random")


def test_settings_outside_what_is_allowed(tiny):
    with pytest.raises(ConfigError, match="rounds = 0"):
        Config(rounds=0)
    with pytest.raises(ConfigError, match="linear, density, random, exact"):
        Config(init="kmeans++")
    with pytest.raises(BudgetError, match="bits must be 2 or more"):
        compress(tiny.model(), tiny.task(), Budget(density=0.5, bits=1), SHORT, seeded())
    with pytest.raises(BudgetError, match="no Conv2d"):
        compress(nn.Sequential(nn.BatchNorm2d(3)), tiny.task(), Budget(density=0.5, bits=4), SHORT, seeded())
