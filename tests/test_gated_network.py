"""The network of Bayesian Bits: ranges, folded batch norm, a training step in float64, and what is stored of it."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from methods.bayesian_bits import Config, Phase, gate_costs, regulariser, store_activations, store_weights
from methods.bayesian_bits.folding import Moments
from methods.bayesian_bits.network import GatedNetwork, Point, Wiring, fix_gates, survey
from methods.core.artifact import ActivationQuantizer
from methods.core.graph.fold import fold_batchnorm
from methods.core.train.finetune import Recipe, train
from methods.engine.exact import IntegerNetwork

SHORT = Recipe(epochs=1, lr=1e-3, optimizer="adam", weight_decay=0.0, schedule="constant")


# --- ranges ------------------------------------------------------------------------------------------------


def test_ranges():
    """Section 1.6: signed if anything is negative, beta = max(x) of the folded weight, else max|x|."""
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -4.0], [0.5, 0.0], [0.1, 0.2]]))
        model[1].running_var.copy_(torch.tensor([4.0, 0.01, 1.0]) - 1e-5)
        model[3].weight.fill_(-0.25)
    points, wiring = survey(model, torch.tensor([[1.0, 0.0]]))
    by_name = {(p.weight, p.name): p for p in points}
    assert by_name[True, "0"].beta == pytest.approx(5.0) and by_name[True, "0"].signed
    assert by_name[True, "3"].beta == pytest.approx(0.25) and by_name[True, "3"].signed
    assert by_name[False, "2"].beta == pytest.approx(5.0) and not by_name[False, "2"].signed
    assert wiring.feeders == {"3": "0"} and wiring.sources["3"] == ("2", 1) and wiring.macs == {"0": 6, "3": 6}


POOLS = [(nn.AvgPool2d(2), 4), (nn.AvgPool2d(3, 2, 1), 9), (nn.AvgPool2d(3, 1, 1), 9), (nn.AvgPool2d((1, 2)), 2),
         (nn.AvgPool2d(2, stride=3), 4), (nn.AdaptiveAvgPool2d(2), 16)]


@pytest.mark.parametrize("pool, n", POOLS)
def test_what_an_average_pool_returns_is_stored_exactly(tiny, pool, n):
    """Windows may overlap, be padded, or leave values out: a mean of n codes is a code on a grid n times as fine."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), pool, nn.Conv2d(6, 4, 2), nn.ReLU(),
                              nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)).eval()
    grid = ActivationQuantizer(0.04, 128, 8)
    inputs = grid.decode(grid.encode(tiny.Batches(24, 5).inputs))
    points, wiring = survey(model, inputs, bits=(8, 4))
    assert wiring.sources["3"] == ("1", n)
    fixed, topology = fix_gates(GatedNetwork(model, points, wiring).eval())
    stored = store_weights(fixed, topology)
    stored = replace(stored, activations=store_activations(fixed, list(stored.weights), {"0": grid}))
    with torch.no_grad():
        wanted = fixed(inputs)
    assert (IntegerNetwork(stored, model)(inputs) - wanted).abs().max() < 1e-3 * wanted.std()


# --- folded batch norm -------------------------------------------------------------------------------------


def unquantized(model, inputs):
    """A GatedNetwork of `model` in which no quantizer does anything: 32 bits over a range that nothing leaves."""
    points, wiring = survey(model.eval(), inputs, prune=False, bits=(32, 32))
    return GatedNetwork(model, [replace(p, beta=50.0, signed=True) for p in points], wiring)


def test_folded_batch_norm_without_quantization_is_batch_norm(tiny):
    """BN1, in training and in eval mode, with a convolution that has a bias, and the statistics afterwards."""
    model, inputs = tiny.model(), tiny.Batches(48, 5).inputs
    model.drop.p = 0.0
    with torch.no_grad():
        for norm in (model.bn1, model.bn2, model.bn3):
            norm.weight.uniform_(-1.5, 1.5, generator=torch.Generator().manual_seed(0))
    reference = tiny.net()
    reference.load_state_dict(model.state_dict())
    reference.drop.p = 0.0
    network = unquantized(model, inputs)
    for mode in (True, False):
        network.train(mode), reference.train(mode)
        ours, wanted = network(inputs), reference(inputs)
        assert torch.allclose(ours, wanted, atol=2e-4), mode
    for name, value in reference.state_dict().items():
        if "running" in name:
            assert torch.allclose(network.network.state_dict()[name], value, atol=1e-5), name
    network.train(), reference.train()
    grads = [torch.autograd.grad(F.cross_entropy(net(inputs), torch.arange(48) % 4), weight)[0]
             for net, weight in ((network, model.conv2.weight), (reference, reference.conv2.weight))]
    assert torch.allclose(*grads, atol=2e-4)


