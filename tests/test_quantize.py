"""Uniform quantizers against float64, and the failures of naive code that simple_combos.md section 4 lists.

Each demonstration asserts the wrong result of the naive code and the right one of ours, on its tensor: 32 x 16 x
3 x 3 normal weights of which 60 % are pruned.
"""

import pytest
import torch
from torch import nn

from methods.core.artifact import Affine
from methods.core.errors import CompressError, ConfigError
from methods.core.fit.prune import keep_largest
from methods.core.fit.quantize import (
    FakeQuantize,
    QuantizationAware,
    find_scheme,
    fit_asymmetric,
    fit_symmetric,
    quantize,
    to_codes,
)
from methods.core.train.finetune import Recipe, train
from methods.quantize_then_prune import keep_salient

SCHEMES = ("symmetric", "asymmetric")


@pytest.fixture(scope="module")
def pruned():
    """A tensor with 60 % zeros, and its mask of kept weights."""
    weight = torch.randn(32, 16, 3, 3, generator=torch.Generator().manual_seed(0))
    mask = keep_largest(weight.abs(), 1843)
    return weight * mask, mask


def zeros(values) -> float:
    return float((values == 0).double().mean())


def reference(weight, bits, scheme):
    """Scale, zero and codes of one channel in float64 Python, straight from the definitions."""
    values = weight.double().reshape(-1).tolist()
    low, high = min(values), max(values)
    if scheme == "symmetric":
        top = 2 ** (bits - 1) - 1
        scale, zero, least = max(max(-low, high) / top, 2.0**-23), 0, -top
    else:
        low, high, top, least = min(low, 0.0), max(high, 0.0), 2**bits - 1, 0
        scale = max((high - low) / top, 2.0**-23)
        zero = min(max(round(-low / scale), 0), top)
    return scale, zero, [min(max(round(w / scale) + zero, least), top) for w in values]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8, 12])
def test_grids_and_codes_equal_float64(scheme, bits):
    weight = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(bits))
    weight[1], weight[2], weight[3] = weight[1].abs() + 0.1, -weight[2].abs() - 0.1, 0.0
    grid = find_scheme(scheme)(weight, bits)
    codes = to_codes(weight, grid, bits)
    for c in range(6):
        scale, zero, wanted = reference(weight[c], bits, scheme)
        assert float(grid.scale[c]) == pytest.approx(scale, rel=1e-6) and int(grid.zero[c]) == zero
        exact = weight[c].double().reshape(-1) / scale
        clear = (exact - exact.floor() - 0.5).abs() > 1e-4  # float32 may round a tie to either side
        assert torch.equal(codes[c].reshape(-1)[clear], torch.tensor(wanted, dtype=torch.int32)[clear])
        decoded = grid.decode(codes)[c].double().reshape(-1)
        inside = slice(None) if scheme == "symmetric" else (exact + zero >= 0) & (exact + zero <= 2**bits - 1)
        assert ((decoded - weight[c].double().reshape(-1)).abs()[inside] <= scale * 0.5001).all()


def test_one_grid_per_tensor():
    weight = torch.tensor([[1.0, -2.0], [0.5, 7.0]])
    assert float(fit_symmetric(weight, 4, per_channel=False).scale) == 1.0
    grid = fit_asymmetric(weight, 2, per_channel=False)
    assert (float(grid.scale), int(grid.zero)) == (3.0, 1)
    assert to_codes(weight, grid, 2).tolist() == [[1, 0], [1, 3]]


def test_symmetric_codes_have_no_lonely_minimum():
    weight = torch.linspace(-1, 1, 64).reshape(1, 64)
    grid = fit_symmetric(weight, 4)
    assert to_codes(weight, grid, 4).unique().tolist() == list(range(-7, 8))
    assert int(to_codes(torch.tensor([[-1e30]]), grid, 4)) == -7  # far outside: clamped, not wrapped


