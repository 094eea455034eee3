"""The gated quantizer: the authors' numbers, the definitions in float64, and closed gradients against autograd."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from methods.bayesian_bits.gated import (
    _dot,
    alive,
    bits_of,
    chained_quantize,
    gated_quantize,
    hard_concrete,
    log_open_probability,
    step_size,
    thresholded,
    to_codes,
)

ORACLES = Path(__file__).parents[2] / "shared" / "oracles"
BITS = (2, 4, 8, 16, 32)


def oracle(name):
    path = ORACLES / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return json.loads(path.read_text())


def opened(bits, dtype=torch.float32):
    """Bit gates that leave `bits`."""
    return torch.tensor([float(b <= bits) for b in BITS[1:]], dtype=dtype)


def drawn(n=4000, spread=0.9, dtype=torch.float64, seed=0):
    return spread * torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def codes_by_hand(x, beta, signed, bits):
    """Nearest integers of x / s_b inside the range, in Python's integers and floats (round half to even)."""
    top = (1 - 1e-7) * beta
    step = (2 * beta if signed else beta) / (2**bits - 1)
    return [round(min(max(float(v), -top if signed else 0.0), top) / step) for v in x]


# --- the authors' classes ----------------------------------------------------------------------------------


def test_quantizer_oracle():
    found = oracle("bb_quantizer")
    x = torch.tensor(found["x"])
    assert len(found["cases"]) == 20
    for case in found["cases"]:
        beta, signed, bits = torch.tensor(case["beta"]), case["signed"], case["bits"]
        wanted, ulp = torch.tensor(case["y"]), 2.0**-23
        for y in (gated_quantize(x, beta, opened(bits), signed=signed),
                  gated_quantize(x, beta, opened(bits), signed=signed, levels=BITS.index(bits)),
                  chained_quantize(x, beta, opened(bits), signed=signed)):
            assert (y - wanted).abs().max() <= (ulp if bits == 32 else 0)
        assert float(step_size(beta, signed, bits)) == pytest.approx(case["step"], rel=2e-7)
        if bits <= 16:
            assert to_codes(x, beta, signed, bits).tolist() == case["codes"]


@pytest.mark.parametrize("signed, bits, wanted", [
    (True, 2, [-0.6666666865, 0.0, 0.0, 0.6666666865, 0.6666666865]),
    (True, 4, [-0.9333333969, -0.2666666806, 0.0, 0.5333333611, 0.9333333969]),
    (False, 2, [0.0, 0.0, 0.0, 0.6666666865, 1.0])])
def test_golden_values(signed, bits, wanted):
    """Of the same file, for where it is absent: x = -2, -0.3001, 0, 0.5821, 1.7 and beta = 1."""
    x = torch.tensor([-2.0, -0.3001, 0.0, 0.5821, 1.7])
    assert gated_quantize(x, torch.tensor(1.0), opened(bits), signed=signed).tolist() == pytest.approx(wanted, abs=1e-7)


def test_pruning_oracle():
    found = oracle("bb_prune")
    weight = torch.tensor(found["W"]).reshape(found["shape"])
    z2 = thresholded(torch.tensor(found["phi2"]))
    assert z2.tolist() == [1, 0, 1, 0]
    signed = bool((weight < 0).any())
    y = gated_quantize(weight, torch.tensor(found["beta"]), opened(8), z2, signed=signed)
    assert torch.equal(y.reshape(-1), torch.tensor(found["y"]).reshape(-1)) and not y[1].any() and not y[3].any()


def test_gate_oracle():
    found = oracle("bb_gates")
    for row in found["rows"]:
        phi = torch.tensor(row["phi"])
        samples = [float(hard_concrete(phi, u)) for u in found["u"]]
        assert samples == pytest.approx(row["samples"], abs=1e-5)
        assert float(log_open_probability(phi).exp()) == pytest.approx(row["q_open"], abs=1e-6)
        assert float(hard_concrete(phi, 0.5)) == pytest.approx(row["det_gate"], abs=1e-6)
        assert float(thresholded(phi)) == row["eval_gate_rule"]


