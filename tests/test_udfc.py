"""UDFC: both closed forms against independent solvers, what is exact and what is not, and the paper's counts."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import networks
from methods import udfc
from methods.core.artifact import Levels
from methods.core.budget import Budget
from methods.core.fit.odd_levels import quantize_odd
from methods.core.fit.quantize import fit_asymmetric, fit_symmetric, quantize
from methods.core.graph.build import apply
from methods.core.graph.channels import Filters, find_pairs, fit_scales, identity_on, read_filters
from methods.udfc import Config, solve

PLAIN = Config(alpha1=0.01)


def net(relu=True, bias=True, seed=0, channels=6, pool=False):
    """conv 3x3 -> BN -> ReLU -> conv 3x3 with random statistics, eval mode."""
    generator = torch.Generator().manual_seed(seed)
    middle = [nn.ReLU() if relu else nn.Identity()] + [nn.MaxPool2d(2)] * pool
    model = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1, bias=bias), nn.BatchNorm2d(channels), *middle,
                          nn.Conv2d(channels, 4, 3, padding=1))
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    model[1].running_var.copy_(torch.rand(channels, generator=generator) + 0.2)
    model[1].weight.data.abs_().add_(0.1)
    return model.eval()


def compress(model, config=PLAIN, **budget):
    return udfc.compress(model, None, Budget(**budget), config, torch.Generator())


def make_combination(model, coefficients, kept, target):
    """Change BN and filter `target` of a double model so that r_j = sum t_i r_i and k_j = sum t_i k_i."""
    pair = find_pairs(model)[0]
    filters, norm, layer = read_filters(model, pair), model[1], model[0]
    t = torch.tensor(coefficients, dtype=torch.float64)
    ratio = filters.gain[target]
    with torch.no_grad():
        layer.weight[target] = ((t @ filters.r[kept]) / ratio).reshape(layer.weight[target].shape)
        bias = 0.0 if layer.bias is None else layer.bias[target]
        norm.bias[target] = t @ filters.k[kept] - ratio * (bias - norm.running_mean[target])
    return pair


def prune_by(model, pair, kept, config):
    """The double network that `udfc` makes if it is to keep `kept`."""
    small = copy.deepcopy(model)
    with torch.no_grad():  # the kept filters become the longest ones, without changing the function
        for i in kept:
            factor = 100.0
            small[0].weight[i] *= factor
            if small[0].bias is not None:
                small[0].bias[i] *= factor
            small[1].running_mean[i] *= factor
            small[1].running_var[i] = (small[1].running_var[i] + small[1].eps) * factor**2 - small[1].eps
    udfc.prune(small, [pair], {pair.first: len(kept) / len(model[0].weight)}, None, config)
    return small


# --- what pruning leaves exact -----------------------------------------------------------------------------

X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(99))


@pytest.mark.parametrize("bias", [False, True])
def test_without_activation_a_combination_is_exact(bias):
    model = net(relu=False, bias=bias).double()
    pair = make_combination(model, [0.7, -1.3], [0, 2], 1)
    small = prune_by(model, pair, [0, 2, 3, 4, 5], PLAIN)
    assert small[0].out_channels == 5 and small[3].in_channels == 5
    with torch.no_grad():
        assert torch.allclose(small(X), model(X), rtol=0, atol=1e-11)


def test_a_missed_bias_is_a_known_constant():
    model = net(relu=False).double()
    pair = make_combination(model, [0.7, -1.3], [0, 2], 1)
    with torch.no_grad():
        model[1].bias[1] += 0.25
    small = prune_by(model, pair, [0, 2, 3, 4, 5], Config(alpha1=0.0))
    with torch.no_grad():
        error = (model(X) - small(X))[:, :, 1:-1, 1:-1]
        wanted = 0.25 * model[3].weight[:, 1].sum((1, 2))
        assert torch.allclose(error, wanted[None, :, None, None].expand_as(error), rtol=0, atol=1e-11)


def test_relu_keeps_one_positive_multiple_and_no_sum():
    model = net().double()
    pair = make_combination(model, [1.7], [2], 1)
    kept = [0, 2, 3, 4, 5]
    with torch.no_grad():
        assert torch.allclose(prune_by(model, pair, kept, PLAIN)(X), model(X), rtol=0, atol=1e-11)
        pair = make_combination(model, [0.7, 0.6], [0, 2], 1)
        assert not torch.allclose(prune_by(model, pair, kept, PLAIN)(X), model(X), atol=1e-3)


def test_no_reconstruction_is_plain_pruning_bit_for_bit():
    model = net(channels=10)
    kept = sorted(sorted(range(10), key=lambda i: float(model[0].weight[i].detach().double().norm()))[-7:])
    small = compress(model, Config(criterion="l2", reconstruct=False), channel_density=0.7)
    assert torch.equal(small.rest["0.weight"], model[0].weight[kept])
    assert torch.equal(small.rest["3.weight"], model[3].weight[:, kept])
    assert small.topology.widths == {"0": (7, 3), "1": (7, 7), "3": (4, 7)} and small.weights == {}
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(small.rest[f"1.{name}"], model[1].state_dict()[name][kept])


def test_every_channel_kept_changes_nothing():
    model = net()
    small = compress(model, channel_density=1.0)
    state = {name: value for name, value in model.state_dict().items() if not name.endswith("tracked")}
    assert small.topology.widths == {} and small.rest.keys() == state.keys()
    assert all(torch.equal(small.rest[name], state[name]) for name in state)


def test_columns_of_the_next_layer_are_the_sum_of_eq7():
    model = net(channels=8)
    order = sorted(range(8), key=lambda i: float(model[0].weight[i].detach().double().abs().sum()))
    removed, kept = sorted(order[:3]), sorted(order[3:])
    filters = read_filters(model, find_pairs(model)[0])
    s = solve(filters[torch.tensor(kept)], filters[torch.tensor(removed)], PLAIN)
    small = compress(model, channel_density=5 / 8)
    for a, i in enumerate(kept):
        wanted = model[3].weight[:, i].double() + sum(s[a, b] * model[3].weight[:, j].double()
                                                      for b, j in enumerate(removed))
        assert torch.allclose(small.rest["3.weight"][:, a].double(), wanted, atol=1e-5)


def test_raw_coefficients_are_those_of_the_filters_without_batch_norm():
    """Eq. (4) as printed: |W_j - sum s_i W_i|^2 + alpha1 (K_j - sum s_i K_i)^2, by stacking."""
    model = net()
    weight, k = model[0].weight.detach().double().flatten(1), read_filters(model, find_pairs(model)[0]).k
    small = apply(compress(model, Config(form="raw", criterion="l2", alpha1=0.25), channel_density=0.5), model)
    kept = weight.norm(dim=1).topk(3).indices.sort().values
    removed = torch.tensor([j for j in range(6) if j not in kept])
    stack = [np.concatenate([weight[rows].T.numpy(), 0.5 * k[rows][None].numpy()]) for rows in (kept, removed)]
    s = torch.from_numpy(np.linalg.lstsq(*stack, rcond=None)[0])
    wanted = model[3].weight[:, kept] + torch.einsum("ij,mjyx->miyx", s, model[3].weight[:, removed].double())
    assert torch.allclose(small[3].weight.double(), wanted, atol=1e-5)


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
def test_other_grids(scheme):
    model = net()
    small = compress(model, Config(scheme=scheme, per_channel=True, reconstruct=False), bits=4)
    fit = {"symmetric": fit_symmetric, "asymmetric": fit_asymmetric}[scheme]
    for name, layer in (("0", model[0]), ("3", model[3])):
        assert torch.equal(small.weights[name].decode(), quantize(layer.weight, fit(layer.weight, 4), 4).decode())


def test_chains_use_the_original_filters():
    model = networks.build("lenet5_caffe", 10, 1).eval()
    small = compress(model, channel_density={"conv1": 0.5, "conv2": 0.5})
    assert small.topology.widths == {"conv1": (10, 1), "conv2": (25, 10), "ip1": (500, 400)}
    original = read_filters(model, find_pairs(model)[1])
    norms = original.r.abs().sum(1)
    kept = norms.argsort()[25:].sort().values
    removed = torch.tensor(sorted(set(range(50)) - set(kept.tolist())))
    z = identity_on(kept, 50)
    z[:, removed] = solve(original[kept], original[removed], PLAIN)
    wanted = torch.einsum("an,mnk->mak", z, model.ip1.weight.detach().double().reshape(500, 50, 16))
    assert torch.allclose(small.rest["ip1.weight"].double(), wanted.reshape(500, -1), atol=1e-5)
    rebuilt = apply(small, model)
    assert rebuilt(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


# --- quantization ------------------------------------------------------------------------------------------


def printed_quantizer(weight, bits):
    """Eq. (3) as printed, times max|W|."""
    top, peak = 2**bits - 1, np.abs(weight).max()
    return peak * (2 / top * np.round(top * (weight / (2 * peak) + 0.5)) - 1)


@pytest.mark.parametrize("bits", [1, 2, 4, 6, 16])
def test_eq3(bits):
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(bits))
    tensor = quantize_odd(weight, bits)
    decoded, peak, top = tensor.decode().double(), float(weight.abs().max()), 2**bits - 1
    assert np.allclose(decoded, printed_quantizer(weight.double().numpy(), bits), rtol=1e-6, atol=0)
    assert isinstance(tensor.grid, Levels) and tensor.grid.levels.tolist() == list(range(-top, top + 1, 2))
    assert len(decoded.unique()) <= 2**bits and float(decoded.abs().max()) == pytest.approx(peak, rel=1e-6)
    assert (weight.double() - decoded).abs().max() <= peak / top * (1 + 1e-6)
    order = weight.reshape(-1).argsort()
    assert (decoded.reshape(-1)[order].diff() >= 0).all()
    assert torch.equal(quantize_odd(-weight, bits).decode(), -tensor.decode())
    assert bool((decoded != 0).all()) and bool((decoded * weight.double() > 0).all())


def test_quantizing_zeros():
    assert not quantize_odd(torch.zeros(2, 3), 4).decode().any()
    some = torch.tensor([[0.0, 3.0], [0.0, 0.0]])
    assert quantize_odd(some, 2).decode().tolist() == [[1.0, 3.0], [1.0, 1.0]]  # no level is 0; half to even
    assert quantize_odd(some, 2, per_channel=True).decode().tolist() == [[1.0, 3.0], [0.0, 0.0]]
    scaled = quantize_odd(some, 2, torch.tensor([2.0, 0.0], dtype=torch.float64))
    assert scaled.decode().tolist() == [[2.0, 6.0], [0.0, 0.0]]
    assert quantize_odd(torch.full((1, 2), 1e-45), 16).decode().isfinite().all()


def test_quantization_factors_are_those_of_the_quantized_filters():
    """Not of Eq. (21) as printed, which is 1."""
    model, found = net(seed=3), {}
    for bits in (2, 4, 16):
        small = compress(model, bits=bits)
        found[bits] = small.rest["1.weight"].double() / model[1].weight.detach().double()
        filters = read_filters(model, find_pairs(model)[0])
        rough = small.weights["0"].decode().double().reshape(6, -1) * filters.gain[:, None]
        for i in range(6):
            stack = np.append(rough[i], np.sqrt(0.008) * float(filters.k[i]))[:, None]
            target = np.append(filters.r[i], np.sqrt(0.008) * float(filters.k[i]))
            best = np.linalg.lstsq(stack, target, rcond=None)[0][0]
            assert float(found[bits][i]) == pytest.approx(best, rel=1e-5) and best > 0
        assert torch.allclose(small.rest["1.bias"].double(), model[1].bias.double() * found[bits], rtol=1e-5)
    assert (found[2] - 1).abs().max() > 0.05 and (found[16] - 1).abs().max() < 1e-5


def test_without_reconstruction_nothing_is_rescaled():
    model = net()
    small = compress(model, Config(reconstruct=False), bits=2)
    assert torch.equal(small.rest["1.weight"], model[1].weight) and set(small.weights) == {"0", "3"}


def test_without_batch_norm_the_factors_go_into_the_scale():
    model = networks.build("lenet5_caffe_relu", 10, 1).eval()
    small = compress(model, bits=3)
    scale = small.weights["conv1"].grid.scale
    assert scale.shape == (20,) and small.weights["ip2"].grid.scale.ndim == 0
    factors = scale.double() / (model.conv1.weight.detach().abs().max().double() / 7)
    filters = read_filters(model, find_pairs(model)[0])
    rough = Filters(quantize_odd(model.conv1.weight, 3).decode().double().reshape(20, -1), filters.k, filters.gain)
    assert torch.allclose(factors, fit_scales(filters, rough, 0.008), rtol=1e-5)
    assert torch.allclose(small.rest["conv1.bias"].double(), model.conv1.bias.double() * factors, atol=1e-6)


def test_joint_aims_at_what_is_stored():
    model = net(channels=8, seed=5)
    small = compress(model, Config(joint=True), channel_density=5 / 8, bits=3)
    rebuilt, filters = apply(small, model), read_filters(model, find_pairs(model)[0])
    order = filters.r.new_tensor([float(w.detach().double().abs().sum()) for w in model[0].weight]).argsort()
    kept, removed = order[3:].sort().values, order[:3].sort().values
    stored = read_filters(rebuilt, find_pairs(rebuilt)[0])
    s = solve(stored, filters[removed], PLAIN)
    wanted = model[3].weight.detach().double()[:, kept] + torch.einsum(
        "aj,mjkl->makl", s, model[3].weight.detach().double()[:, removed])
    assert torch.allclose(small.weights["3"].decode(), quantize_odd(wanted.float(), 3).decode(), atol=1e-5)
    apart = compress(model, channel_density=5 / 8, bits=3)
    assert not torch.equal(apart.weights["3"].decode(), small.weights["3"].decode())
