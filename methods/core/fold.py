"""Folding batch norm into the conv or linear before it."""

import copy

import torch
from torch import nn

from .artifact import Topology
from .graph import trace


def fold_batchnorm(model: nn.Module) -> tuple[nn.Module, Topology]:
    """A copy of `model` (eval mode) with every batch norm that directly follows a conv or linear folded in.

    W <- W * gamma / sqrt(var + eps),  b <- (b - mean) * gamma / sqrt(var + eps) + beta, in float64, so that the
    result is the float32 nearest to the exact fold. The topology names what was folded. Zeros stay zeros.
    """
    model = copy.deepcopy(model).cpu().eval()
    graph = trace(model)
    folded = {}
    for node in list(graph):
        norm_name = graph.norm_after(node.name) if node.op in ("conv", "linear") else None
        if norm_name is not None:
            _fold(node.module, graph.nodes[norm_name].module)
            model.set_submodule(norm_name, nn.Identity())
            folded[node.name] = norm_name
    return model, Topology(folded=folded)


@torch.no_grad()
def _fold(layer: nn.Module, norm: nn.Module) -> None:
    ratio = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.affine:
        ratio = ratio * norm.weight.double()
    bias = layer.bias.double() if layer.bias is not None else torch.zeros_like(ratio)
    bias = (bias - norm.running_mean.double()) * ratio
    if norm.affine:
        bias = bias + norm.bias.double()
    scaled = layer.weight.double() * ratio.reshape(-1, *[1] * (layer.weight.ndim - 1))
    layer.weight.copy_(scaled.to(layer.weight.dtype))
    layer.bias = nn.Parameter(bias.to(layer.weight.dtype))
