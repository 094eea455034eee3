"""Convs and linears on the int8 instructions of the CPU (VNNI, AMX), through oneDNN as torch ships it.

Inputs are unsigned, weights signed 8-bit integers, sums exact in int32. What follows the sums was found by trying
near-tie factors on every kind of layer, and is tried again on each CPU before first use (`unsupported`):

    to float32    f32(acc) * m + b, product and sum each rounded
    to 8 bits     the same, rounded half to even and saturated
    added codes   fma(code, m1, f32(acc) * m + b): one rounding where `network.Terms` has two, so that it serves only
                  where code * m1 is exact (`exact_product`)

Without VNNI the CPU adds two products in 16 bits, which saturate: 2 * 255 * 128 is too much, 2 * 255 * 64 is not. There
weights beyond 64 are split, and their inputs read again (`largest_weight`), but for depthwise convs, which add no two.
Of windows that hold no pixel (padding beyond the kernel's reach, a picture smaller than the dilation) oneDNN returns
garbage or crashes, and of strided ones it errs where they make one column: `takes` refuses the first, and `Int8Layer`
sums the others by itself.
"""

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import CompressError
from .accumulate import accumulate, largest_partial_sum

INT32, BITS = 1 << 31, 8
SHAPES = 3  # of inputs, for which the weights are kept in order
REPETITIONS = 3  # of an input, at most, by weights of 8 bits
LARGEST = (128, 64)  # weights that `largest_weight` tries
SIGNIFICAND = 24  # of float32
SMALLEST = 2.0**-100  # factors far from the subnormal numbers