@pytest.mark.parametrize("shape", [(6, 3), (5, 3, 4), (4, 3, 2, 5)])
def test_moments(shape):
    """In float64, with their gradients, wherever channels lie in memory."""
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 3.0
    x = (x.to(memory_format=torch.channels_last) if x.ndim == 4 else x).requires_grad_()
    dims = [d for d in range(x.ndim) if d != 1]
    for ours, wanted in zip(Moments.apply(x), torch.var_mean(x, dims, correction=0), strict=True):
        torch.testing.assert_close(ours, wanted)
    assert torch.autograd.gradcheck(Moments.apply, x)


def test_a_pruned_channel_by_hand():
    """BN2: its output is b - g mu_B / sigma_B in training and b - g mu / sigma in eval, statistics those of float W."""
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.BatchNorm1d(2), nn.Linear(2, 2)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [2.0]]))
        model[1].running_var.fill_(4.0 - 1e-5)
        model[1].running_mean.fill_(0.5)
        model[1].weight.copy_(torch.tensor([2.0, 3.0]))
        model[1].bias.copy_(torch.tensor([0.1, 0.2]))
    x = torch.tensor([[1.0], [3.0], [5.0]])
    points, wiring = survey(model, x, bits=(8, 8))
    network = GatedNetwork(model, points, wiring)
    folded = torch.tensor([1.0, 3.0])  # W g / sigma_r
    assert network.points[0].beta == pytest.approx(3.0)
    with torch.no_grad():
        network.phi2.copy_(torch.tensor([20.0, -20.0]))
    kept = round(1.0 / (3.0 / 255)) * 3.0 / 255  # the folded weight 1 on the unsigned 8-bit grid over [0, 3]
    network.eval().drawn = network.draw()
    y = network.multiply(0, model[0], model[1], x)
    assert torch.allclose(y[:, 0], kept * x[:, 0] + 0.1 - 2.0 * 0.5 / 2)
    assert torch.allclose(y[:, 1], torch.full((3,), 0.2 - 3.0 * 0.5 / 2)) and folded.tolist() == [1.0, 3.0]
    network.train().drawn = network.draw()
    y = network.multiply(0, model[0], model[1], x)
    sigma = [math.sqrt(8 / 3 + 1e-5), math.sqrt(32 / 3 + 1e-5)]  # of x and of 2 x, whose means are 3 and 6
    assert torch.allclose(y[:, 0], kept * x[:, 0] * 2 / sigma[0] + 0.1 - 2.0 * 3 / sigma[0])
    assert torch.allclose(y[:, 1], torch.full((3,), 0.2 - 3.0 * 6 / sigma[1]))
    assert model[1].running_mean.tolist() == pytest.approx([0.9 * 0.5 + 0.1 * 3, 0.9 * 0.5 + 0.1 * 6])
    assert model[1].running_var.tolist() == pytest.approx([0.9 * 4 + 0.1 * 4, 0.9 * 4 + 0.1 * 16], rel=1e-4)


# --- a training step ---------------------------------------------------------------------------------------


def quantized_by_hand(x, beta, signed, z, z2=None):
    """Section 1.7 in float64 autograd, by residuals, with every gate used as it is drawn."""
    top = (1 - 1e-7) * beta
    x = torch.minimum(torch.maximum(x, -top if signed else 0 * top), top)
    total, terms = 0.0, []
    for bits in (2, 4, 8, 16, 32):
        step = (2 if signed else 1) * beta / (2**bits - 1)
        u = (x - total) / step
        terms.append(step * (u + (u.round() - u).detach()))
        total = total + terms[-1]
    y = terms[0] + z[0] * (terms[1] + z[1] * (terms[2] + z[2] * (terms[3] + z[3] * terms[4])))
    return y if z2 is None else y * z2[:, None]


def sampled_by_hand(phi, u):
    return (1.2 * torch.sigmoid((u.log() - (1 - u).log() + phi) * 1.5) - 0.1).clamp(0, 1)


