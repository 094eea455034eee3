"""What is stored of a network with gates: its codes, ranges and notes; and how a file comes to fit its limit."""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from ..core.artifact import MAX_BITS, ActivationQuantizer, Affine, CompressedModel, CompressedTensor, Topology
from ..core.errors import BudgetError
from ..core.file.storage import file_bytes
from ..core.fit.size import any_ranges
from ..core.fit.trim import Change, trimmed
from ..core.graph.build import assemble
from ..core.graph.graph import trace
from ..core.graph.shrink import shrink
from .gated import step_size, to_codes
from .network import GatedNetwork, fix_gates
from .steering import Steering

INPUT_BITS = 8  # of the network's input, and of ranges that are calibrated when the model is stored
MOST_TRIMMED = 0.5  # of the weights that are kept, where the file is larger than it may be


def weigh(network: GatedNetwork, skeleton: nn.Module, weights: bool = True) -> int:
    """Bytes of the file with the gates as they are, with ranges for its activations; without `weights`, of zeros."""
    fixed, topology = fix_gates(network)
    for layer in () if weights else fixed.wiring.macs:
        fixed.network.get_submodule(layer).weight.detach().zero_()
    made = store_weights(fixed.cpu(), topology)
    return file_bytes(shrink(replace(made, activations=any_ranges(trace(skeleton), INPUT_BITS)), skeleton))


def fitted(compressed: CompressedModel, steering: Steering, correct: Change) -> CompressedModel:
    """`compressed` without as few of its least weights as it takes to fit, corrected for them; BudgetError where it
    would lose most."""
    size, less, limit = file_bytes(compressed), 0.0, steering.limit
    if size > limit:
        compressed, size, less = trimmed(compressed, limit, MOST_TRIMMED, correct=correct)
    if size > limit:
        raise BudgetError(f"no file of at most {limit:,} bytes came out of the training; without {MOST_TRIMMED:.0%} of "
                          f"its weights it takes {size:,}: allowed are more epochs, a higher gate_lr or larger files")
    said = {"knob": "config.mu", "value": steering.mu, "limit": limit, "bytes": size, "trimmed": less}
    return replace(compressed, notes={**compressed.notes, "size": said})


@torch.no_grad()
def store_weights(fixed: GatedNetwork, topology: Topology) -> CompressedModel:
    """Codes of every weight of up to 16 bits; one of 32 bits stays float, clipped and pruned."""
    weights = {}
    for point, beta in zip(fixed.points, fixed.beta, strict=True):
        if not point.weight:
            continue
        layer = fixed.network.get_submodule(point.name)
        kept = fixed.masks.get(point.name, torch.ones(len(layer.weight), dtype=torch.bool)).cpu()
        mask = kept.reshape(-1, *[1] * (layer.weight.ndim - 1)).expand(layer.weight.shape)
        if point.bits <= MAX_BITS:
            step = step_size(beta, point.signed, point.bits)
            codes = to_codes(layer.weight, beta, point.signed, point.bits)
            grid = Affine(step, torch.zeros((), dtype=torch.int32), point.signed)
            weights[point.name] = CompressedTensor.of(codes, grid, point.bits, mask)
        else:
            layer.weight.copy_(layer.weight.clamp(-beta if point.signed else torch.zeros_like(beta), beta) * mask)
    return assemble(fixed.network, weights, topology=topology)


def store_activations(fixed: GatedNetwork, coded: list[str], others: Mapping[str, ActivationQuantizer]
                      ) -> dict[str, ActivationQuantizer]:
    """{edge: quantizer}: that of the tensor it reads, or that of `others`; `coded` are the layers with codes."""
    found = {}
    for edge, (name, n) in fixed.wiring.sources.items():
        i = fixed.at.get((False, name))
        if i is None:
            found |= {edge: others[edge]} if edge in others else {}
        elif fixed.points[i].bits <= MAX_BITS or edge in coded:
            point, bits = fixed.points[i], min(fixed.points[i].bits, MAX_BITS)
            needed = math.ceil(math.log2(n))  # a mean of n codes is a code on a grid n times as fine
            more = min(needed, MAX_BITS - bits)
            step = step_size(fixed.beta.detach()[i], point.signed, bits) * (2.0 ** (needed - more) / n)
            found[edge] = ActivationQuantizer(float(step), 0, bits + more, point.signed)
    return found


def describe(fixed: GatedNetwork, compressed: CompressedModel, bops: list[float]) -> dict:
    """Facts for a reader: widths, kept channels, layers of zeros, what stayed at 32 bits, relative BOPs by epoch."""
    decoded = compressed.state_dict()
    weights, activations = ({p.name: p.bits for p in fixed.points if p.weight is kind} for kind in (True, False))
    return {"weight_bits": weights, "activation_bits": activations,
            "kept_channels": {name: int(mask.sum()) for name, mask in fixed.masks.items()},
            "empty_layers": [name for name in weights if not decoded[f"{name}.weight"].any()],
            "float_weights": [name for name, bits in weights.items() if bits > MAX_BITS],
            "float_activations": [name for name, bits in activations.items() if bits > MAX_BITS], "bops_percent": bops}
