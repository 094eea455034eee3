"""Pools and means in ONNX."""

import torch
from torch import nn

from ...core.errors import GraphError
from ...core.graph.graph import Node
from .facts import Facts, int64, pair, shown
from .writer import Writer


def _pictures(node: Node, facts: Facts) -> None:
    if len(facts.inputs[0]) != 3:
        raise GraphError(f"{node.name} pools inputs of {shown(facts.inputs[0])}: ONNX export knows pools over "
                         "[channels, height, width]")


def max_pool(write: Writer, node: Node, inputs: list[str], facts: Facts) -> str:
    pool = node.module
    _pictures(node, facts)
    if pool is None:
        raise GraphError(f"{node.name} is a max pool called as a function: use nn.MaxPool2d to export it")
    stride = pool.kernel_size if pool.stride is None else pool.stride
    return write.add("MaxPool", *inputs, kernel_shape=pair(pool.kernel_size), strides=pair(stride),
                     pads=pair(pool.padding) * 2, dilations=pair(pool.dilation), ceil_mode=int(pool.ceil_mode))


def average_pool(write: Writer, node: Node, inputs: list[str], facts: Facts) -> str:
    pool = node.module
    if pool is None:
        return _mean(write, node, inputs, facts)
    _pictures(node, facts)
    if isinstance(pool, nn.AdaptiveAvgPool2d):
        (height, width), (rows, columns) = facts.inputs[0][-2:], facts.output[-2:]
        if (rows, columns) == (1, 1):
            return write.add("GlobalAveragePool", *inputs)
        if height % rows or width % columns:
            raise GraphError(f"{node.name} averages {height} x {width} into {rows} x {columns} windows of several "
                             "sizes: ONNX has no operation for that")
        sides = [height // rows, width // columns]
        return write.add("AveragePool", *inputs, kernel_shape=sides, strides=sides)
    if pool.divisor_override is not None:
        raise GraphError(f"{node.name} has a divisor of its own: ONNX has no operation for that")
    stride = pair(pool.kernel_size if pool.stride is None else pool.stride)
    sides, padding, counted = pair(pool.kernel_size), pair(pool.padding), pool.count_include_pad
    size = zip(facts.inputs[0][1:], facts.output[1:], sides, stride, padding, strict=True)
    beyond = [max((many - 1) * step + side - (whole + 2 * pad), 0) for whole, many, side, step, pad in size]
    if any(beyond) and any(padding) and counted:  # zeros count, what a ceil goes beyond does not
        ends = write.constant(int64([0, 0, *padding] * 2)), write.real(torch.zeros(()))
        inputs, padding = [write.add("Pad", *inputs, *ends)], [0, 0]
    # without padding ONNX Runtime's integer pool would count what a ceil goes beyond
    return write.add("AveragePool", *inputs, kernel_shape=sides, strides=stride, ceil_mode=0,
                     pads=[*padding, *(pad + over for pad, over in zip(padding, beyond, strict=True))],
                     count_include_pad=int(counted and any(padding)))


def _mean(write: Writer, node: Node, inputs: list[str], facts: Facts) -> str:
    """A mean over whole dimensions."""
    rank = len(facts.inputs[0]) + 1
    axes = sorted({axis % rank for axis in _tuple(facts.called("dim", "keepdim")["dim"])})
    if rank != 4 or axes != [2, 3]:
        given = (int64(axes),) if write.opset >= 18 else ()
        named = {} if given else {"axes": axes}
        return write.add("ReduceMean", *inputs, *map(write.constant, given), **named,
                         keepdims=int(len(facts.output) == len(facts.inputs[0])))
    y = write.add("GlobalAveragePool", *inputs)
    return y if len(facts.output) == 3 else write.add("Reshape", y, write.constant(int64([0, *facts.output])))


def _tuple(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)