def test_a_training_step_in_float64():
    """T1: loss and all gradients of linear - batch norm - ReLU - linear for prescribed u, with fractional gates."""
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn(value.shape, generator=generator))
        model[1].running_var.uniform_(0.5, 2.0, generator=generator)
    x, targets = torch.randn(16, 5, generator=generator), torch.arange(16) % 3
    points, wiring = survey(model, x)
    network = GatedNetwork(model, points, wiring, (0.5, 0.2, 0.4, 0.1), dead_gates=False).train()
    u = {12: torch.rand(3, 4, generator=generator), 6: torch.rand(6, generator=generator)}
    network.uniform = lambda phi: u[phi.numel()]
    with torch.no_grad():
        network.phi2.copy_(torch.tensor([1.0, -0.5, 0.3, 2.0, 0.0, -1.0]))
    wide = {name: value.detach().double().requires_grad_() for name, value in network.named_parameters()}
    sigma = (model[1].running_var.double() + 1e-5).sqrt()
    loss = F.cross_entropy(network(x), targets) + 0.03 * regulariser(network, gate_costs(network))
    loss.backward()

    z, z2 = sampled_by_hand(wide["phi"], u[12].double()), sampled_by_hand(wide["phi2"], u[6].double())
    w, g, b = wide["network.0.weight"], wide["network.1.weight"], wide["network.1.bias"]
    beta, x64 = wide["beta"], x.double()
    folded = quantized_by_hand(w * (g / sigma)[:, None], beta[0], True, z[0], z2)
    plain = x64 @ w.T
    batch = (plain.var(0, unbiased=False) + 1e-5).sqrt()
    hidden = (x64 @ folded.T) * sigma / batch + b - g * plain.mean(0) / batch
    hidden = quantized_by_hand(hidden.relu(), beta[2], False, z[2])
    out = hidden @ quantized_by_hand(wide["network.3.weight"], beta[1], True, z[1]).T + wide["network.3.bias"]
    q, q2 = (torch.sigmoid(wide[name] + 2 / 3 * math.log(11)) for name in ("phi", "phi2"))
    q = torch.stack([q[:, :n].prod(1) for n in (1, 2, 3, 4)], 1) @ torch.tensor([4.0, 8.0, 16.0, 32.0]).double()
    kappa = [1.0, 18 / 30, 18 / 30]
    price = q2.mean() * kappa[0] * (2 + q[0]) + 1 + kappa[1] * q[1] + 1 + kappa[2] * q[2]
    wanted = F.cross_entropy(out, targets) + 0.03 * price
    wanted.backward()
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    for name, value in network.named_parameters():
        assert torch.allclose(value.grad.double(), wide[name].grad, rtol=2e-3, atol=2e-5), name


# --- phases and what is stored -----------------------------------------------------------------------------


def narrowed(tiny, residual=False):
    """A gated tiny network with mixed widths and two pruned channels, its wiring, and inputs on an 8-bit grid."""
    model, inputs = tiny.model(), tiny.Batches(48, 5).inputs
    grid = ActivationQuantizer(0.04, 128, 8)
    inputs = grid.decode(grid.encode(inputs))
    network = GatedNetwork(model, *survey(model, inputs, residual=residual))
    bits = itertools.cycle([8, 4, 8, 4])
    with torch.no_grad():
        for row in network.phi:
            b = next(bits)
            row.copy_(torch.tensor([6.0 if width <= b else -6.0 for width in (4, 8, 16, 32)]))
        network.phi2[torch.tensor([1, 9])] = -5.0
    return network.eval(), inputs, grid


def test_fixed_gates_change_nothing(tiny):
    """P2: the network of phase 2 is that of phase 1 in eval mode."""
    network, inputs, _ = narrowed(tiny)
    fixed, topology = fix_gates(network)
    with torch.no_grad():
        before, after = network(inputs), fixed(inputs)
    assert (before - after).abs().max() < 0.05 * before.std() and (before - after).abs().mean() < 1e-3
    assert fixed.widths() == network.widths() and dict(topology.folded) == {f"conv{i}": f"bn{i}" for i in (1, 2, 3)}
    assert not any(point.channels for point in fixed.points)
    assert {name: int((~mask).sum()) for name, mask in fixed.masks.items()} == {"conv1": 1, "conv2": 1, "conv3": 0}


@pytest.mark.parametrize("residual", [False, True])
def test_what_is_stored_computes_what_was_trained(tiny, residual):
    """The integer network of the stored codes against the network of phase 2, on inputs that the input codes hold."""
    network, inputs, grid = narrowed(tiny, residual)
    fixed, topology = fix_gates(network)
    stored = store_weights(fixed, topology)
    others = {"conv1": grid}
    ranges = store_activations(fixed, list(stored.weights), others)
    assert set(ranges) == {"conv1", "conv2", "add:1", "conv3", "pool2", "fc"} | ({"add:0"} if residual else set())
    assert ranges["conv2"] == ranges["add:1"] and ranges["conv1"] is grid
    assert (ranges["fc"].bits, ranges["fc"].scale) == (ranges["pool2"].bits + 2, ranges["pool2"].scale / 4)
    integer = IntegerNetwork(replace(stored, activations=ranges), tiny.net())
    with torch.no_grad():
        wanted = fixed(inputs)
    difference = (integer(inputs) - wanted).abs()
    assert integer.float_nodes == [] and difference.median() < 1e-4 and difference.max() < 0.1 * wanted.std()