@pytest.mark.parametrize("seed", range(30))
def test_zero_is_kept_on_every_grid(seed):
    draw = torch.Generator().manual_seed(seed)
    bits = int(torch.randint(2, 9, (), generator=draw))
    spread, shift = 10 ** (6 * torch.rand(4, 1, generator=draw) - 3), 4 * torch.rand(4, 1, generator=draw) - 2
    weight = spread * (torch.randn(4, 40, generator=draw) + shift)
    weight[int(torch.randint(4, (), generator=draw))] *= 0
    weight[0], weight[1] = weight[0].abs(), -weight[1].abs()
    for scheme in SCHEMES:
        for per_channel in (True, False):
            grid = find_scheme(scheme)(weight, bits, per_channel)
            assert torch.equal(grid.decode(to_codes(torch.zeros(4, 40), grid, bits)), torch.zeros(4, 40))
            layer = FakeQuantize(bits, torch.ones(4, 40, dtype=torch.bool), scheme, grid)
            assert torch.equal(layer(torch.zeros(4, 40)), torch.zeros(4, 40))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_requantizing_is_idempotent(scheme, pruned):
    weight, mask = pruned
    once = quantize(weight, find_scheme(scheme)(weight, 4), 4, mask)
    again = quantize(once.decode(), once.grid, 4, mask)
    assert torch.equal(again.codes, once.codes) and torch.equal(again.decode(), once.decode())
    if scheme == "symmetric":  # each channel keeps its largest weight, so that even a new fit changes nothing
        assert torch.allclose(fit_symmetric(once.decode(), 4).scale, once.grid.scale, rtol=1e-6)


def test_names_and_widths_outside_what_is_allowed():
    with pytest.raises(ConfigError, match="symmetric, asymmetric, mse"):
        find_scheme("uniform")
    for call in (lambda: fit_symmetric(torch.ones(2, 2), 1), lambda: find_scheme("symmetric", [8, 1])):
        with pytest.raises(ConfigError, match="at least 2"):
            call()
    assert find_scheme("asymmetric", [1]) is fit_asymmetric
    with pytest.raises(CompressError, match="finite"):
        fit_symmetric(torch.tensor([[float("nan"), 1.0]]), 8)


# --- fake quantization --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("per_channel", [True, False])
def test_training_sees_exactly_what_is_stored(scheme, per_channel, pruned):
    weight, mask = pruned
    weight = weight + torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * ~mask
    seen = FakeQuantize(4, mask, scheme, per_channel=per_channel)(weight)
    stored = quantize(weight, find_scheme(scheme)(weight * mask, 4, per_channel), 4, mask)
    assert torch.equal(seen, stored.decode())
    assert zeros(seen) >= 0.6


