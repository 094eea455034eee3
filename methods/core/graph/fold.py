"""Folding batch norm into the conv or linear before it: in float weights, or exactly in a grid's scale."""

import copy
from collections.abc import Container, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..artifact import Affine, CompressedTensor, Topology
from ..errors import CompressError
from .build import second_names
from .graph import trace


def fold_batchnorm(model: nn.Module, only: Container[str] | None = None) -> tuple[nn.Module, Topology]:
    """A copy of `model` (CPU, eval mode) with every batch norm that directly follows a conv or linear folded in.

    only  the layers to fold into; None: all
    W <- W * gamma / sqrt(var + eps),  b <- (b - mean) * gamma / sqrt(var + eps) + beta, in float64, so that the
    result is the float32 nearest to the exact fold. The topology names what was folded. Zeros stay zeros.
    """
    model = copy.deepcopy(model).cpu().eval()
    folded = {layer: norm for layer, norm in norms_after(model).items() if only is None or layer in only}
    for layer, norm in folded.items():
        _fold(model.get_submodule(layer), model.get_submodule(norm))
        model.set_submodule(norm, nn.Identity())
    return model, Topology(folded=folded)


def fold_codes(model: nn.Module, weights: Mapping[str, CompressedTensor]
               ) -> tuple[nn.Module, dict[str, CompressedTensor], Topology]:
    """The same for layers that are quantized already: the codes stay, the scale of each channel takes the factor.

    A channel whose factor is negative has its codes mirrored, one whose factor is 0 is pruned. Returns the folded
    copy of `model`, the folded tensors (Affine grids only) and the topology. Layers without codes keep theirs.
    """
    ratios = {layer: norm_ratio(model.get_submodule(norm)) for layer, norm in norms_after(model).items()}
    module, topology = fold_batchnorm(model, weights)
    return module, {name: scale_channels(tensor, ratios[name]) if name in ratios else tensor
                    for name, tensor in weights.items()}, topology


def norms_after(model: nn.Module) -> dict[str, str]:
    """{conv or linear: the batch norm that directly follows it}; a batch norm of two names cannot be taken out."""
    graph, twice = trace(model), set(second_names(model).values())
    found = {node.name: graph.norm_after(node.name) for node in graph.layers()}
    return {layer: norm for layer, norm in found.items() if norm is not None and graph.nodes[norm].module not in twice}


def norm_ratio(norm: nn.Module) -> Tensor:
    """float64 [C] factor gamma / sqrt(var + eps) of a batch norm in eval mode."""
    ratio = (norm.running_var.detach().cpu().double() + norm.eps).rsqrt()
    return ratio * norm.weight.detach().cpu().double() if norm.affine else ratio


def scale_channels(tensor: CompressedTensor, factor: Tensor) -> CompressedTensor:
    """The compressed tensor whose decoded value is decode() * factor [C_out], on an Affine grid per channel."""
    grid = tensor.grid
    if not isinstance(grid, Affine):
        raise CompressError(f"a batch norm folds exactly into an Affine grid only, not into {type(grid).__name__}")
    channels, shape = tensor.codes.shape[0], (-1, *[1] * (tensor.codes.ndim - 1))
    low, high = grid.code_range(tensor.bits)
    middle = 0 if grid.signed else low + high  # mirrored code = middle - code
    scale = (grid.scale.double().expand(channels) * factor.abs()).float()
    flip, dead = factor < 0, scale == 0  # dead: a factor of 0, or one too small for float32
    zero = grid.zero.expand(channels)
    zero = torch.where(flip, middle - zero, zero).to(torch.int32)
    codes = torch.where(flip.reshape(shape), middle - tensor.codes, tensor.codes)
    kept = tensor.mask & ~dead.reshape(shape)
    return CompressedTensor.of(codes, replace(grid, scale=torch.where(dead, 1.0, scale), zero=zero), tensor.bits, kept)


@torch.no_grad()
def _fold(layer: nn.Module, norm: nn.Module) -> None:
    ratio = norm_ratio(norm)
    bias = layer.bias.double() if layer.bias is not None else torch.zeros_like(ratio)
    bias = (bias - norm.running_mean.double()) * ratio
    if norm.affine:
        bias = bias + norm.bias.double()
    scaled = layer.weight.double() * ratio.reshape(-1, *[1] * (layer.weight.ndim - 1))
    layer.weight.copy_(scaled.to(layer.weight.dtype))
    layer.bias = nn.Parameter(bias.to(layer.weight.dtype))