def test_codes_and_masks(tiny):
    network, *_ = narrowed(tiny)
    fixed, topology = fix_gates(network)
    stored = store_weights(fixed, topology)
    module = fold_batchnorm(network.network)[0]
    for point in fixed.points[:4]:
        tensor, weight = stored.weights[point.name], module.get_submodule(point.name).weight.double()
        step = 2 * point.beta / (2**point.bits - 1)
        kept = fixed.masks.get(point.name, torch.ones(len(weight), dtype=torch.bool))
        wanted = (weight.clamp(-point.beta * (1 - 1e-7), point.beta * (1 - 1e-7)) / step).round()
        assert torch.equal(tensor.codes[kept].double(), wanted[kept]) and not tensor.codes[~kept].any()
        assert tensor.bits == point.bits and float(tensor.grid.scale) == pytest.approx(step)
        assert int(tensor.codes.abs().max()) <= 2 ** (point.bits - 1) - 1


def test_two_bits_are_ternary(tiny):
    network, *_ = narrowed(tiny)
    with torch.no_grad():
        network.phi[:, 0] = -6.0
    stored = store_weights(*fix_gates(network))
    assert all(t.bits == 2 and set(t.codes.unique().tolist()) <= {-1, 0, 1} for t in stored.weights.values())


def test_what_stays_at_32_bits(tiny):
    """Float weights, clipped and pruned; 16-bit codes where a layer with codes reads the activation, else none."""
    network, _, grid = narrowed(tiny)
    with torch.no_grad():
        network.phi[network.at[True, "conv3"]] = 6.0
        network.phi[network.at[False, "relu1"]] = 6.0
        network.phi[network.at[False, "relu2"]] = 6.0
    fixed, topology = fix_gates(network)
    stored = store_weights(fixed, topology)
    assert "conv3" not in stored.weights and "conv3.weight" in stored.rest
    assert stored.rest["conv3.weight"].abs().max() <= fixed.points[fixed.at[True, "conv3"]].beta
    ranges = store_activations(fixed, list(stored.weights), {"conv1": grid})
    assert ranges["conv2"].bits == 16 and "add:1" not in ranges and "conv3" not in ranges
    beta = fixed.points[fixed.at[False, "relu1"]].beta
    assert ranges["conv2"].scale == pytest.approx(beta / 65535)


@pytest.mark.parametrize("n, bits, wanted, finer", [(4, 8, 10, 4), (9, 4, 8, 9), (49, 8, 14, 49), (16, 16, 16, 1),
                                                    (9, 14, 16, 2.25), (1, 2, 2, 1)])
def test_means_of_codes(n, bits, wanted, finer):
    """Every sum of n codes is a code; where that takes more than 16 bits the grid is coarser."""
    points = [Point("relu", False, 3.0, False, 1.0, bits=min(bits, 16))]
    network = GatedNetwork(nn.Sequential(nn.Linear(2, 3)), points, Wiring({}, {"fc": ("relu", n)}, {}))
    found = store_activations(network, ["fc"], {})["fc"]
    assert found.bits == wanted and found.scale == pytest.approx(3.0 / (2**bits - 1) / finer)
    if wanted < 16:
        sums = torch.tensor([0, 1, n * (2**bits - 1)])
        assert found.encode(sums * 3.0 / (2**bits - 1) / n).tolist() == sums.tolist()


def test_norms_without_a_layer_or_parameters_and_signed_activations(tiny):
    """One that follows no layer runs as it is, one without parameters is folded; what no ReLU precedes is signed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False),
                              nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4, 4)).eval()
    inputs = tiny.Batches(24, 3).inputs
    network = GatedNetwork(model, *survey(model, inputs), (6.0, 6.0, -6.0, -6.0))
    train(network, tiny.task(), SHORT, torch.Generator().manual_seed(0), hooks=Phase(Config(), second=False))
    fixed, topology = fix_gates(network)
    stored = store_weights(fixed, topology)
    stored = replace(stored, activations=store_activations(fixed, list(stored.weights), {}))
    assert set(stored.weights) == {"1", "4", "6"} and dict(topology.folded) == {"1": "2"}
    assert all(stored.activations[layer].signed for layer in ("1", "4", "6"))
    with torch.no_grad():
        wanted, integer = fixed(inputs), IntegerNetwork(stored, model)(inputs)
    assert (wanted - integer).abs().max() < 0.1 * wanted.std()  # the code -128 is in the stored range only
