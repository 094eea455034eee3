"""Bit windows on 8-bit activation codes: tables, the rule of pairs, and what a layer sums under them (SPARQ).

    f(a)           n bits of a, at the lowest allowed shift that still holds its leading one
    g(a)           2n bits of a, at any shift: what an activation keeps whose partner is 0 (n = 4: all of it)
    T[a, partner]  g(a) where the partner is 0, else f(a)

Partners are neighbours in the reduction dimension, ordered (kernel row, kernel column, input channel), the channel
fastest. Where the channels divide into pairs, both partners are channels of one pixel, and windows are a function of
the activations alone. Codes are integers 0..255 in any dtype; zero padding of a conv counts as zeros.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..artifact import Window
from ..errors import CompressError, ConfigError

WIDTH, CODES = 8, 256  # what a window is taken of
OPTIONS = {
    "5opt": (4, (0, 1, 2, 3, 4)), "3opt": (4, (0, 2, 4)), "2opt": (4, (0, 4)),
    "6opt": (3, (0, 1, 2, 3, 4, 5)), "7opt": (2, (0, 1, 2, 3, 4, 5, 6)),
}


def find_window(option: str, rounding: bool = True, paired: bool = True, sparse24: bool = False) -> Window:
    """The paper's window of that name: "5opt", "3opt", "2opt" (4 bits), "6opt" (3 bits), "7opt" (2 bits)."""
    if option not in OPTIONS:
        raise ConfigError(f"window {option!r}: allowed are {', '.join(OPTIONS)}")
    bits, shifts = OPTIONS[option]
    return Window(bits, shifts, rounding, paired, sparse24)


# --- tables ------------------------------------------------------------------------------------------------


def window_table(bits: int, shifts: tuple[int, ...], rounding: bool) -> Tensor:
    """f(0), ..., f(255) as int64 [256]. Rounding is half to even and saturates inside the window."""
    if not 1 <= bits <= WIDTH or not shifts or min(shifts) < 0 or max(shifts) != WIDTH - bits:
        raise CompressError(f"a window of {bits} bits at the shifts {list(shifts)}: allowed are 1..{WIDTH} bits, and "
                            "the highest shift reaches bit 7")
    a = torch.arange(CODES)
    s = torch.full_like(a, WIDTH - bits)
    for shift in sorted(shifts, reverse=True):
        s = torch.where(a < 1 << shift + bits, shift, s)  # lowest window that holds the leading one
    m = a >> s
    if rounding:
        rest, half = a - (m << s), (1 << s) >> 1
        up = (s > 0) & ((rest > half) | (rest == half) & (m % 2 == 1))
        m = (m + up).clamp_max((1 << bits) - 1)
    return m << s


def solo_table(window: Window) -> Tensor:
    """g(0), ..., g(255): twice the bits, at every shift; all 8 for windows of 4 bits and more."""
    bits = min(2 * window.bits, WIDTH)
    return window_table(bits, tuple(range(WIDTH - bits + 1)), window.rounding)


@functools.cache
def partner_table(window: Window) -> Tensor:
    """T as uint8 [256, 256], by a and partner; of unpaired windows f(a) throughout. Not to be written to."""
    table = window_table(window.bits, window.shifts, window.rounding)[:, None].repeat(1, CODES)
    if window.paired:
        table[:, 0] = solo_table(window)
    return table.to(torch.uint8)


def trim(codes: Tensor, partner: Tensor, window: Window) -> Tensor:
    """T[codes, partner], element by element, in the dtype of `codes`."""
    index = codes.to(torch.int32) * CODES + partner.to(torch.int32)
    table = partner_table(window).to(codes.device).reshape(-1)
    return table.index_select(0, index.reshape(-1)).reshape(codes.shape).to(codes.dtype)


def trim_pairs(codes: Tensor, window: Window) -> Tensor:
    """`codes` [N, C, ...] as a layer without 2:4 weights reads them: channels 2i and 2i + 1 are partners."""
    if not window.paired:
        return trim(codes, codes, window)
    if codes.shape[1] % 2:
        raise CompressError(f"{codes.shape[1]} channels do not divide into pairs")
    return trim(codes, codes.unflatten(1, (-1, 2)).flip(2).flatten(1, 2), window)


# --- 2:4 weights -------------------------------------------------------------------------------------------