# --- the definition ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_open_gates_are_the_plain_quantizer(signed, bits):
    """Q1: the same integer codes in float64, for values that are no ties."""
    x, beta = drawn(), torch.tensor(0.7312, dtype=torch.float64)
    step = (1 + signed) * 0.7312 / (2**bits - 1)
    y = gated_quantize(x, beta, opened(bits, torch.float64), signed=signed)
    wanted = codes_by_hand(x, 0.7312, signed, bits)
    assert torch.allclose(y / step, torch.tensor(wanted, dtype=torch.float64), atol=1e-6)
    assert to_codes(x, beta, signed, bits).tolist() == wanted
    plain = gated_quantize(x, beta, signed=signed, first=bits)
    assert torch.allclose(plain, y, atol=1e-12)


def test_ties_go_where_the_residuals_send_them():
    """Q1: of the half-way points of the unsigned 4-bit grid six get another neighbour than round half to even."""
    x = torch.arange(15, dtype=torch.float64) + 0.5
    y = gated_quantize(x, torch.tensor(15.0, dtype=torch.float64), opened(4, torch.float64), signed=False)
    assert x[y.round() != x.round()].tolist() == [3.5, 4.5, 5.5, 6.5, 13.5, 14.5]


@pytest.mark.parametrize("bits, rate", [(4, 1e-3), (8, 1e-3), (16, 5e-3)])
def test_float32_is_at_most_a_code_off(bits, rate):
    x, beta = drawn(20_000, dtype=torch.float32), torch.tensor(0.7312)
    y = gated_quantize(x, beta, opened(bits), signed=True)
    codes = (y.double() / step_size(beta.double(), True, bits)).round()
    off = (codes - to_codes(x, beta, True, bits)).abs()
    assert off.max() <= 1 and off.mean() <= rate


@pytest.mark.parametrize("signed, bits, levels, top", [
    (True, 2, 3, 2 / 3), (True, 4, 15, 14 / 15), (True, 8, 255, 254 / 255),
    (False, 2, 4, 1.0), (False, 4, 16, 1.0), (False, 8, 256, 1.0)])
def test_levels(signed, bits, levels, top):
    x = torch.linspace(-1.5, 1.5, 20_001, dtype=torch.float64)
    y = gated_quantize(x, torch.tensor(1.0, dtype=torch.float64), opened(bits, torch.float64), signed=signed)
    assert len(torch.unique((y * 1e9).round())) == levels and float(y.max()) == pytest.approx(top)
    assert float(y.min()) == pytest.approx(-top if signed else 0.0)
    assert float(gated_quantize(torch.zeros(1), torch.tensor(0.3), opened(bits), signed=signed)) == 0.0


def test_step_ratios():
    beta = torch.tensor(0.731, dtype=torch.float64)
    for signed in (True, False):
        steps = [float(step_size(beta, signed, bits)) for bits in BITS]
        ratios = [a / b for a, b in zip(steps, steps[1:], strict=False)]
        assert ratios == pytest.approx([5, 17, 257, 65537], rel=1e-7)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_error_bound_and_homogeneity(signed, bits):
    x, beta, gates = drawn(), torch.tensor(0.8, dtype=torch.float64), opened(bits, torch.float64)
    y = gated_quantize(x, beta, gates, signed=signed)
    assert (y - x.clamp(-0.8 if signed else 0.0, 0.8)).abs().max() <= step_size(beta, signed, bits) / 2 * (1 + 1e-5)
    fractional = torch.tensor([0.9, 0.6, 0.3, 0.8], dtype=torch.float64)
    for z in (gates, fractional):
        scaled = gated_quantize(3.7 * x, 3.7 * beta, z, signed=signed)
        assert torch.allclose(scaled, 3.7 * gated_quantize(x, beta, z, signed=signed), atol=1e-9)


