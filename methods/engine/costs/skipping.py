"""How many multiply-accumulates have two non-zero operands: exact, without a convolution of masks.

For one image, filter k does  eff[k] = sum_{c,r,s} A[c,r,s] Wn[k,c,r,s]  of them, with Wn = 1 where the weight is
not 0 and A[c,r,s] the number of non-zero activations of channel c that tap (r, s) meets over all positions of the
filter. A is one product of a 0/1 matrix [taps, H W] (which positions a tap visits) with the activations' mask
[H W, images x channels]; all numbers are integers far below 2^53, so float64 is exact.

Hardware that works on G filters at a time waits for the slowest of them after each image: its time is the sum
over images and groups of G consecutive filters of max(eff), where a dense machine takes ceil(filters / G) x MACs
of a filter. The ideal is the mean.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...core.errors import ConfigError
from ..exact import IntegerNetwork
from .shapes import leading_padding

DEFAULT_LANES = 16


@dataclass(frozen=True)
class Skips:
    """Multiply-accumulates of one layer, summed over images.

    macs         all, those on padding included
    activations  with a non-zero activation;  weights  with a non-zero weight;  both  with both
    lane_steps   of hardware that skips both with G lanes;  dense_lane_steps  of G lanes that skip nothing
    """

    macs: int
    activations: int
    weights: int
    both: int
    lane_steps: int
    dense_lane_steps: int

    def __add__(self, other: "Skips") -> "Skips":
        return Skips(*(getattr(self, field) + getattr(other, field) for field in self.__dataclass_fields__))


NOTHING = Skips(0, 0, 0, 0, 0, 0)


def count_layer(layer: nn.Module, activations: Tensor, weights: Tensor, output_size: tuple[int, ...],
                lanes: int = DEFAULT_LANES) -> Skips:
    """Skips of a Conv2d or Linear.

    activations  integers, 0 = the real 0, [N, C, H, W] or [N, F];  weights  integers, as the layer's
    output_size  (H_out, W_out); () for a linear layer
    """
    if lanes < 1:
        raise ConfigError(f"lanes = {lanes}: a machine has 1 or more")
    met = _met(layer, (activations != 0).double(), output_size)  # [N, groups, taps of a filter]
    groups, filters, positions = met.shape[1], weights.shape[0], int(torch.Size(output_size).numel())
    kept = (weights != 0).double().reshape(groups, filters // groups, -1)
    effective = torch.einsum("ngt,gkt->ngk", met, kept).flatten(1)  # [N, filters]
    slowest = sum(part.amax(1).sum() for part in effective.split(lanes, 1))
    images, taps = len(met), met.shape[2]
    return Skips(
        macs=images * positions * filters * taps, activations=int(met.sum()) * (filters // groups),
        weights=images * positions * int(kept.sum()), both=int(effective.sum()), lane_steps=int(slowest),
        dense_lane_steps=images * -(-filters // lanes) * positions * taps)


def _met(layer: nn.Module, mask: Tensor, output_size: tuple[int, ...]) -> Tensor:
    """[N, groups, C/groups x K_h x K_w]: non-zero activations that each tap meets."""
    if isinstance(layer, nn.Linear) and mask.ndim == 2:
        return mask[:, None, :]
    if not isinstance(layer, nn.Conv2d) or layer.padding_mode != "zeros":
        raise ConfigError(f"cannot count the work of {layer} on {list(mask.shape)}: allowed are a Linear on [N, F] "
                          "and a Conv2d that pads with zeros")
    rows, columns = (visits(*geometry) for geometry in zip(
        mask.shape[-2:], output_size, layer.kernel_size, layer.stride, leading_padding(layer), layer.dilation,
        strict=True))
    taps = torch.einsum("rh,sw->rshw", rows, columns).reshape(len(rows) * len(columns), -1).to(mask.device)
    return (mask.flatten(2) @ taps.T).reshape(len(mask), layer.groups, -1)


def visits(size: int, out: int, kernel: int, stride: int, padding: int, dilation: int) -> Tensor:
    """float64 [kernel, size]: 1 where tap i meets position j of a line, that is j = stride o - padding + dilation i."""
    met = torch.zeros(kernel, size, dtype=torch.float64)
    for tap in range(kernel):
        places = stride * torch.arange(out) - padding + dilation * tap
        met[tap, places[(places >= 0) & (places < size)]] = 1
    return met


def count_network(network: IntegerNetwork, batches: Iterable[Tensor], lanes: int = DEFAULT_LANES) -> dict[str, Skips]:
    """{layer: Skips} of every integer layer over batches of real inputs; layers that run in float are left out."""
    counts: dict[str, Skips] = {}

    def see(layer, codes, accumulators):
        name = layer.node.name
        skips = count_layer(layer.node.module, codes - layer.source.zero, layer.weight.integers.to(codes.device),
                            tuple(accumulators.shape[2:]), lanes)
        counts[name] = counts.get(name, NOTHING) + skips

    before, network.see = network.see, see
    try:
        for batch in batches:
            network(batch)
    finally:
        network.see = before
    return counts
