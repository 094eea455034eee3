"""GPTQ and coordinate descent against the textbook algorithm, hand computations and brute force; H and m; passes."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from methods.core.artifact import Affine, CompressedTensor
from methods.core.errors import CompressError, ConfigError
from methods.core.fit.calibrate import calibrate
from methods.core.fit.descent import descend
from methods.core.fit.gptq import gptq
from methods.core.fit.moments import Moments, windows
from methods.core.fit.quantize import find_scheme, fit_mse, fit_symmetric, quantize
from methods.core.fit.rates import LAM, code_bits, entropy_bits, magnitude_bits, round_to_rate, thresholds
from methods.core.fit.rounding import round_again, round_weight
from methods.core.fit.sensitivity import sensitivities
from methods.core.fit.sequential import quantize_in_order
from methods.core.graph.build import apply, assemble, weight_layers
from methods.core.graph.fold import fold_batchnorm


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_hessian(k, seed=0):
    x = torch.randn(4 * k, k, generator=seeded(seed)) @ torch.randn(k, k, generator=seeded(seed + 1))
    return x.T @ x / len(x)


def error(weight, codes, scale, hessian):
    """tr((W - s C) H (W - s C)^T)."""
    gap = (weight - scale * codes).double()
    return float((gap @ hessian.double() * gap).sum())


# --- GPTQ ----------------------------------------------------------------------------------------------------


def textbook(weight, hessian, scale, damping=0.01):
    """As the paper has it: inverse Cholesky factor, the error subtracted from all the weights to come."""
    order = hessian.diagonal().argsort(descending=True, stable=True)
    h = hessian[order][:, order].double()
    h += damping * h.diagonal().mean() * torch.eye(len(h))
    factor = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    left, codes = weight[:, order].double(), torch.zeros_like(weight)
    for i in range(len(h)):
        codes[:, order[i]] = (left[:, i] / scale).round().float()
        e = (left[:, i] - scale * codes[:, order[i]]) / factor[i, i]
        left -= e[:, None] * factor[i] * (torch.arange(len(h)) >= i)
    return codes


def test_gptq_is_the_paper_s():
    weight, hessian = torch.randn(20, 300), random_hessian(300)  # more columns than a block
    assert float((gptq(weight, hessian, 0.7) != textbook(weight, hessian, 0.7)).float().mean()) < 1e-3


def test_two_weights_by_hand():
    weight, hessian = torch.tensor([[0.6, 0.6], [1.4, -0.3]]), torch.tensor([[2.0, 1.8], [1.8, 1.9]])
    # the first becomes 1; of its error -0.4 the second takes H_12 / H_22: 0.6 - 0.4 * 1.8 / 1.9 = 0.22
    # the first becomes 1; its error 0.4 moves the second to -0.3 + 0.4 * 1.8 / 1.9 = 0.08
    assert gptq(weight, hessian, 1.0, damping=0.0).tolist() == [[1.0, 0.0], [1.0, 0.0]]
    assert descend(torch.tensor([[1.0, 1.0]]), weight[:1], hessian, 1.0).tolist() in ([[0.0, 1.0]], [[1.0, 0.0]])


def test_a_diagonal_hessian_is_rounding_to_the_nearest():
    weight, hessian = 3 * torch.randn(7, 40), torch.diag(torch.rand(40) + 0.1)
    near = (weight / 0.4).round()
    assert torch.equal(gptq(weight, hessian, 0.4), near)
    assert torch.equal(descend(torch.zeros_like(weight), weight, hessian, 0.4), near)
    assert torch.equal(gptq(weight, hessian, 0.4, low=-2, high=1), near.clamp(-2, 1))


def test_gptq_is_better_than_rounding_and_descent_better_still():
    ratios = []
    for seed in range(12):
        weight, hessian = torch.randn(6, 24, generator=seeded(seed)), random_hessian(24, seed)
        near, codes = (weight / 0.8).round(), gptq(weight, hessian, 0.8)
        ratios.append(error(weight, codes, 0.8, hessian) / error(weight, near, 0.8, hessian))
        assert error(weight, descend(codes, weight, hessian, 0.8), 0.8, hessian) <= \
            error(weight, codes, 0.8, hessian) * (1 + 1e-6)
    assert sum(ratios) / len(ratios) < 0.8


def test_no_rounding_beats_the_best_of_all():
    weight, hessian = torch.randn(1, 5, generator=seeded(3)), random_hessian(5, 3)
    best = min(error(weight, torch.tensor([codes]).float(), 1.0, hessian)
               for codes in itertools.product(range(-3, 4), repeat=5))
    found = error(weight, descend(gptq(weight, hessian, 1.0), weight, hessian, 1.0), 1.0, hessian)
    assert best <= found * (1 + 1e-6) and found < 2 * best


def test_groups_channels_and_masks():
    weight, hessian = torch.randn(2, 3, 10), torch.stack([random_hessian(10, 1), random_hessian(10, 2)])
    scale, mask = torch.rand(2, 3) + 0.3, torch.rand(2, 3, 10) > 0.3
    low, high = torch.tensor([[-1, -2, -9]] * 2), torch.tensor([[1, 3, 9]] * 2)
    together = gptq(weight, hessian, scale, low, high, mask)
    after = descend(together, weight, hessian, scale, 0.0, low, high, mask)
    for codes, each in ((together, gptq), (after, lambda w, *rest: descend(gptq(w, *rest), w, rest[0], rest[1], 0.0,
                                                                          *rest[2:]))):
        assert torch.equal(codes * mask, codes)
        assert bool(((codes >= low[..., None]) & (codes <= high[..., None])).all())
        for g in range(2):
            for r in range(3):
                alone = each(weight[g, r:r + 1], hessian[g], scale[g, r], low[g, r], high[g, r], mask[g, r:r + 1])
                assert torch.equal(alone[0], codes[g, r])


def test_an_input_that_is_never_there_gets_zero():
    hessian = random_hessian(6)
    hessian[2], hessian[:, 2] = 0, 0
    codes = gptq(5 * torch.ones(3, 6), hessian, 1.0)
    for found in (codes, descend(codes + 1, torch.ones(3, 6), hessian, 1.0)):
        assert not bool(found[:, 2].any())
    assert bool((gptq(torch.ones(2, 4), torch.ones(4, 4), 0.1, damping=0.0).abs() < 100).all())  # singular


# --- rates ---------------------------------------------------------------------------------------------------


def test_bits_are_the_terms_of_the_entropy():
    codes = torch.tensor([0] * 50_000 + [1] * 20_000 + [-1] * 20_000 + [3] * 10_000)
    bits = code_bits(codes, -2, 4)
    assert bits[2:4].tolist() == pytest.approx([1.0, -math.log2(0.2)], abs=1e-4) and float(bits[0]) > 15
    entropy = 0.5 + 0.4 * -math.log2(0.2) + 0.1 * -math.log2(0.1)
    assert float(bits[codes + 2].double().mean()) == pytest.approx(entropy, abs=1e-4)
    assert entropy_bits(torch.unique(codes, return_counts=True)[1]) == pytest.approx(1e5 * entropy)


def test_thresholds_are_brute_force():
    bits = magnitude_bits(torch.tensor([500, 300, 120, 50, 20, 8, 3, 1]))
    assert bool((bits.diff().diff() >= -1.2).all())
    size = torch.rand(4000, generator=seeded()) * 6
    for lam in (0.0, LAM, 0.4):
        cost = (size[:, None] - torch.arange(8)) ** 2 + lam * bits
        assert torch.equal(torch.bucketize(size, thresholds(bits, lam), right=True), cost.argmin(1))


def test_rounding_to_a_rate_costs_fewer_bits_and_without_a_price_it_is_the_nearest():
    scaled = 2 * torch.randn(20_000, generator=seeded())
    counts, bits = round_to_rate(scaled, lam=0.0)
    near = torch.bincount(scaled.abs().round().long(), minlength=len(counts))
    assert torch.equal(counts, near)
    assert round_to_rate(scaled, lam=LAM)[1] < bits < 20_000 * 4


def test_the_objective_of_descent_never_rises():
    weight, hessian = torch.randn(8, 40, generator=seeded(5)), random_hessian(40, 5)
    codes = gptq(weight, hessian, 0.5)
    for _ in range(4):  # a sweep with the prices that it is charged
        price = LAM * float(hessian.diagonal().mean()) * 0.5**2
        bits = code_bits(codes, -40, 40)

        def objective(q, bits=bits, price=price):
            return error(weight, q, 0.5, hessian) + price * float(bits[(q + 40).long()].double().sum())

        after = descend(codes, weight, hessian, 0.5, LAM, sweeps=1)
        assert objective(after) <= objective(codes) * (1 + 1e-6)
        codes = after
    assert (entropy_bits(torch.unique(codes, return_counts=True)[1])
            < entropy_bits(torch.unique(gptq(weight, hessian, 0.5), return_counts=True)[1]))


def test_descent_on_independent_inputs_is_brute_force():
    """A diagonal Hessian of unequal entries: every code alone is the best of the four that are looked at."""
    weight, diagonal = 2 * torch.randn(30, 12, generator=seeded(4)), torch.linspace(0.05, 8, 12)
    start, lam = weight.round(), 0.6
    counts = [float((start == q).sum()) + 0.05 for q in range(int(start.min()) - 2, int(start.max()) + 3)]
    bits = {q: math.log2(sum(counts) / count) for q, count in enumerate(counts, int(start.min()) - 2)}
    found = descend(start, weight, torch.diag(diagonal), 1.0, lam, sweeps=1)
    for r, i in itertools.product(range(30), range(12)):
        w, now = float(weight[r, i]), int(start[r, i])
        options = {now, now - int(math.copysign(1, now)) if now else 0, 0}
        cost = {q: float(diagonal[i]) * (q - w) ** 2 + lam * float(diagonal.mean()) * bits[q] for q in options}
        assert cost[int(found[r, i])] <= min(cost.values()) + 1e-4
    assert bool((found != start).any()) and bool((found[:, -1] == start[:, -1]).any())


def test_a_common_code_is_kept_though_it_is_not_between_the_weight_and_zero():
    weight = torch.full((1000, 1), 5.0)
    weight[7] = 4.4  # 4 is nearer and occurs nowhere: its bits would cost more than the error of 5
    assert descend(torch.full((1000, 1), 5.0), weight, torch.ones(1, 1), 1.0, lam=1.0)[7] == 5


def test_at_any_price_nothing_is_left():
    weight, hessian = torch.randn(4, 30), random_hessian(30)
    codes = (weight / 2).round()  # most are 0 already, so that 0 is the cheapest code
    assert not bool(descend(codes, weight, hessian, 2.0, lam=1e6).any())


# --- moments, sensitivities, passes ---------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [
    nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(0, 2), dilation=(1, 2)),
    nn.Conv2d(4, 8, 3, groups=4, padding="same"), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")])
def test_windows_are_what_a_convolution_multiplies(layer):
    x = torch.randn(3, 4, 7, 8)
    rows = windows(layer, x, 1000, seeded())
    weight = layer.weight.detach().reshape(layer.groups, -1, rows.shape[2])
    y = (rows @ weight.mT).permute(1, 0, 2).flatten(1)  # [N P, C_out]
    with torch.no_grad():
        wanted = (layer(x) - layer.bias[:, None, None]).permute(0, 2, 3, 1).flatten(0, 2)
    assert torch.allclose(y, wanted, atol=1e-5)
    some = windows(layer, x, 5, seeded())
    assert some.shape[1] == 15 and all(bool((row == rows[0]).all(1).any()) for row in some[0])


@pytest.mark.parametrize("largest", [100, 7])
def test_moments_are_means_over_windows(largest):
    layer = nn.Linear(16, 5)
    moments, x = Moments(layer, seeded(), largest=largest), torch.randn(50, 16)
    for batch in x.split(20):
        moments.update(batch)
    dense = torch.block_diag(*moments.hessian())[:16, :16] if largest > 16 else None
    if dense is not None:
        assert torch.allclose(dense, x.T @ x / 50, atol=1e-5)
    weight = layer.weight.detach()
    assert torch.equal(moments.join(moments.split(weight)), weight)
    assert torch.allclose(moments.shift(weight), weight @ x.mean(0), atol=1e-5)
    per_part = (moments.split(weight) @ moments.hessian() * moments.split(weight)).sum()
    assert float(per_part) > 0 and moments.hessian().shape[0] == -(-16 // largest)


def test_sensitivity_of_a_linear_network():
    layer, x = nn.Linear(6, 4), torch.randn(9, 6)
    felt = sensitivities(nn.Sequential(layer), x, seeded())["0"]
    assert felt == pytest.approx(4 * float(x.square().sum(1).mean()), rel=1e-5)
    two = nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 4))
    inner = float(two[1].weight.detach().square().sum()) * float(x.square().sum(1).mean())
    found = sum(sensitivities(two, x, seeded(i))["0"] for i in range(40)) / 40
    assert found == pytest.approx(inner, rel=0.15)


def test_a_pass_keeps_means_and_sees_the_ranges(tiny):
    folded, topology = fold_batchnorm(tiny.model())
    inputs = tiny.Batches(60, 5).inputs
    before = tiny.fingerprint(folded)

    def fit(name, weight, moments):
        return quantize(weight, fit_symmetric(weight, 3), 3)

    module, weights, ranges = quantize_in_order(folded, inputs, fit, seeded())
    assert tiny.same(tiny.fingerprint(folded), before) and list(weights) == list(weight_layers(folded))
    again = apply(assemble(module, weights, topology=topology), tiny.net())
    assert ranges == calibrate(again, inputs)
    rows = windows(folded.conv1, inputs, 1000, seeded())[0]
    change = (folded.conv1.weight - weights["conv1"].decode()).flatten(1)
    assert torch.allclose(module.conv1.bias - folded.conv1.bias, change @ rows.mean(0), atol=1e-5)
    assert torch.equal(quantize_in_order(folded, inputs, fit, seeded(), correct=False)[0].fc.bias, folded.fc.bias)


def test_everything_pruned_leaves_the_mean_in_the_bias(tiny):
    folded, _ = fold_batchnorm(tiny.model())
    inputs = tiny.Batches(60, 5).inputs

    def fit(name, weight, moments):
        return CompressedTensor.of(torch.zeros_like(weight, dtype=torch.int32),
                                   Affine(torch.tensor(1.0), torch.tensor(0, dtype=torch.int32)), 2)

    module, _, _ = quantize_in_order(folded, inputs, fit, seeded())
    with torch.no_grad():
        assert torch.allclose(module.conv1(inputs).mean((0, 2, 3)), folded.conv1(inputs).mean((0, 2, 3)), atol=1e-5)


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric", "mse"])
@pytest.mark.parametrize("rounding", ["gptq", "descent"])
def test_rounding_again_stays_on_the_grid_and_under_the_mask(tiny, scheme, rounding):
    folded, _ = fold_batchnorm(tiny.model())
    inputs = tiny.Batches(60, 5).inputs
    masks = {name: torch.rand(layer.weight.shape) > 0.3 for name, layer in weight_layers(folded).items()}
    weights = {name: quantize(layer.weight, find_scheme(scheme)(layer.weight, 3), 3, masks[name])
               for name, layer in weight_layers(folded).items()}
    module, found, _ = round_again(folded, weights, rounding, inputs, seeded(), masks=masks)
    for name, tensor in found.items():
        assert tensor.grid is weights[name].grid and not bool((tensor.mask & ~masks[name]).any())
        assert torch.equal(module.get_submodule(name).weight, tensor.decode())
        if scheme != "asymmetric":
            assert int(tensor.codes.abs().max()) <= 3
    with torch.no_grad():
        first = [F.conv2d(inputs, tensor["conv1"].decode() - folded.conv1.weight, padding=1).square().mean()
                 for tensor in (found, weights)]
    assert first[0] < first[1]


def test_the_mse_grid_is_the_best_of_all():
    weight = torch.randn(6, 200, generator=seeded(2))
    widest = fit_symmetric(weight, 3).scale

    def errors(scale):
        grid = Affine(scale, torch.zeros(6, dtype=torch.int32))
        return (quantize(weight, grid, 3).decode() - weight).square().sum(1)

    best = torch.stack([errors(share * widest) for share in torch.linspace(0.31, 1, 100).tolist()]).amin(0)
    assert bool((errors(fit_mse(weight, 3).scale) <= 1.02 * best).all())
    assert bool((errors(widest) > 1.1 * best).any())


def test_mistakes():
    with pytest.raises(ConfigError, match="nearest, gptq, descent"):
        round_weight("up", torch.ones(2, 2), Moments(nn.Linear(2, 2), seeded()), 1.0, -1, 1)
    with pytest.raises(CompressError, match="no Hessian"):
        Moments(nn.Linear(2, 2), seeded()).hessian()
    for value in (math.nan, math.inf):
        with pytest.raises(CompressError, match="^the inputs of a layer are not finite, or too large"):
            gptq(torch.ones(1, 2), torch.tensor([[1.0, 0.5], [0.5, value]]), 1.0)
    with pytest.raises(CompressError, match="Conv1d"):
        windows(nn.Conv1d(2, 2, 1), torch.ones(1, 2, 3), 4, seeded())
