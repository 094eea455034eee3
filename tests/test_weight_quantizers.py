"""Quantizers that are trained through: values, gradients and codes, each against its formula written out here."""

import math

import pytest
import torch

from methods.core.artifact import Affine
from methods.core.errors import ConfigError
from methods.core.fit.weight_quantizers import QUANTIZERS, find_quantizer

ALL = sorted(QUANTIZERS)


def made(name, weight, bits=None, mask=None, **settings):
    bits = (1 if name == "bnn" else 4) if bits is None else bits
    quantizer = find_quantizer(name, bits)(bits, **settings)
    mask = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask
    quantizer.start(weight, mask)
    return quantizer, mask


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("name", ALL)
def test_codes_say_what_the_training_saw(name, per_channel):
    weight = torch.randn(6, 3, 2, 2)
    mask = torch.rand(6, 3, 2, 2) > 0.4
    quantizer, mask = made(name, weight, mask=mask, per_channel=per_channel)
    tensor = quantizer.encode(weight, mask)
    assert torch.allclose(tensor.decode(), (quantizer(weight, mask) * mask).detach(), atol=1e-6)
    assert not tensor.decode()[~mask].any() and tensor.bits == quantizer.bits
    if isinstance(tensor.grid, Affine):
        assert tensor.grid.scale.shape == ((6,) if per_channel else ())


@pytest.mark.parametrize("name", ALL)
def test_a_quantized_weight_stays_where_it_is_and_zero_is_zero(name):
    weight = torch.randn(5, 7)
    quantizer, mask = made(name, weight)
    quantizer.freeze(weight, mask)
    if name != "dorefa":  # whose tanh moves every level
        once = quantizer(weight, mask).detach()
        assert torch.allclose(quantizer(once, mask), once, atol=1e-6)
    zero = quantizer(torch.zeros(5, 7), mask)
    assert bool((zero == 0).all()) == QUANTIZERS[name].has_zero


def test_rounding_keeps_its_grid_and_training_aware_refits_until_it_is_frozen():
    weight = torch.randn(4, 9)
    (near, mask), (aware, _) = made("rtn", weight), made("qat", weight)
    assert torch.equal(near.grid(weight, mask).scale, aware.grid(weight, mask).scale)
    assert torch.equal(near.grid(2 * weight, mask).scale, near.grid(weight, mask).scale)
    assert torch.allclose(aware.grid(2 * weight, mask).scale, 2 * aware.grid(weight, mask).scale)
    aware.freeze(weight, mask)
    assert torch.equal(aware.grid(2 * weight, mask).scale, near.grid(weight, mask).scale)


@pytest.mark.parametrize("name", ["rtn", "qat"])
def test_the_gradient_is_one_inside_the_range_and_zero_outside(name):
    weight = torch.tensor([[-1.0, 0.2, 0.9]])
    quantizer, mask = made(name, weight)
    quantizer.freeze(weight, mask)
    moved = torch.tensor([[-1.5, 0.3, 0.9]], requires_grad=True)
    quantizer(moved, mask).sum().backward()
    assert moved.grad.tolist() == [[0.0, 1.0, 1.0]]


def test_a_pruned_outlier_does_not_widen_the_range():
    weight = torch.tensor([[0.5, -0.7, 50.0]])
    for name in ("rtn", "qat", "lsq", "lsq+"):
        quantizer, mask = made(name, weight, mask=torch.tensor([[True, True, False]]))
        assert float(quantizer.grid(weight, mask).scale) < 1, name


def test_the_gradient_of_a_learned_step_is_piecewise():
    weight = torch.tensor([[-9.0, -0.9, 0.3, 0.6, 2.6, 9.0]], requires_grad=True)
    quantizer, mask = made("lsq", weight, bits=3, per_channel=False)
    with torch.no_grad():
        quantizer.scale.fill_(0.8)
    quantizer(weight, mask).sum().backward()
    top, want = 3, 0.0
    for w in weight.flatten().tolist():
        want += -top if w / 0.8 <= -top else top if w / 0.8 >= top else round(w / 0.8) - w / 0.8
    assert float(quantizer.scale.grad) == pytest.approx(want / math.sqrt(6 * top), rel=1e-5)
    assert weight.grad.tolist() == [[0, 1, 1, 1, 0, 0]]


