"""Bit windows (SPARQ) in the integer kernels.

With an even number of channels a window is a function of each pair of channels, that is, in channels_last memory, of
each two neighbouring bytes: one look-up in a table of 65,536 entries, before a conv that knows nothing of it. An odd
number of channels, whose pairs straddle kernel positions, and 2:4 weights, whose pairs differ from filter to filter,
are brought to an ordinary conv by `core.fit.windows`. On the int8 instructions 2:4 weights have a form of their own
here: every four channels become up to 16, one for each member of the six pairs and one for each channel alone, and a
filter has weights at those that it pairs. All routes are exact.
"""

import functools

import torch
from torch import Tensor, nn

from ..core.artifact import ActivationQuantizer, Window
from ..core.errors import GraphError
from ..core.fit.windows import CODES, follows_24, partner_table, trim_pairs, windowed_sum

UNSIGNED_8 = (0, 255)
PIECE = 1 << 17  # pairs that are looked up at a time
PAIRINGS = ((0, 1, 2, 3), (0, 2, 1, 3), (0, 3, 1, 2))  # of four channels: the first two and the last two are partners


@functools.cache
def pair_table(window: Window) -> Tensor:
    """int16 [65536]: two neighbouring bytes, read as one 16-bit number, after the window. Not to be written to."""
    pairs = torch.arange(CODES * CODES).to(torch.uint16).view(torch.uint8).reshape(-1, 2).long()
    trimmed = partner_table(window)[pairs, pairs.flip(1)]  # in the byte order of this machine
    return trimmed.view(torch.int16).reshape(-1)


def windowed_codes(codes: Tensor, window: Window) -> Tensor:
    """Codes [N, C, ...] as a layer reads them whose windows are element-wise; dtype kept, 4-d ones channels_last.

    codes   uint8, or integers 0..255 held in a float dtype, in any memory format
    Raises GraphError where the window pairs channels of which there is an odd number.
    """
    channels = codes.shape[1]
    if window.paired and channels % 2:
        raise GraphError(f"{channels} channels do not divide into pairs: the window is not element-wise")
    if channels % 2:
        return trim_pairs(codes, window)
    last = codes.movedim(1, -1).to(torch.uint8).contiguous()  # [N, ..., C]
    found = _look_up(pair_table(window).to(codes.device), last.view(-1))  # flat: of 1 x 1 strides may be anything
    return found.reshape(last.shape).to(codes.dtype).movedim(-1, 1)


@functools.cache
def alone_table(window: Window) -> Tensor:
    """int16 [65536]: two neighbouring bytes, each after the window as if its partner were 0. Not to be written to."""
    pairs = torch.arange(CODES * CODES).to(torch.uint16).view(torch.uint8).reshape(-1, 2).long()
    return partner_table(window)[pairs, torch.zeros_like(pairs)].view(torch.int16).reshape(-1)


def spread_codes(codes: Tensor, window: Window, alone: bool) -> Tensor:
    """uint8 [N, 12 C / 4 (+ C if `alone`), ...] in the order of `spread_weights`, of uint8 codes [N, C, ...]."""
    last = codes.movedim(1, -1).contiguous()
    fours = last.view(-1).view(torch.int32)  # bytes 0 1 2 3
    orders = (fours, fours & -0xFFFF01 | fours << 8 & 0xFF0000 | fours >> 8 & 0xFF00,
              fours & 0xFF | fours >> 16 & 0xFF00 | fours << 8 & -0x10000)
    found = [_look_up(pair_table(window), order) for order in orders]
    found += [_look_up(alone_table(window), fours)] if alone else []
    return torch.stack([part.reshape(-1, last.shape[-1]) for part in found], 1).reshape(
        *last.shape[:-1], -1).movedim(-1, 1)


def _look_up(table: Tensor, codes: Tensor) -> Tensor:
    """uint8 of the table's entries at `codes` (flat, contiguous), read as 16-bit numbers; in pieces that fit caches."""
    pairs = codes.view(torch.uint16)
    found = torch.empty(pairs.shape, dtype=torch.int16, device=codes.device)
    for start in range(0, len(pairs), PIECE):
        piece = slice(start, start + PIECE)
        torch.index_select(table, 0, pairs[piece].to(torch.int32), out=found[piece])
    return found.view(torch.uint8)


def spread_weights(integers: Tensor) -> tuple[Tensor, bool]:
    """Integers [M, 12 C / 4 (+ C), ...] that multiply `spread_codes`, and whether some weight of a group is alone."""
    fours = integers.unflatten(1, (-1, 4))  # [M, G, 4, ...]
    kept = fours != 0
    parts = []
    for order in PAIRINGS:
        own, partner = list(order), [order[1], order[0], order[3], order[2]]
        parts.append((fours[:, :, own] * kept[:, :, partner]).flatten(1, 2))
    alone = fours * (kept.sum(2, keepdim=True) == 1)
    some = bool((alone != 0).any())
    return torch.cat([*parts, alone.flatten(1, 2)] if some else parts, 1), some


def check_window(name: str, layer: nn.Module, source: ActivationQuantizer, integers: Tensor, window: Window) -> None:
    """GraphError, naming the layer, where a window cannot act: signed or narrow codes, groups, weights not 2:4."""
    partner_table(window)  # refuses a window that does not reach bit 7
    if source.code_range != UNSIGNED_8 or source.zero != 0:
        raise GraphError(f"the window of {name} needs unsigned 8-bit codes with zero point 0, not {source}")
    if getattr(layer, "groups", 1) != 1:
        raise GraphError(f"{name} has {layer.groups} groups: windows pair the inputs of one group only")
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        raise GraphError(f"{name} has padding_mode = {layer.padding_mode!r}: the integer kernels pad with zeros")
    if window.paired and window.sparse24 and not follows_24(integers):
        raise GraphError(f"the window of {name} pairs 2:4 weights, but more than two of four are not 0")


def accumulate_windowed(layer: nn.Module, codes: Tensor, integers: Tensor, window: Window,
                        dtype: torch.dtype) -> Tensor:
    """sum_k T[a_k, partner] w_k of unwindowed codes; exact if `dtype` is `accumulate.exact_dtype`'s.

    Every weight meets one value in 0..255, as without a window: the same bound holds.
    """
    return windowed_sum(layer, codes, integers.to(codes.device, dtype), window)