class Int8Layer:
    """f32(acc) * factor + offset of a conv or linear, acc = sum_k (x_k - zero) w_k over its uint8 inputs.

    module    gives the geometry
    integers  [C_out, ...]; inputs with weights outside -largest..largest (int8 ends at 127) are read repeatedly, each
              time with a part of them
    zero      0..255, also what the padding holds
    factor, offset  float32 [C_out]
    largest   what this CPU multiplies exactly; None: `largest_weight(module)`
    """

    def __init__(self, module: nn.Module, integers: Tensor, zero: int, factor: Tensor, offset: Tensor,
                 largest: int | None = None):
        self.module, self.zero, self.offset = module, zero, offset.contiguous()
        self.channels, self.kernel = len(integers), integers.shape[2:]
        integers, self.again = in_bytes(integers, largest_weight(module) if largest is None else largest)
        self.factor, self.no_zeros = factor.contiguous(), torch.zeros(len(factor), dtype=torch.int32)
        self.integers = integers.to(torch.int8).contiguous()
        self.products = integers.numel()  # for each output pixel
        self.geometry = None if isinstance(module, nn.Linear) else _geometry(module)
        self.adds_codes = self.geometry is not None
        self.packed: dict[tuple[int, ...], Tensor] = {}  # {shape of the input: weights in the order it is computed in}

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """In `dtype` float32, or rounded half to even and saturated in uint8 or int8; 4-d outputs channels_last."""
        x = self._repeated(x)
        if not self._is_safe(x):
            return saturated(self._scaled(x), dtype)
        given = (x, 1.0, self.zero, self._pack(x), self.factor, self.no_zeros)
        if self.geometry is None:
            return torch.ops.onednn.qlinear_pointwise(*given, self.offset, 1.0, 0, dtype, "none", [], "")
        return torch.ops.onednn.qconv2d_pointwise(*given, self.offset, *self.geometry, 1.0, 0, dtype, "none", [], "")

    def output_shape(self, x: Tensor) -> tuple[int, ...]:
        """[N, C_out, H, W] for pictures, else [N, C_out]."""
        if self.geometry is None:
            return (*x.shape[:-1], self.channels)
        stride, padding, dilation, _ = self.geometry
        sides = [(x.shape[2 + i] + 2 * padding[i] - dilation[i] * (self.kernel[i] - 1) - 1) // stride[i] + 1
                 for i in range(2)]
        return (len(x), self.channels, *sides)

    def add_to(self, codes: Tensor, x: Tensor, factor: float) -> Tensor:
        """uint8 of self(x) + codes * factor, conv only; exact if `exact_product(factor)`; `codes` are overwritten."""
        x = self._repeated(x)
        if not self._is_safe(x):
            return codes.copy_(saturated(self._scaled(x) + codes.float() * factor, torch.uint8))
        return torch.ops.onednn.qconv2d_pointwise.binary(
            x, 1.0, self.zero, self._pack(x), self.factor, self.no_zeros, codes, self.offset, *self.geometry, 1.0, 0,
            torch.uint8, factor, 0, "sum", 1.0, None, [], "")

    def add_float(self, y: Tensor, x: Tensor) -> Tensor:
        """float32 of self(x) + y, conv only; `y` float32 is overwritten. Exact where the sum alone is rounded."""
        x = self._repeated(x)
        if not self._is_safe(x):
            return y.add_(self._scaled(x))
        return torch.ops.onednn.qconv2d_pointwise.binary(
            x, 1.0, self.zero, self._pack(x), self.factor, self.no_zeros, y, self.offset, *self.geometry, 1.0, 0,
            torch.float32, 1.0, 0, "sum", 1.0, None, [], "")

    def _pack(self, x: Tensor) -> Tensor:
        """The weights in oneDNN's order for inputs of this shape: in another it reorders them in every call."""
        shape = tuple(x.shape)
        if shape not in self.packed:
            if len(self.packed) == SHAPES:
                self.packed.pop(next(iter(self.packed)))
            self.packed[shape] = torch.ops.onednn.qlinear_prepack(self.integers, list(shape)) \
                if self.geometry is None else torch.ops.onednn.qconv_prepack(
                    self.integers, self.factor, 1.0, self.zero, *self.geometry, list(shape))
        return self.packed[shape]

    def _repeated(self, x: Tensor) -> Tensor:
        """`x` with the inputs that are read again behind each group's own."""
        if self.again is None:
            return x
        channels = -1 if self.geometry is None else 1
        last = x.movedim(channels, -1)
        groups = getattr(self.module, "groups", 1)
        inside = last.reshape(-1, groups, x.shape[channels] // groups)
        every = torch.equal(self.again, torch.arange(inside.shape[2]))
        more = inside if every else inside.index_select(2, self.again)
        return torch.cat([inside, more], 2).reshape(*last.shape[:-1], -1).movedim(-1, channels)

    def _is_safe(self, x: Tensor) -> bool:
        """Whether oneDNN computes this layer rightly on pictures of this size."""
        if self.geometry is None:
            return True
        stride, _, dilation, _ = self.geometry
        height, width = self.output_shape(x)[2:]
        return (x.shape[2] >= dilation[0] and x.shape[3] >= dilation[1]
                and (width > 1 or height == 1 or stride[1] == 1))

    def _scaled(self, x: Tensor) -> Tensor:
        """The same numbers from float64 sums."""
        total = accumulate(self.module, x.double() - self.zero, self.integers, torch.float64).float()
        shape = (1, -1, *[1] * (total.ndim - 2))
        y = total * self.factor.reshape(shape) + self.offset.reshape(shape)
        return y if y.ndim < 4 else y.contiguous(memory_format=torch.channels_last)


def in_bytes(integers: Tensor, largest: int) -> tuple[Tensor, Tensor | None]:
    """Weights [C_out, C_in / groups + E, ...] of -largest..largest, and the E inputs of a group that are there again.

    The weights of an input and of its repetitions add up to what they were, and have its sign; 127 is the most of int8.
    """
    parts, again, rest = [], [], integers
    inputs = torch.arange(integers.shape[1])
    while True:
        part = rest.clamp(-largest, min(largest, 127))
        parts.append(part)
        again.append(inputs)
        rest = rest - part
        wide = (rest.movedim(1, 0).flatten(1) != 0).any(1) if rest.numel() else torch.zeros(0, dtype=torch.bool)
        if not bool(wide.any()):
            return torch.cat(parts, 1), torch.cat(again[1:]) if again[1:] else None
        inputs, rest = inputs[wide], rest[:, wide]


def exact_product(factor: float) -> bool:
    """Whether an 8-bit code times this float32 is a float32: then one rounding of a sum and two are the same."""
    significand = math.frexp(factor)[0] * 2.0 ** (SIGNIFICAND - BITS)
    return abs(factor) > SMALLEST and significand == int(significand)


def takes(module: nn.Module, integers: Tensor, bits: int) -> bool:
    """Whether `Int8Layer` has this layer with codes of so many bits: else other kernels run it."""
    if integers.numel() == 0 or bits > BITS or largest_partial_sum(integers, 0, 255) >= INT32 // 2 \
            or int(integers.abs().max()) > REPETITIONS * 128:
        return False
    return isinstance(module, nn.Linear) or (module.padding_mode == "zeros" and _has_pixels(module))


def _has_pixels(conv: nn.Conv2d) -> bool:
    """Whether the padding is symmetric and no window lies wholly in it."""
    padding = _padding(conv)
    reach = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    return padding is not None and all(p <= r for p, r in zip(padding, reach, strict=True))


def _geometry(conv: nn.Conv2d) -> tuple:
    return list(conv.stride), _padding(conv), list(conv.dilation), conv.groups


def _padding(conv: nn.Conv2d) -> list[int] | None:
    """Of both sides alike; None where they differ ("same" with an even kernel)."""
    if conv.padding == "valid":
        return [0, 0]
    if conv.padding == "same":
        reach = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return None if any(r % 2 for r in reach) else [r // 2 for r in reach]
    return list(conv.padding)


# --- what this CPU computes --------------------------------------------------------------------------------

TRIALS = (  # layer, zero point, side of the picture: sums of up to 4,608 products, every kind of kernel
    (lambda: nn.Conv2d(512, 32, 3, padding=1), 0, 4), (lambda: nn.Conv2d(64, 32, 3, 2, padding=1), 128, 8),
    (lambda: nn.Conv2d(3, 16, 3, padding=1), 7, 8), (lambda: nn.Conv2d(64, 32, 1), 0, 8),
    (lambda: nn.Conv2d(32, 32, 3, groups=2), 0, 6), (lambda: nn.Conv2d(20, 50, 5), 0, 8),
    (lambda: nn.Linear(4096, 10), 3, None),
)
DEPTHWISE = ((lambda: nn.Conv2d(32, 32, 3, padding=1, groups=32), 9, 6),)


def unsupported() -> str:
    """Why the int8 kernels of this CPU and torch may not be used; empty where they compute what they should."""
    return _tried(TRIALS)[1] or _tried(DEPTHWISE)[1]


def largest_weight(module: nn.Module) -> int:
    """128 where the kernel of such a layer is exact for all weights of 8 bits, 64 where only up to that.

    CompressError where it is not exact at all.
    """
    depthwise = isinstance(module, nn.Conv2d) and module.groups == module.in_channels == module.out_channels > 1
    largest, fault = _tried(DEPTHWISE if depthwise else TRIALS)
    if fault:
        raise CompressError(fault)
    return largest


@functools.cache
def _tried(trials: tuple) -> tuple[int, str]:
    """The largest weight, or why there is none."""
    if not hasattr(torch.ops.onednn, "qconv2d_pointwise") or not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return 0, "this torch has no oneDNN int8 kernels"
    wrong = None
    for largest in LARGEST:
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.default_generator.manual_seed(0)
                wrong = next((module for make, zero, side in trials
                              if not _is_exact(module := make(), zero, side, largest)), None)
        except (RuntimeError, TypeError) as error:  # no such kernel; other arguments than these
            return 0, f"oneDNN's int8 kernels cannot run here: {str(error).splitlines()[0]}"
        if wrong is None:
            return largest, ""
    return 0, f"oneDNN's int8 kernels are not exact on this CPU, for example {wrong}"


def _is_exact(module: nn.Module, zero: int, side: int | None, largest: int) -> bool:
    """Sums, factors, rounding and added codes of one layer, on extreme and on random operands."""
    shape = (3, module.weight.shape[1]) if side is None else (3, module.in_channels, side, side)
    x = torch.randint(0, 256, shape, dtype=torch.uint8)
    x[0] = 255
    w = torch.randint(-128, 128, module.weight.shape)
    w[0], w[1], w[2] = -128, 127, 0
    channels = (1, -1) if side is None else (1, -1, 1, 1)
    total = accumulate(module, x.double() - zero, w, torch.float64)
    factor = (torch.rand(len(w)) + 0.5) * 60 / float(total[1:, 3:].std())
    factor[3::2] *= -1
    offset = torch.randn(len(w)) * 40
    layer = Int8Layer(module, w, zero, factor, offset, largest)
    x = x if side is None else x.contiguous(memory_format=torch.channels_last)
    y = total.float() * factor.reshape(channels) + offset.reshape(channels)
    good = (torch.equal(layer(x, torch.float32), y) and torch.equal(layer(x, torch.uint8), saturated(y, torch.uint8))
            and torch.equal(layer(x, torch.int8), saturated(y, torch.int8)))
    if side is None or not good:
        return good
    codes, factor = torch.randint(0, 256, y.shape, dtype=torch.uint8), 95 / 256  # an exact product
    summed = layer.add_to(codes.contiguous(memory_format=torch.channels_last), x, factor)
    return torch.equal(summed, saturated(y + codes.float() * factor, torch.uint8))


def saturated(y: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 as it is; for 8 bits rounded half to even and saturated."""
    if dtype == torch.float32:
        return y
    limits = torch.iinfo(dtype)
    return torch.round(y).clamp(limits.min, limits.max).to(dtype)


def cpu_flags() -> dict[str, Any]:
    """{instruction set: whether this CPU has it}, as torch names them; empty from a torch that does not say."""
    ask = getattr(torch.cpu, "get_capabilities", None)
    return {} if ask is None else ask()


def capability() -> str:
    """The instructions that decide the speed: AMX, VNNI or neither, and torch's own level."""
    flags = cpu_flags()
    names = {"amx_int8": "AMX-INT8", "avx512_vnni": "AVX512-VNNI", "avx_vnni": "AVX-VNNI"}
    found = [name for flag, name in names.items() if flags.get(flag)]
    return f"{flags.get('cpu_name', flags.get('architecture', 'unknown CPU'))}, torch level " \
           f"{torch.backends.cpu.get_cpu_capability()}, int8: " \
           f"{', '.join(found) or ('no VNNI, no AMX' if flags else 'unknown')}"
