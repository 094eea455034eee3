"""Pools and means in ONNX."""

import torch
from torch import nn

from ...core.errors import GraphError
from ...core.graph.graph import Node
from .facts import Facts, int64, pair, shown
from .writer import Writer

MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)


def _pictures(node: Node, facts: Facts, sides: int = 2) -> None:
    """GraphError where a pool over so many sides does not read the channels of a batch."""
    if len(facts.inputs[0]) != sides + 1:
        needed = ", ".join(["channels", "depth", "height", "width"] if sides == 3 else
                           ["channels", "height", "width"][:sides + 1])
        raise GraphError(f"{node.name} pools inputs of {shown(facts.inputs[0])}: ONNX export knows pools over "
                         f"[{needed}]")


def max_pool(write: Writer, node: Node, inputs: list[str], facts: Facts) -> str:
    pool = node.module if node.module is not None else _pool_of(node, facts)
    if isinstance(pool, nn.AdaptiveMaxPool2d):
        _pictures(node, facts)
        sides = _adaptive(node, facts)
        return write.add("MaxPool", *inputs, kernel_shape=sides, strides=sides) if sides else \
            write.add("GlobalMaxPool", *inputs)
    rank = next(i + 1 for i, kind in enumerate(MAX_POOLS) if isinstance(pool, kind))
    _pictures(node, facts, rank)
    kernel, stride, padding, dilation = (_sides(value, rank) for value in (
        pool.kernel_size, pool.stride or pool.kernel_size, pool.padding, pool.dilation))
    return write.add("MaxPool", *inputs, kernel_shape=kernel, strides=stride, pads=padding * 2, dilations=dilation,
                     ceil_mode=int(pool.ceil_mode))


def _pool_of(node: Node, facts: Facts) -> nn.Module:
    """The module that a max pool called as a function is."""
    name, _, _ = facts.call()
    if "adaptive" in name:
        return nn.AdaptiveMaxPool2d(facts.called("output_size")["output_size"])
    kind = next((kind for kind in MAX_POOLS if kind.__name__.lower() == name.replace("_", "")), None)
    if kind is None:
        raise GraphError(f"{node.name} is the max pool {name}: ONNX export knows max_pool1d, 2d and 3d")
    return kind(**facts.called("kernel_size", "stride", "padding", "dilation", "ceil_mode"))


def _adaptive(node: Node, facts: Facts) -> list[int]:
    """The sides of all windows of an adaptive pool; none where there is one window."""
    (height, width), (rows, columns) = facts.inputs[0][-2:], facts.output[-2:]
    if height % rows or width % columns:
        raise GraphError(f"{node.name} makes {rows} x {columns} of {height} x {width} in windows of several sizes: "
                         "ONNX has no operation for that")
    return [] if (rows, columns) == (1, 1) else [height // rows, width // columns]


def _sides(value: int | tuple[int, ...], rank: int) -> list[int]:
    return [value] * rank if isinstance(value, int) else list(value) * (rank if len(value) == 1 else 1)


def average_pool(write: Writer, node: Node, inputs: list[str], facts: Facts) -> str:
    pool = node.module
    if pool is None:
        return _mean(write, node, inputs, facts)
    _pictures(node, facts)
    if isinstance(pool, nn.AdaptiveAvgPool2d):
        sides = _adaptive(node, facts)
        return write.add("AveragePool", *inputs, kernel_shape=sides, strides=sides) if sides else \
            write.add("GlobalAveragePool", *inputs)
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