def test_thirty_two_bits_change_nothing():
    x = drawn(dtype=torch.float32)
    for signed in (True, False):
        y = gated_quantize(x, torch.tensor(0.7), opened(32), signed=signed)
        assert (y - x.clamp(-0.7 if signed else 0.0, 0.7)).abs().max() <= 3e-7 * 0.7


# --- gradients ---------------------------------------------------------------------------------------------


def case(signed, pruned, seed=0):
    """x [5, 3, 4, 4] float64 that passes the range on both sides, beta, fractional gates, channel gates, a gradient."""
    generator = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(5, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    leaves = [x, torch.tensor(0.9, dtype=torch.float64), torch.tensor([0.9, 0.4, 0.7, 0.2], dtype=torch.float64)]
    leaves.append(torch.tensor([1.0, 0.3, 0.0, 0.6, 1.0], dtype=torch.float64) if pruned else None)
    return [None if leaf is None else leaf.requires_grad_() for leaf in leaves], grad


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("pruned", [True, False])
def test_one_node_has_the_gradients_of_the_chain(signed, pruned):
    leaves, grad = case(signed, pruned)
    wanted = [leaf for leaf in leaves if leaf is not None]
    outs = [quantize(*leaves, signed=signed) for quantize in (gated_quantize, chained_quantize)]
    assert torch.allclose(*outs, atol=1e-12)
    ours, chain = (torch.autograd.grad(out, wanted, grad) for out in outs)
    for mine, other in zip(ours, chain, strict=True):
        assert mine.shape == other.shape and torch.allclose(mine, other, atol=2e-6)  # the clip's 1e-7 is in beta's


@pytest.mark.parametrize("signed", [True, False])
def test_gradients_of_the_note(signed):
    """Section 1.5, element by element: d/dx = z2 inside; d/dbeta = (xq - z2 xc) / beta + z2 [x > b] - z2 [x < -b]."""
    (x, beta, z, z2), grad = case(signed, pruned=True)
    y = gated_quantize(x, beta, z, z2, signed=signed)
    dx, dbeta, dz, dz2 = torch.autograd.grad(y, (x, beta, z, z2), grad)
    with torch.no_grad():
        c = z2.reshape(-1, 1, 1, 1)
        low = -0.9 if signed else 0.0
        xc, above, below = x.clamp(low, 0.9), (x > 0.9).double(), (x < low).double() * signed
        assert torch.equal(dx, grad * c * ((x > low) & (x < 0.9)))
        assert float(dbeta) == pytest.approx(float((grad * ((y - c * xc) / 0.9 + c * (above - below))).sum()), rel=1e-5)
        terms = [gated_quantize(x, beta, opened(b, x.dtype), signed=signed) for b in BITS]
        e4, e8, e16, e32 = (terms[i + 1] - terms[i] for i in range(4))
        inner = e4 + z[1] * (e8 + z[2] * (e16 + z[3] * e32))
        by_hand = [inner, z[0] * (e8 + z[2] * (e16 + z[3] * e32)), z[0] * z[1] * (e16 + z[3] * e32),
                   z[0] * z[1] * z[2] * e32]
        assert dz.tolist() == pytest.approx([float((grad * c * part).sum()) for part in by_hand], abs=1e-9)
        assert torch.allclose(dz2, (grad * (terms[0] + z[0] * inner)).sum((1, 2, 3)))


def test_the_input_gradient_ignores_the_bit_gates():
    (x, beta, *_), grad = case(True, False)
    found = [torch.autograd.grad(gated_quantize(x, beta, torch.tensor(z, dtype=x.dtype), signed=True), x, grad)[0]
             for z in ([1.0] * 4, [0.0] * 4, [0.3, 0.8, 0.1, 0.5])]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_nesting():
    """Q8: behind a closed gate nothing counts; a pruned channel is 0, and nothing flows into it."""
    (x, beta, _, z2), grad = case(True, True)
    for closed in range(4):
        a, b = torch.rand(2, 4, generator=torch.Generator().manual_seed(closed), dtype=x.dtype)
        a[closed] = b[closed] = 0.0
        b[:closed] = a[:closed]
        y = gated_quantize(x, beta, a, z2, signed=True)
        assert torch.equal(y, gated_quantize(x, beta, b, z2, signed=True))
        assert torch.equal(y, gated_quantize(x, beta, a, z2, signed=True, levels=closed))
        (dx,) = torch.autograd.grad(y, x, grad)
        assert not y[2].any() and not dx[2].any() and dx[0].any()


def test_memory_formats_and_parts_without_gradients():
    generator = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(4, 6, 5, 5, generator=generator) for _ in range(2))
    beta, z = torch.tensor(1.1), torch.tensor([0.9, 0.4, 0.7, 0.2])

    def gradients(x, grad):
        leaves = [x.detach().requires_grad_(), beta.clone().requires_grad_(), z.clone().requires_grad_()]
        return torch.autograd.grad(gated_quantize(*leaves, signed=True), leaves, grad)

    wanted = gradients(x, grad)
    last = {"memory_format": torch.channels_last}
    for a, b in ((x.contiguous(**last), grad.contiguous(**last)), (x, grad.contiguous(**last))):
        assert all(torch.allclose(m, w, rtol=1e-4, atol=1e-5) for m, w in zip(gradients(a, b), wanted, strict=True))
    only = beta.clone().requires_grad_()
    (dbeta,) = torch.autograd.grad(gated_quantize(x, only, z, signed=True), only, grad)
    assert torch.allclose(dbeta, wanted[1])
    dot = float(_dot(x.contiguous(**last), grad.contiguous(**last)))
    assert dot == pytest.approx(float((x * grad).sum()), rel=1e-4)