def test_gradient_passes_inside_the_range_under_the_mask():
    grid = Affine(torch.tensor([0.5]), torch.tensor([0], dtype=torch.int32))
    weight = torch.tensor([[0.2, -3.5, 3.7, 3.8, -9.0, 1.0]], requires_grad=True)
    mask = torch.tensor([[True, True, True, True, True, False]])
    out = FakeQuantize(4, mask, grid=grid)(weight)
    assert out.tolist() == [[0.0, -3.5, 3.5, 3.5, -3.5, 0.0]]
    out.backward(torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]))
    assert weight.grad.tolist() == [[1.0, 2.0, 3.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_refitted_grid_clips_no_gradient(scheme):
    weight = torch.randn(64, 50, generator=torch.Generator().manual_seed(2)).requires_grad_()
    FakeQuantize(8, torch.ones(64, 50, dtype=torch.bool), scheme)(weight).sum().backward()
    clipped = int((weight.grad == 0).sum())  # rounding the zero point may put one extreme of a channel outside
    assert clipped == 0 if scheme == "symmetric" else clipped <= 64


def test_a_pruned_outlier_does_not_widen_the_range():
    weight, mask = torch.tensor([[100.0, 0.9, -0.3]]), torch.tensor([[False, True, True]])
    assert FakeQuantize(8, mask)(weight)[0, 1:].tolist() == pytest.approx([0.9, -0.3], abs=0.004)


def test_quantization_aware_training_keeps_the_mask_and_restores_the_model(tiny, pruned):
    model = tiny.model()
    weight = model.conv2.weight.detach().clone()
    mask = keep_largest(weight.abs(), 230)
    with QuantizationAware(model, {"conv2": FakeQuantize(4, mask)}) as hooks:
        train(model, tiny.task(), Recipe(epochs=1, lr=0.01), torch.Generator().manual_seed(0), hooks=hooks)
        assert zeros(model.conv2.weight) >= 1 - 230 / 576
    assert type(model.conv2) is nn.Conv2d and isinstance(model.conv2.weight, nn.Parameter)
    assert set(model.state_dict()) == set(tiny.model().state_dict())
    assert torch.equal(model.conv2.weight[~mask], torch.zeros(346))
    assert len(model.conv2.weight[mask].detach().unique()) > 100  # masters in float, not the 15 levels
    with pytest.raises(ZeroDivisionError), QuantizationAware(model, {"conv2": FakeQuantize(4, mask)}):
        raise ZeroDivisionError
    assert type(model.conv2) is nn.Conv2d


# --- failure modes of naive code ----------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
def test_sparsity_survives_a_whole_zero_point_but_no_float_one(bits, pruned):
    weight, mask = pruned
    assert zeros(quantize(weight, fit_symmetric(weight, bits), bits, mask).decode()) >= 0.5998
    ours = quantize(weight, fit_asymmetric(weight, bits), bits, mask)
    assert zeros(ours.decode()) >= 0.5998
    assert float((ours.codes == 0).float().mean()) < 0.15  # counting code 0 is not counting zeros
    low, high = weight.amin((1, 2, 3), keepdim=True), weight.amax((1, 2, 3), keepdim=True)
    scale = (high - low) / (2**bits - 1)
    naive = (torch.round((weight - low) / scale)) * scale + low  # the zero point -low / scale, not rounded
    assert zeros(naive) < 0.15 and float(naive[~mask].abs().max()) > 0.4 * float(scale.max())


def test_a_range_that_excludes_zero_ruins_the_kept_weights(pruned):
    weight = torch.where(pruned[1], pruned[0].abs() + 2, torch.zeros(()))
    low, high = weight[pruned[1]].min(), weight.max()
    scale = (high - low) / 255
    zero = torch.round(-low / scale).clamp(0, 255)  # clamped to 0: zero is kept, and the rest is not
    naive = scale * ((torch.round(weight / scale) + zero).clamp(0, 255) - zero)
    ours = quantize(weight, fit_asymmetric(weight, 8, per_channel=False), 8, pruned[1]).decode()
    assert float((naive - weight).abs().max()) > 0.9 > 0.02 > float((ours - weight).abs().max())


def test_levels_without_a_zero_lose_all_sparsity(pruned):
    weight, mask = pruned
    unit = weight / (2 * weight.abs().max()) + 0.5
    naive = (2 * torch.round(unit * 15) / 15 - 1) * weight.abs().max()  # DoReFa, 4 bits
    assert zeros(naive) == 0.0
    assert naive[~mask].abs().max() == pytest.approx(float(weight.abs().max()) / 15, rel=1e-5)


def test_pruning_to_code_zero_is_not_pruning(pruned):
    weight = torch.randn(32, 16, 3, 3, generator=torch.Generator().manual_seed(0))
    grid, mask = fit_asymmetric(weight, 8), pruned[1]
    naive = torch.where(mask, to_codes(weight, grid, 8), torch.zeros((), dtype=torch.int32))
    assert zeros(grid.decode(naive)) < 0.02 and float(grid.decode(naive)[~mask].abs().min()) > 1.5
    ours = quantize(weight, grid, 8, mask)
    assert torch.equal(ours.codes[~mask], ours.grid.zero_codes(ours.codes)[~mask])
    assert torch.equal(ours.decode()[~mask], torch.zeros(int((~mask).sum())))


def test_thresholds_miss_the_target_where_codes_tie():
    weight = torch.randn(32, 16, 3, 3, generator=torch.Generator().manual_seed(0))
    dense = quantize(weight, fit_symmetric(weight, 4, per_channel=False), 4)
    saliency = dense.decode().abs()
    assert len(saliency.unique()) == 8
    bar = saliency.reshape(-1).sort().values[int(0.6 * weight.numel())]
    assert float((saliency <= bar).float().mean()) > 0.62 and float((saliency < bar).float().mean()) < 0.5
    mask = keep_salient(dense, weight, weight.numel() - int(0.6 * weight.numel()))
    assert int((~mask).sum()) == int(0.6 * weight.numel())
    tied = saliency == bar  # among equal codes the larger float weight is kept
    assert float(weight.abs()[tied & ~mask].max()) <= float(weight.abs()[tied & mask].min())


def test_quantization_aware_training_without_a_mask_loses_sparsity(pruned):
    """simple_combos, section 4: 10 steps of SGD with and without the mask behind the quantizer."""
    weight, mask = pruned
    target = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    after = {}
    for name, kept in (("naive", torch.ones_like(mask)), ("ours", mask)):
        master = weight.clone().requires_grad_()
        layer = FakeQuantize(4, kept)
        for _ in range(10):
            (gradient,) = torch.autograd.grad(((layer(master) - target) ** 2).sum(), master)
            master = (master - 0.05 * gradient).detach().requires_grad_()
        after[name] = zeros(layer(master).detach())
    assert after["naive"] < 0.4 and after["ours"] >= 0.5998
