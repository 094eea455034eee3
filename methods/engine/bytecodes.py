"""Activation codes as bytes: code - lowest code of the quantizer, uint8; pictures in channels_last memory."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.artifact import ActivationQuantizer
from ..core.graph.graph import Node
from .exact import REAL, Form, Terms, code_bounds, on_codes
from .onednn import Int8Layer
from .wide import DigitLayer

CHUNK = 1 << 19  # float32 numbers of a sum, few enough to stay in the caches
VIA = torch.int16  # torch takes 3 times longer from float32 to uint8 at once


def is_narrow(form: object) -> bool:
    """Whether values of this form travel as bytes."""
    return isinstance(form, ActivationQuantizer) and form.bits <= 8


def zero_byte(quantizer: ActivationQuantizer) -> int:
    return quantizer.zero - quantizer.code_range[0]


def top_byte(quantizer: ActivationQuantizer) -> int:
    return (1 << quantizer.bits) - 1


def to_bytes(form: Form, value: Tensor | Terms) -> Tensor | Terms:
    """Codes in float32, as `network` has them, as bytes; what has no codes, or wide ones, unchanged."""
    if not is_narrow(form):
        return value
    return in_memory_order((value - form.code_range[0]).to(VIA).to(torch.uint8))


def to_float(form: Form, value: Tensor | Terms) -> Tensor | Terms:
    """The inverse."""
    return value.float() + form.code_range[0] if is_narrow(form) else value


def in_memory_order(codes: Tensor) -> Tensor:
    return codes.contiguous(memory_format=torch.channels_last) if codes.ndim == 4 else codes.contiguous()


def on_bytes(node: Node, form: Form, *values):
    """A clamp, or what moves or joins values, of values in any form; a clamp to the range of codes is nothing."""
    if node.op == "identity" or not is_narrow(form):
        return on_codes(node, form, *values)
    if node.bounds is not None:
        low, high = (end - form.code_range[0] for end in code_bounds(node.bounds, form))
        return values[0] if (low, high) == (0, top_byte(form)) else values[0].clamp(low, high)
    if node.op == "maxpool":
        return _max_pool(node, values[0])
    if node.op == "pad":
        return to_bytes(form, on_codes(node, form, values[0].float() + form.code_range[0]))
    return in_memory_order(node.run(*values))


def _max_pool(node: Node, codes: Tensor) -> Tensor:
    """By rows, then by columns: many times faster than torch's on bytes, which moreover takes 255 pixels at most."""
    pool = node.module
    if not isinstance(pool, nn.MaxPool2d) or pool.ceil_mode or pool.return_indices or codes.ndim != 4:
        return in_memory_order(node.run(codes.float()).to(VIA).to(torch.uint8))
    for dim in (2, 3):
        kernel, stride, pad, dilation = (value if isinstance(value, int) else value[dim - 2] for value in
                                         (pool.kernel_size, pool.stride, pool.padding, pool.dilation))
        if pad:  # with the lowest code: every window holds a pixel
            codes = nn.functional.pad(codes, (0, 0, pad, pad) if dim == 2 else (pad, pad, 0, 0))
        steps = (codes.shape[dim] - dilation * (kernel - 1) - 1) // stride + 1
        rows = [codes.narrow(dim, i * dilation, (steps - 1) * stride + 1) for i in range(kernel)]
        rows = [row[:, :, ::stride] if dim == 2 else row[:, :, :, ::stride] for row in rows]
        codes = rows[0]
        for row in rows[1:]:
            codes = torch.maximum(codes, row)
    return in_memory_order(codes)


Kernel = Int8Layer | DigitLayer


def rounded(kernel: Kernel, x: Tensor, form: ActivationQuantizer) -> Tensor:
    """Bytes of clamp(round(kernel(x)))."""
    low, high = form.code_range
    if low == 0:
        y = kernel(x, torch.uint8)
        return y.clamp_max_(high) if high < 255 else y
    y = kernel(x, torch.int8)
    y = y.clamp_(low, high) if high < 127 else y
    return y.view(torch.uint8).add_(-low)  # modulo 256


def summed(kernel: Kernel, x: Tensor, other: Tensor, source: ActivationQuantizer, factor: float,
           form: ActivationQuantizer) -> Tensor:
    """Bytes of clamp(round(kernel(x) + (codes of `other`) * factor)), in float32, a few pictures at a time."""
    out, (low, high) = torch.empty_like(other), form.code_range
    pictures = max(1, CHUNK // max(1, other[0].numel()))
    space = torch.empty_like(other[:pictures], dtype=torch.float32)
    for start in range(0, len(other), pictures):
        part = slice(start, start + pictures)
        y = kernel(x[part], torch.float32)
        codes = space[:len(y)].copy_(other[part])
        codes = codes.add_(source.code_range[0]) if source.code_range[0] else codes
        y.add_(codes.mul_(factor)).round_().clamp_(low, high)
        out[part] = (y.sub_(low) if low else y).to(VIA)
    return out


def summed_in_forms(kernel: Kernel, x: Tensor, other: Tensor, source: ActivationQuantizer,
                    parts: Sequence["Part"]) -> dict[Form, Tensor]:
    """{form: the same bytes}, all from one run of `kernel`, which gives f32(acc)."""
    pictures = max(1, CHUNK // max(1, other[0].numel()))
    codes, y, more = (torch.empty_like(other[:pictures], dtype=torch.float32) for _ in range(3))
    out = {part.form: torch.empty_like(other) for part in parts}
    for start in range(0, len(other), pictures):
        some = slice(start, start + pictures)
        total = kernel(x[some], torch.float32)
        n = len(total)
        codes[:n].copy_(other[some])
        if source.code_range[0]:
            codes[:n].add_(source.code_range[0])
        for part in parts:
            low, high = part.form.code_range
            torch.mul(total, part.gain, out=y[:n]).add_(part.offset).add_(
                torch.mul(codes[:n], part.factor, out=more[:n])).round_().clamp_(low, high)
            out[part.form][some] = (y[:n].sub_(low) if low else y[:n]).to(VIA)
    return out


@dataclass(frozen=True)
class Part:
    """acc * gain + offset + code * factor in units of `form`; gain and offset float32 [1, C, 1, 1] or [1, C]."""

    form: ActivationQuantizer
    gain: Tensor
    offset: Tensor
    factor: float


def summed_at_once(kernel: Kernel, x: Tensor, other: Tensor, source: ActivationQuantizer, factor: float,
                   form: Form) -> Tensor:
    """The same where one of the two is broadcast, or where real numbers are wanted."""
    y = kernel(x, torch.float32) + (other.float() + source.code_range[0]) * factor
    return y if form == REAL else to_bytes(form, y.round_().clamp_(*form.code_range))


@dataclass(frozen=True)
class Sum:
    """A conv or linear and the add that takes its accumulators, for one form.

    in_place   whether one call does both, over the codes that are added
    """

    kernel: Kernel
    source: ActivationQuantizer
    factor: float
    form: Form
    in_place: bool

    def __call__(self, codes: Tensor, other: Tensor, may_overwrite: bool) -> Tensor:
        given = (self.kernel, codes, other, self.source, self.factor, self.form)
        if self.form == REAL or self.kernel.output_shape(codes) != other.shape:
            return summed_at_once(*given)
        if not self.in_place:
            return summed(*given)
        y, top = self.kernel.add_to(other if may_overwrite else other.clone(), codes, self.factor), top_byte(self.form)
        return y.clamp_max_(top) if top < 255 else y