# --- gates -------------------------------------------------------------------------------------------------


def test_samples_follow_their_formula():
    for phi, u in itertools.product((-3.0, 0.0, 1.5, 6.0), (0.01, 0.3, 0.5, 0.97)):
        logistic = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + phi) * 1.5))
        wanted = min(max(1.2 * logistic - 0.1, 0), 1)
        assert float(hard_concrete(torch.tensor(phi), u)) == pytest.approx(wanted, abs=1e-5)
    assert hard_concrete(torch.tensor([20.0, -20.0]), 0.5).tolist() == [1, 0]
    assert hard_concrete(torch.tensor([6.0, 6.0]), torch.tensor([0.0, 1 - 2**-24])).tolist() == [0, 1]
    assert float(log_open_probability(torch.tensor(6.0)).exp()) == pytest.approx(0.999499, abs=1e-6)


def test_the_probability_is_the_frequency():
    u = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    for phi in (-3.0, -1.5986, 0.0, 2.0):
        p = 1 / (1 + math.exp(-(phi + 1.598597)))
        seen = float((hard_concrete(torch.full_like(u, phi), u) > 0).double().mean())
        assert abs(seen - p) < 4 * math.sqrt(p * (1 - p) / len(u))


def test_thresholds():
    assert thresholded(torch.tensor([-0.936, -0.935, 0.0, -1.2])).tolist() == [0, 1, 1, 0]
    rows = torch.tensor([[6.0, -2.0, 6.0, 6.0], [-1.99, 6.0, 6.0, -3.0]])
    assert alive(rows).tolist() == [[1, 0, 0, 0], [1, 1, 1, 0]]


def test_widths_of_all_patterns():
    for pattern in itertools.product((0, 1), repeat=4):
        q4, q8, q16, q32 = pattern
        phi = torch.tensor([[6.0 if q else -6.0 for q in pattern]])
        assert bits_of(phi) == [2 ** (1 + q4 + q4 * (q8 + q8 * (q16 + q16 * q32)))]