def test_a_step_per_channel_gathers_its_own_channel():
    weight = torch.randn(3, 8)
    whole, mask = made("lsq", weight, per_channel=True)
    whole(weight, mask).sum().backward()
    for c in range(3):
        one, own = made("lsq", weight[c:c + 1], per_channel=False)
        one(weight[c:c + 1], own).sum().backward()
        assert torch.allclose(whole.scale.grad[c], one.scale.grad, atol=1e-6)


def test_a_step_starts_at_twice_the_mean_size_and_a_huge_one_makes_every_code_zero():
    weight = torch.tensor([[1.0, -3.0]])
    quantizer, mask = made("lsq", weight, bits=3, per_channel=False)
    assert quantizer.scale.item() == pytest.approx(2 * 2 / math.sqrt(3))
    with torch.no_grad():
        quantizer.scale.fill_(100.0)
    assert not quantizer.encode(weight, mask).codes.any()
    with torch.no_grad():
        quantizer.scale.fill_(-1.0)
    quantizer.after_step(weight)
    assert quantizer.scale.item() > 0


def test_a_learned_zero_point_moves_only_with_what_is_clipped():
    weight = torch.tensor([[-5.0, 0.4, 1.0, 9.0]])
    quantizer, mask = made("lsq+", weight, bits=2, per_channel=False)
    with torch.no_grad():
        quantizer.scale.fill_(1.0)
        quantizer.zero.fill_(1.2)
    out = quantizer(weight, mask)
    assert out.tolist() == [[-1.0, 0.0, 1.0, 2.0]]  # codes 0, 1, 2, 3 with the zero point 1
    out.sum().backward()
    assert float(quantizer.zero.grad) == pytest.approx(-2 / math.sqrt(4 * 3))  # -s for each of the two
    assert float(quantizer.scale.grad) == pytest.approx((-1 + (0 - 0.4) + (1 - 1.0) + 2) / math.sqrt(4 * 3))


def test_dorefa_by_its_formula():
    weight = torch.randn(4, 10, requires_grad=True)
    quantizer, mask = made("dorefa", weight, bits=2)
    bent = torch.tanh(weight.detach())
    want = 2 * torch.round(3 * (bent / (2 * bent.abs().max()) + 0.5)) / 3 - 1
    values = quantizer(weight, mask)
    assert torch.allclose(values, want, atol=1e-6) and len(values.unique()) <= 4 and not (values == 0).any()
    order = weight.detach().flatten().argsort()
    assert bool((values.flatten()[order].diff() >= 0).all())
    values.sum().backward()
    assert torch.allclose(weight.grad, (1 - bent**2) / bent.abs().max(), atol=1e-5)


def test_binary_weights_are_signs_and_clipped():
    weight = torch.tensor([[0.0, -0.0, -2.0, 0.7, 3.0]], requires_grad=True)
    quantizer = find_quantizer("bnn", 1)(1)
    mask = torch.ones(1, 5, dtype=torch.bool)
    values = quantizer(weight, mask)
    assert values.tolist() == [[1, 1, -1, 1, 1]]
    values.sum().backward()
    assert weight.grad.tolist() == [[1, 1, 0, 1, 0]]
    quantizer.after_step(weight)
    assert weight.tolist() == [[0, 0, -1, pytest.approx(0.7), 1]]
    assert quantizer.encode(weight, mask).density == 1


@pytest.mark.parametrize("name, bits, message", [
    ("bnn", 2, "bits = 2: bnn takes 1"), ("lsq", 1, "bits = 1: lsq takes 2 to 16"), ("dorefa", 9, "takes 1 to 8"),
    ("ternary", 2, "quantizer = 'ternary': allowed are rtn")])
def test_what_there_is_not_is_refused(name, bits, message):
    with pytest.raises(ConfigError, match=message):
        find_quantizer(name, bits)
