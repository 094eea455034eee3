"""Neuron merging: the scaling matrix against the formulas spelled out in loops, and what merging leaves exact."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import networks
from methods import neuron_merging
from methods.core.budget import Budget
from methods.core.errors import BudgetError, CompressError, ConfigError
from methods.core.graph.build import apply
from methods.core.graph.channels import find_pairs
from methods.neuron_merging import Config, read_norms, read_weights, stand_ins


def net(norm=True, seed=0, channels=8):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1, bias=not norm),
                          nn.BatchNorm2d(channels) if norm else nn.Identity(), nn.ReLU(), nn.Conv2d(channels, 4, 3))
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    if norm:
        model[1].running_var.copy_(torch.rand(channels, generator=generator) + 0.2)
        model[1].weight.data.abs_().add_(0.1)
    return model.eval()


def compress(model, config, density):
    return neuron_merging.compress(model, None, Budget(channel_density=density), config, torch.Generator())


def by_loops(model, kept, removed, config):
    """Z [n, p] as the formulas say, one channel at a time, in numpy."""
    weight = model[0].weight.detach().double().reshape(len(model[0].weight), -1).numpy()
    norm = model[1]
    gamma, beta, mu, var = (t.detach().double().numpy() for t in (norm.weight, norm.bias, norm.running_mean,
                                                                 norm.running_var))
    z = np.zeros((len(kept), len(removed)))
    for column, j in enumerate(removed):
        cosines, scales, biases = [], [], []
        for i in kept:
            cosines.append(weight[j] @ weight[i] / np.linalg.norm(weight[j]) / np.linalg.norm(weight[i]))
            s = np.linalg.norm(weight[j]) / np.linalg.norm(weight[i])
            if config.mode == "official":
                scale = s * gamma[i] / gamma[j] * var[j] / var[i]
                bias = gamma[i] / var[i] * (s * (mu[j] - var[j] * beta[j] / gamma[j]) - mu[i]) + beta[i]
            else:
                si, sj = math.sqrt(var[i] + norm.eps), math.sqrt(var[j] + norm.eps)
                scale = s * gamma[j] / gamma[i] * si / sj
                bias = gamma[j] / sj * (s * (mu[i] - si * beta[i] / gamma[i]) - mu[j]) + beta[j]
            scales.append(scale)
            biases.append(abs(bias) / (scale if config.mode == "official" else abs(scale)))
        low, high = min(biases), max(biases)
        score = [config.lam * (1 - c) + (1 - config.lam) * (b - low) / (high - low)
                 for c, b in zip(cosines, biases, strict=True)]
        best = score.index(min(score))
        if cosines[best] >= config.threshold:
            z[best, column] = scales[best]
    return z


@pytest.mark.parametrize("mode", neuron_merging.MODES)
@pytest.mark.parametrize("lam, threshold", [(0.85, 0.1), (0.0, -1.0), (1.0, 0.1), (0.5, 0.3)])
def test_scaling_matrix(mode, lam, threshold):
    for seed in range(5):
        model, config = net(seed=seed, channels=12), Config(mode=mode, lam=lam, threshold=threshold)
        if seed > 2:  # scales of both signs
            model[1].weight.data[::3] *= -1
        pair = find_pairs(model)[0]
        kept, removed = [0, 2, 3, 7, 8, 11], [1, 4, 5, 6, 9, 10]
        ours = stand_ins(read_weights(model, pair), read_norms(model[1], mode), torch.tensor(kept),
                         torch.tensor(removed), config)
        assert np.allclose(ours.numpy(), by_loops(model, kept, removed, config), rtol=1e-10)
        assert ((ours != 0).sum(0) <= 1).all()


def test_derived_mode_is_exact_for_a_multiple_whose_bias_fits():
    """x_j = scale x_i + bias: with bias 0 and a ReLU between, merging changes nothing."""
    model = net().double()
    ratio, norm = 0.4, model[1]
    with torch.no_grad():
        model[0].weight[1] = ratio * model[0].weight[2]
        gamma, beta, mu, sigma = norm.weight, norm.bias, norm.running_mean, (norm.running_var + norm.eps).sqrt()
        norm.bias[1] = -gamma[1] / sigma[1] * (ratio * (mu[2] - sigma[2] * beta[2] / gamma[2]) - mu[1])
    pair, kept, removed = find_pairs(model)[0], torch.tensor([0, 2, 3, 4, 5, 6, 7]), torch.tensor([1])
    z = stand_ins(read_weights(model, pair), read_norms(norm, "derived"), kept, removed, Config(mode="derived"))
    scale = (ratio * gamma[1] / gamma[2] * sigma[2] / sigma[1]).detach()
    assert z[1, 0] == pytest.approx(float(scale), rel=1e-12) and int((z != 0).sum()) == 1
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        seen = model[:3](x)
        assert torch.allclose(seen[:, 1], scale * seen[:, 2], rtol=0, atol=1e-12)


@pytest.mark.parametrize("target", ["conv", "linear"])
def test_twice_a_filter_without_norm_is_exact(target):
    if target == "conv":
        model, x = net(norm=False), torch.randn(2, 3, 6, 6)
    else:
        model, x = nn.Sequential(nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(5, 9)
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = model[0].weight[4] / 2, model[0].bias[4] / 2
        model[0].weight[1:2] *= 0.1
        model[0].bias[1] *= 0.1
        small = apply(compress(model, Config(target=target, criterion="l2"), 7 / 8), model)
        assert len(small[0].weight) == 7
        assert torch.allclose(small(x), model(x), atol=1e-5)


def test_along_a_chain_filters_are_those_of_the_original_network():
    """Merging leaves a thousandth of the first filter of layer 2, which is its longest; without norm biases count."""
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    first, second, last = model[0], model[2], model[4]
    with torch.no_grad():
        first.weight[1], first.bias[1] = first.weight[0] / 1000, first.bias[0] / 1000
        second.weight.copy_(torch.tensor([[0.0, 10, 0, 0], [2, 0, 0, 0], [0, 0, 0, 3]]))
        second.bias.zero_()
        for config in (Config(target="linear", criterion="l2"), Config(target="linear", merge=False)):
            small = compress(model, config, {"0": 0.75, "2": 2 / 3})
            assert torch.equal(small.rest["4.weight"], last.weight[:, [0, 2]])
        second.weight.copy_(torch.tensor([[1.0, 0, 0, 0], [2, 0, 0, 0], [3, 0, 0, 0]]))
        second.bias.copy_(torch.tensor([9.0, 0, 0]))
        small = compress(model, Config(target="linear", merge=False), {"0": 0.75, "2": 2 / 3})
        assert torch.equal(small.rest["4.weight"], last.weight[:, [0, 2]])


def test_above_every_cosine_merging_is_pruning_bit_for_bit():
    model = net()
    merged, pruned = (compress(model, config, 0.5) for config in (Config(threshold=1.1), Config(merge=False)))
    assert all(torch.equal(merged.rest[name], pruned.rest[name]) for name in pruned.rest)
    assert pruned.weights == {} and pruned.topology.widths == {"0": (4, 3), "1": (4, 4), "3": (4, 4)}
    order = sorted(range(8), key=lambda i: float(model[0].weight[i].detach().abs().sum()))
    assert torch.equal(pruned.rest["3.weight"], model[3].weight[:, sorted(order[4:])])
    zero = compress(model, Config(threshold=0.0), 0.5)
    least = compress(model, Config(threshold=-1.0), 0.5)
    assert all(torch.equal(zero.rest[name], least.rest[name]) for name in zero.rest)  # 0 switches it off


def test_degenerate_channels_are_never_stand_ins():
    model = net()
    with torch.no_grad():
        model[0].weight[3] = 0.0  # kept, but no direction
        model[1].weight[5] = 0.0
    pair = find_pairs(model)[0]
    kept, removed = torch.tensor([3, 5]), torch.tensor([0, 1, 2, 4, 6, 7])
    for mode in neuron_merging.MODES:
        for lam in (0.0, 0.85, 1.0):
            z = stand_ins(read_weights(model, pair), read_norms(model[1], mode), kept, removed,
                          Config(mode=mode, lam=lam, threshold=0.0))
            assert z.isfinite().all() and not z[0].any()
            z = stand_ins(read_weights(model, pair), read_norms(model[1], mode), torch.tensor([3, 5, 7]), removed[:5],
                          Config(mode=mode, lam=lam, threshold=0.0))
            assert z.isfinite().all() and not z[0].any() and (z[2] != 0).all()
    flat = read_norms(nn.BatchNorm2d(8), "official")  # equal distances of biases: 0 / 0 in the official code
    z = stand_ins(read_weights(model, pair), flat, torch.tensor([0, 1]), torch.tensor([2]), Config(threshold=0.0))
    assert int((z != 0).sum()) == 1


def test_counts_round_for_linear_layers_and_floor_for_convolutions():
    lenet = networks.build("lenet300", 10, 1)
    widths = compress(lenet, Config(target="linear"), 0.297).topology.widths
    assert widths["ip1"] == (89, 784) and widths["ip2"] == (30, 89)  # of 89.1 and 29.7
    assert compress(lenet, Config(target="linear"), 0.295).topology.widths["ip1"] == (88, 784)  # 88.5, half to even
    small = compress(networks.build("lenet5_caffe", 10, 1), Config(), 0.55)
    assert small.topology.widths["conv1"] == (11, 1) and small.topology.widths["conv2"] == (27, 11)


def test_errors(tiny):
    for options, word in (({"mode": "fast"}, "official, derived"), ({"target": "all"}, "conv, linear"),
                          ({"lam": 2.0}, r"lam = 2.0: allowed is a number in \[0, 1\]")):
        with pytest.raises(ConfigError, match=word):
            Config(**options)
    with pytest.raises(BudgetError, match="bits"):
        neuron_merging.compress(net(), None, Budget(channel_density=0.5, bits=4), Config(), torch.Generator())
    with pytest.raises(ConfigError, match="l1, l2, gm"):
        compress(net(), Config(criterion="apoz"), 0.5)
    with pytest.raises(CompressError, match="neuron_merging finds no prunable pair in TinyNet: it needs a Linear"):
        compress(tiny.model(), Config(target="linear"), 0.5)


def test_no_data_no_forward_pass_no_randomness(monkeypatch, tiny):
    model = tiny.model()
    before, state, generator = tiny.fingerprint(model), torch.get_rng_state(), torch.Generator().manual_seed(7)
    drawn = generator.get_state()

    def fail(*_):
        raise AssertionError("a layer was run")

    with monkeypatch.context() as patched:
        for kind in (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.ReLU):
            patched.setattr(kind, "forward", fail)
        small = neuron_merging.compress(model, None, Budget(channel_density=0.5), Config(), generator)
    assert torch.equal(generator.get_state(), drawn) and torch.equal(torch.get_rng_state(), state)
    assert tiny.same(tiny.fingerprint(model), before) and neuron_merging.DATA == "none"
    assert apply(small, model)(torch.zeros(2, *tiny.shape)).shape == (2, 4)
