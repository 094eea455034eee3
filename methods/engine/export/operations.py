"""The operations of a graph in ONNX: one function each, from names of real tensors to the name of the result."""

from collections.abc import Callable

import torch
from torch import nn

from ...core.errors import GraphError
from ...core.graph.graph import Node
from .facts import Facts, shown
from .moves import move
from .pools import average_pool, max_pool
from .writer import Writer

MOVING = ("maxpool", "flatten", "view", "resize", "pad", "identity", "cat")  # codes come out as they went in


Emit = Callable[[Writer, Node, list[str], Facts], str]


def multiply(write: Writer, node: Node, x: str, weight: str, bias: str | None, facts: Facts) -> str:
    """A conv, or a linear whose weight is [in, out]."""
    layer, last = node.module, [] if bias is None else [bias]
    if isinstance(layer, nn.Linear):
        if len(facts.inputs[0]) == 1:
            return write.add("Gemm", x, weight, *last)
        product = write.add("MatMul", x, weight)
        return product if bias is None else write.add("Add", product, bias)
    if not isinstance(layer, nn.Conv2d) or layer.padding_mode != "zeros":
        raise GraphError(f"layer {node.name}: ONNX export knows Conv2d with zero padding and Linear, and no other "
                         f"{type(layer).__name__}")
    return write.add("Conv", x, weight, *last, kernel_shape=list(layer.kernel_size), strides=list(layer.stride),
                     dilations=list(layer.dilation), group=layer.groups, pads=conv_pads(layer))


def conv_pads(layer: nn.Conv2d) -> list[int]:
    """[top, left, bottom, right]; "same" puts the odd pixel at the end, as torch does."""
    if layer.padding == "valid":
        return [0, 0, 0, 0]
    if layer.padding == "same":
        total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [t // 2 for t in total] + [t - t // 2 for t in total]
    return list(layer.padding) * 2


def _float_layer(write: Writer, node: Node, inputs: list[str], facts: Facts) -> str:
    layer = node.module
    weight = layer.weight.T if isinstance(layer, nn.Linear) else layer.weight
    bias = None if layer.bias is None else write.real(layer.bias)
    return multiply(write, node, inputs[0], write.real(weight), bias, facts)


def batch_norm(write: Writer, node: Node, inputs: list[str], facts: Facts | None) -> str:
    norm = node.module
    ones, noughts = torch.ones_like(norm.running_var), torch.zeros_like(norm.running_mean)
    values = (norm.weight if norm.affine else ones, norm.bias if norm.affine else noughts, norm.running_mean,
              norm.running_var)
    return write.add("BatchNormalization", *inputs, *map(write.real, values), epsilon=norm.eps)


def _clamp(write: Writer, node: Node, inputs: list[str], facts: Facts) -> str:
    return write.add("Clip", *inputs, *(write.real(torch.tensor(end)) for end in node.bounds))


def _concat(write: Writer, node: Node, inputs: list[str], facts: Facts) -> str:
    """Along the one dimension in which the output is as long as all inputs together."""
    ranks = {len(shape) for shape in (*facts.inputs, facts.output)}
    axes = [i for i in range(len(facts.output)) if len(ranks) == 1
            and facts.output[i] == sum(shape[i] for shape in facts.inputs)]
    if not axes:
        raise GraphError(f"ONNX export knows concatenations of parts of an input: {node.name} makes "
                         f"{shown(facts.output)} of {shown(*facts.inputs)}")
    return write.add("Concat", *inputs, axis=axes[0] + 1)


EMITTERS: dict[str, Emit] = {
    "conv": _float_layer, "linear": _float_layer, "bn": batch_norm, "maxpool": max_pool, "avgpool": average_pool,
    "relu": lambda write, node, inputs, facts: write.add("Relu", *inputs),
    "clamp": _clamp,
    "identity": lambda write, node, inputs, facts: inputs[0],
    "flatten": move, "view": move, "resize": move, "pad": move, "cat": _concat,
    "add": lambda write, node, inputs, facts: write.add("Add", *inputs),
}


def has(node: Node) -> bool:
    return node.op in EMITTERS


def without_form(node: Node) -> str:
    kind = node.op if node.op != "barrier" or node.module is None else type(node.module).__name__
    return f"ONNX export has no form for the operation {node.name!r} ({kind})"


def find(node: Node) -> Emit:
    """The function for a node; GraphError, naming it, if there is none."""
    if not has(node):
        raise GraphError(without_form(node))
    return EMITTERS[node.op]
