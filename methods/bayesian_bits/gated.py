"""A quantizer whose width is learned: a coarse one, residuals that refine it, and a gate on each residual.

    y = z2 * (x2 + z4 * (e4 + z8 * (e8 + z16 * (e16 + z32 * e32))))

x2 is x on a 2-bit grid, e_2b the remainder x - x2 - ... - e_b on a grid 2^b + 1 times as fine: with all gates up to
b open, y is x on the b-bit grid of step span / (2^b - 1). A closed gate closes all higher ones. z2 is one gate per
output channel. Gates are drawn from the hard concrete distribution (Louizos et al. 2018).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

WIDTHS = (4, 8, 16, 32)  # of the gates, in this order
TAU, ZETA, GAMMA = 2 / 3, 1.1, -0.1  # hard concrete: temperature, and the interval that is clamped to [0, 1]
OFFSET = TAU * math.log(-GAMMA / ZETA)
THRESHOLD = 0.34  # a gate is open at test time if P(z = 0) is below
DEAD = -2.0  # logits up to here never open again
SHRINK = 1 - 1e-7  # of the clip: x = range lies half-way between two codes of a signed grid

# --- gates -------------------------------------------------------------------------------------------------


def hard_concrete(phi: Tensor, u: Tensor | float) -> Tensor:
    """A sample for uniform `u` in (0, 1): clamp((zeta - gamma) sigmoid((logit u + phi) / tau) + gamma, 0, 1)."""
    u = torch.as_tensor(u, dtype=phi.dtype, device=phi.device)
    logit = u.log() - (-u).log1p()
    return ((ZETA - GAMMA) * torch.sigmoid((logit + phi) / TAU) + GAMMA).clamp(0, 1)


def log_open_probability(phi: Tensor) -> Tensor:
    """ln P(z > 0) of a hard concrete gate."""
    return F.logsigmoid(phi - OFFSET)


def thresholded(phi: Tensor) -> Tensor:
    """The gate at test time: 1 where P(z = 0) < 0.34, that is phi > -0.9353, else 0."""
    return (torch.sigmoid(OFFSET - phi) < THRESHOLD).to(phi.dtype)


def alive(phi: Tensor) -> Tensor:
    """0 from the first dead logit of each row on, else 1; phi [..., 4]."""
    return (phi > DEAD).to(phi.dtype).cumprod(-1)


def bits_of(phi: Tensor) -> list[int]:
    """Width in {2, 4, 8, 16, 32} of each row of logits [Q, 4] at test time."""
    return [2 ** (1 + int(n)) for n in thresholded(phi).cumprod(-1).sum(-1).tolist()]


# --- the quantizer -----------------------------------------------------------------------------------------


def step_size(beta: Tensor, signed: bool, bits: int) -> Tensor:
    """Step of the b-bit grid over [-beta, beta] (signed) or [0, beta]: span / (2^b - 1)."""
    return (2 * beta if signed else beta) / (2**bits - 1)


def _clip(x: Tensor, beta: Tensor, signed: bool) -> Tensor:
    top = SHRINK * beta
    return x.clamp(-top if signed else torch.zeros_like(top), top)


def _channels(prune: Tensor, like: Tensor) -> Tensor:
    return prune.reshape(-1, *[1] * (like.ndim - 1))


def gated_quantize(x: Tensor, beta: Tensor, gates: Tensor | None = None, prune: Tensor | None = None, *,
                   signed: bool, first: int = 2, levels: int | None = None) -> Tensor:
    """The formula at the top, with straight-through gradients to x, beta, gates and prune.

    beta    [] range, positive
    gates   [n], of the residuals; None: the plain quantizer of `first` bits
    prune   [C_out] gates of channels, or None
    first   bits of the coarsest quantizer
    levels  residuals to compute, all of them if None: those after a gate that is exactly 0 change nothing (their
            gates then get no gradient)
    """
    gates = x.new_zeros(0) if gates is None else gates
    return _Gated.apply(x, beta, gates, prune, signed, first, len(gates) if levels is None else levels)


class _Gated(torch.autograd.Function):
    """All of it in one node: a chain of autograd operations would keep about 30 tensors of the size of x."""

    @staticmethod
    def forward(ctx, x, beta, gates, prune, signed, first, levels):
        clipped, step = _clip(x, beta, signed), step_size(beta, signed, first)
        terms, rest = [torch.div(clipped, step).round_().mul_(step)], clipped
        for level in range(levels):
            rest = torch.sub(rest, terms[-1], out=rest if level else None)
            step = step / (2 ** (first << level) + 1)
            terms.append(torch.div(rest, step).round_().mul_(step))
        inner = terms[-1]
        for level in reversed(range(levels)):
            inner = torch.addcmul(terms[level], inner, gates[level])
        inside = clipped == x
        error = torch.where(inside, x, x.new_zeros(())).neg_().add_(inner)  # where clipped, y follows beta alone
        ctx.save_for_backward(beta, gates, prune, inside, error, inner if prune is not None else None, *terms[1:])
        return inner if prune is None else inner * _channels(prune, x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        beta, gates, prune, inside, error, inner, *residuals = ctx.saved_tensors
        to_x, to_beta, to_gates, to_prune = ctx.needs_input_grad[:4]
        through = grad if prune is None else grad * _channels(prune, grad)
        dx = through * inside if to_x else None  # z2 inside the range, whatever the other gates
        dbeta = _dot(through, error) / beta if to_beta else None  # y is homogeneous in (x, beta): Euler's identity
        dgates = _gate_gradients(through, gates, residuals) if to_gates else None
        dprune = (grad * inner).flatten(1).sum(1) if to_prune else None
        return dx, dbeta, dgates, dprune, None, None, None


def _gate_gradients(grad: Tensor, gates: Tensor, residuals: list[Tensor]) -> Tensor:
    """dz_k = (product of the gates before k) * <grad, e_k + z_{k+1} (e_{k+1} + ...)>."""
    found, tail = torch.zeros_like(gates), torch.zeros_like(gates[:1]).sum()
    for k in reversed(range(len(residuals))):
        tail = _dot(grad, residuals[k]) + (gates[k + 1] * tail if k + 1 < len(gates) else 0)
        found[k] = gates[:k].prod() * tail
    return found


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum of a * b, without a tensor for the products where both lie in memory alike."""
    if a.stride() == b.stride() and a.is_contiguous():
        return torch.dot(a.view(-1), b.view(-1))
    if a.ndim == 4 and a.stride() == b.stride() and a.is_contiguous(memory_format=torch.channels_last):
        return torch.dot(a.permute(0, 2, 3, 1).reshape(-1), b.permute(0, 2, 3, 1).reshape(-1))
    return (a * b).sum()


def chained_quantize(x: Tensor, beta: Tensor, gates: Tensor | None = None, prune: Tensor | None = None, *,
                     signed: bool, first: int = 2) -> Tensor:
    """`gated_quantize` as a chain of autograd operations: the reference that tests hold the other against."""
    clipped, step = _clip(x, beta, signed), step_size(beta, signed, first)
    terms, total = [], torch.zeros_like(x)
    for level in range(1 + (0 if gates is None else len(gates))):
        scaled = (clipped - total) / step
        terms.append(step * (scaled + (scaled.round() - scaled).detach()))
        total = total + terms[-1]
        step = step / (2 ** (first << level) + 1)
    y = terms[-1]
    for level in reversed(range(len(terms) - 1)):
        y = terms[level] + gates[level] * y
    return y if prune is None else _channels(prune, x) * y


def to_codes(x: Tensor, beta: Tensor, signed: bool, bits: int) -> Tensor:
    """int32 codes of x on the b-bit grid."""
    return torch.round(_clip(x, beta, signed) / step_size(beta, signed, bits)).to(torch.int32)