def _fours(weight: Tensor) -> Tensor:
    """[N, groups, 4]: the reduction dimension with the channel fastest, its last group filled with zeros."""
    rows = weight.movedim(1, -1).reshape(len(weight), -1)
    return F.pad(rows, (0, -rows.shape[1] % 4)).unflatten(1, (-1, 4))


def follows_24(weight: Tensor) -> bool:
    """Whether no group of four weights [N, C, ...] has more than two that are not 0."""
    return not bool(((_fours(weight) != 0).sum(2) > 2).any())


def keep_24(weight: Tensor) -> Tensor:
    """Bool mask of the two largest |w| in every group of four; of equal ones the first are kept."""
    fours = _fours(weight.detach().abs())
    order = fours.sort(dim=2, descending=True, stable=True).indices
    mask = torch.zeros_like(fours, dtype=torch.bool).scatter_(2, order[..., :2], True).flatten(1)
    moved = weight.movedim(1, -1)
    return mask[:, :moved[0].numel()].reshape(moved.shape).movedim(-1, 1)


def expand_24(codes: Tensor, weight: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """Codes [N, 4C, ...] and weight [M, 4C, ...] whose ordinary product is the one under `window` on 2:4 weights.

    A filter pairs the two positions of a group that it has weights at, so what it reads of position p depends on the
    other one, q: channel (group, p, q) holds T[a_p, a_q], and (group, p, p), for a p without other, T[a_p, 0].
    """
    if not follows_24(weight):
        raise CompressError("the weights do not follow the 2:4 pattern: more than two of four are not 0")
    codes, weight = codes.unflatten(1, (-1, 4)), weight.unflatten(1, (-1, 4))  # [N, G, 4, ...]
    same = torch.eye(4, device=codes.device, dtype=torch.bool).reshape(4, 4, *[1] * (codes.ndim - 3))
    own, other = (codes.unsqueeze(dim).expand(*codes.shape[:2], 4, 4, *codes.shape[3:]) for dim in (3, 2))
    kept = weight != 0
    alone = (kept.sum(2, keepdim=True) == 1).unsqueeze(3)
    chosen = kept.unsqueeze(3) & kept.unsqueeze(2) & (~same | alone)  # [M, G, p, q, ...]
    return (trim(own, other * ~same, window).flatten(1, 3), (weight.unsqueeze(3) * chosen).flatten(1, 3))


# --- sums --------------------------------------------------------------------------------------------------


def is_elementwise(window: Window, channels: int) -> bool:
    """Whether `trim_pairs` followed by the layer as it is gives what a layer of so many inputs sums."""
    return not window.paired or (not window.sparse24 and channels % 2 == 0)


def windowed_sum(layer: nn.Module, codes: Tensor, weight: Tensor, window: Window | None) -> Tensor:
    """sum_k T[a_k, partner] w_k of a conv (one group, zero padding) or linear, in the dtype of `weight`.

    layer   gives the geometry;  weight  its integers;  window  None for the sum of the codes as they are
    """
    if codes.ndim != weight.ndim:
        raise CompressError(f"windows act on inputs of {weight.ndim} dimensions here, not on {list(codes.shape)}")
    multiply = _product(layer)
    if window is not None and window.paired and weight.shape[1] % (4 if window.sparse24 else 2):
        codes, weight = _columns(layer, codes.to(weight.dtype), weight)
        multiply = F.conv2d if codes.ndim == 4 else F.linear
    if window is not None and window.paired and window.sparse24:
        codes, weight = expand_24(codes, weight, window)
    elif window is not None:
        codes = trim_pairs(codes, window)
    return multiply(codes.to(weight.dtype), weight)


def _product(layer: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    if isinstance(layer, nn.Linear):
        return F.linear
    return lambda x, weight: F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation)


def _columns(layer: nn.Module, codes: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The layer as a 1 x 1 conv over the whole reduction dimension, channel fastest, filled to a multiple of 4.

    A conv with one-hot filters takes the columns: it knows every kind of padding.
    """
    rows = weight.movedim(1, -1).reshape(len(weight), -1)
    k = rows.shape[1]
    fill = -k % 4
    if isinstance(layer, nn.Linear):
        return F.pad(codes, (0, fill)), F.pad(rows, (0, fill))
    _, into, height, width = weight.shape
    one_hot = F.pad(torch.eye(k, dtype=weight.dtype, device=weight.device), (0, 0, 0, fill))
    one_hot = one_hot.reshape(k + fill, height, width, into).permute(0, 3, 1, 2)
    return _product(layer)(codes, one_hot), F.pad(rows, (0, fill))[:, :, None, None]
