"""DF-MPC: the ternary layer, the closed form of the coefficients, and which layers are which."""

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import networks
from methods import df_mpc
from methods.core.artifact import Affine, Levels
from methods.core.budget import Budget
from methods.core.errors import BudgetError, CompressError, ConfigError
from methods.core.graph.build import apply
from methods.core.graph.channels import find_pairs, read_filters, scale_inputs
from methods.df_mpc import Config, choose_pairs, ternary


def net(seed=0, channels=6):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
                          nn.Conv2d(channels, 4, 3, padding=1))
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    model[1].running_var.copy_(torch.rand(channels, generator=generator) + 0.2)
    return model.eval()


def compress(model, config=None, **budget):
    return df_mpc.compress(model, None, Budget(**budget), Config() if config is None else config, torch.Generator())


def test_ternary_layer():
    weight = torch.randn(5, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    tensor = ternary(weight, None)
    flat = weight.double().reshape(-1).tolist()
    threshold = 0.7 * sum(map(abs, flat)) / len(flat)
    large = [abs(w) for w in flat if abs(w) > threshold]
    alpha = sum(large) / len(large)
    wanted = [np.sign(w) * alpha if abs(w) > threshold else 0.0 for w in flat]
    assert torch.allclose(tensor.decode().double().reshape(-1), torch.tensor(wanted, dtype=torch.float64), rtol=1e-6)
    assert set(tensor.codes.unique().tolist()) == {-1, 0, 1} and tensor.bits == 2
    assert not ternary(torch.zeros(2, 3), None).decode().any()
    factors = torch.tensor([1.0, 2.0, 0.0, 1.0, 0.5], dtype=torch.float64)
    scaled = ternary(weight, factors)
    assert torch.allclose(scaled.decode(), tensor.decode() * factors.float().reshape(-1, 1, 1, 1))


@pytest.mark.parametrize("lambda1, lambda2", [(0.5, 0.0), (0.0, 0.0), (0.1, 0.01), (0.6, 0.004)])
def test_coefficients_are_one_dimensional_least_squares(lambda1, lambda2):
    model = net(seed=2)
    small = compress(model, Config(lambda1=lambda1, lambda2=lambda2), bits=6)
    filters = read_filters(model, find_pairs(model)[0])
    rough = small.weights["0"].decode().double().reshape(6, -1) * filters.gain[:, None]
    for j in range(6):
        y = float(filters.k[j])
        stack = np.concatenate([rough[j], [lambda1**0.5 * y, lambda2**0.5]])[:, None]
        target = np.concatenate([filters.r[j], [lambda1**0.5 * y, 0.0]])
        best = np.linalg.lstsq(stack, target, rcond=None)[0][0]
        ours = float(small.rest["1.weight"][j]) / float(model[1].weight[j].detach())
        assert ours == pytest.approx(best, rel=1e-5) and best >= 0
        assert float(small.rest["1.bias"][j]) == pytest.approx(float(model[1].bias[j].detach()) * best, rel=1e-5)
        assert ((stack[:, 0] * best - target) ** 2).sum() <= ((stack[:, 0] - target) ** 2).sum() + 1e-12


def test_an_exact_low_bit_layer_needs_no_compensation():
    model = net()
    with torch.no_grad():
        model[0].weight.copy_(0.3 * model[0].weight.sign())
    small = compress(model, Config(lambda1=0.0), bits=6)
    assert torch.allclose(small.rest["1.weight"], model[1].weight, rtol=1e-5)


def test_norms_take_what_the_next_layer_would():
    """c on gamma and beta equals c on the input channels of the next layer."""
    model = net(seed=4)
    ours = apply(compress(model, bits=6), model).double()
    plain = apply(compress(model, Config(compensate=False), bits=6), model).double()
    assert torch.equal(plain[1].weight.float(), model[1].weight)
    factors = ours[1].weight.detach() / plain[1].weight.detach()
    scale_inputs(plain[3], torch.diag(factors))
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(ours(x), plain(x), rtol=0, atol=1e-5)


def test_dead_filters_and_missing_norms():
    model = net()
    with torch.no_grad():
        model[0].weight[2], model[1].weight[2], model[1].bias[2] = 0.0, 0.0, 0.0
    small = compress(model, Config(lambda1=0.0), bits=6)
    assert all(value.isfinite().all() for value in small.state_dict().values())
    lenet = networks.build("lenet5_caffe_relu", 10, 1).eval()
    found = compress(lenet, bits=6)
    assert found.notes["low"] == ["conv1"] and found.weights["conv1"].grid.scale.shape == (20,)
    unscaled = ternary(lenet.conv1.weight, None)
    factors = found.weights["conv1"].grid.scale / unscaled.grid.scale
    assert torch.allclose(found.rest["conv1.bias"], lenet.conv1.bias * factors, rtol=1e-5)
    assert apply(found, lenet)(torch.zeros(1, 1, 28, 28)).isfinite().all()


def test_which_layers_are_low():
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in (0, 1, 2)]
    resnet = networks.build("resnet20", 10, 3)
    small = compress(resnet, bits=6)
    assert small.notes["low"] == [f"{block}.conv1" for block in blocks]
    assert {tensor.bits for tensor in small.weights.values()} == {2, 6} and len(small.weights) == 22
    for name, tensor in small.weights.items():
        low = name in small.notes["low"]
        assert isinstance(tensor.grid, Affine if low else Levels) and tensor.bits == (2 if low else 6)
    vgg = networks.build("vgg7", 10, 3)
    assert [(p.first, p.second) for p in choose_pairs(vgg, find_pairs(vgg))] == [
        ("features.0", "features.3"), ("features.7", "features.10"), ("features.14", "features.17")]
    bottleneck = nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4),
                               nn.ReLU(), nn.Conv2d(4, 8, 1))
    assert [(p.first, p.second) for p in choose_pairs(bottleneck, find_pairs(bottleneck))] == [("3", "6")]


def test_three_and_six_bits():
    small = compress(net(), Config(low_bits=3), bits=6)
    assert small.weights["0"].bits == 3 and small.weights["0"].grid.levels.tolist() == [-7, -5, -3, -1, 1, 3, 5, 7]
    assert compress(net(), Config(low_bits=6), bits={"0": 6, "3": 8}).weights["3"].bits == 8


def test_errors():
    with pytest.raises(BudgetError, match="bits = 2 of 0: allowed is low_bits = 3 or more"):
        compress(net(), Config(low_bits=3), bits=2)
    with pytest.raises(BudgetError, match="needs the budget field 'bits'"):
        compress(net())
    with pytest.raises(CompressError, match="df_mpc finds no prunable pair"):
        compress(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), bits=6)
    only = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    with pytest.raises(CompressError, match="1 x 1"):
        compress(only, bits=6)
    for options in ({"low_bits": 1}, {"lambda1": -0.1}, {"lambda2": float("inf")}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            Config(**options)


def test_no_data_no_forward_pass_no_randomness(monkeypatch, tiny):
    model = tiny.model()
    before, state, generator = tiny.fingerprint(model), torch.get_rng_state(), torch.Generator().manual_seed(7)
    drawn = generator.get_state()

    def fail(*_):
        raise AssertionError("a layer was run")

    for kind in (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.ReLU):
        monkeypatch.setattr(kind, "forward", fail)
    df_mpc.compress(model, None, Budget(bits=6), Config(), generator)
    assert torch.equal(generator.get_state(), drawn) and torch.equal(torch.get_rng_state(), state)
    assert tiny.same(tiny.fingerprint(model), before) and df_mpc.DATA == "none"
