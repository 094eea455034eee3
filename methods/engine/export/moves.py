"""What puts values elsewhere, in ONNX: views, permutations, nearest resizing, padding.

Where each value goes is read off the operation itself, which is run on the numbers 1, 2, 3...
"""

import itertools
import math

import torch
from torch import Tensor

from ...core.errors import GraphError
from ...core.graph.graph import Node
from .facts import BATCH, Facts, int64, shown
from .writer import Writer


def move(write: Writer, node: Node, inputs: list[str], facts: Facts) -> str:
    """GraphError where it is no reshape, permutation, padding with 0 or choice along dimensions."""
    index, (x,) = _index(node, facts), inputs
    whole = torch.arange(math.prod(facts.inputs[0])).reshape(facts.inputs[0])
    if torch.equal(index, whole):
        return x
    if torch.equal(index.flatten(), whole.flatten()):
        return write.add("Reshape", x, write.constant(int64([0, *facts.output])))
    if index.ndim == whole.ndim:
        for found in (_transposed, _padded, _chosen):
            y = found(write, x, index, whole, facts)
            if y is not None:
                return y
    raise GraphError(f"ONNX export knows reshapes, permutations, padding with 0 and choices along dimensions: "
                     f"{node.name} makes {shown(facts.output)} of {shown(facts.inputs[0])} and is none of them")


def _index(node: Node, facts: Facts) -> Tensor:
    """For each place of the output the place in the flattened input, -1 where a 0 is put."""
    many = math.prod(facts.inputs[0])
    places = facts.run(torch.arange(1.0, BATCH * many + 1, dtype=torch.float64).reshape(BATCH, *facts.inputs[0]))
    first, second = places.long()
    if not torch.equal(second, torch.where(first > 0, first + many, 0)) or int(first.max()) > many:
        raise GraphError(f"{node.name} moves values from one input of a batch to another: ONNX export knows values "
                         "whose first dimension is the batch")
    return first - 1


def _transposed(write: Writer, x: str, index: Tensor, whole: Tensor, facts: Facts) -> str | None:
    for order in itertools.permutations(range(whole.ndim)):
        if torch.equal(whole.permute(order), index):
            return write.add("Transpose", x, perm=[0, *(axis + 1 for axis in order)])
    return None


def _padded(write: Writer, x: str, index: Tensor, whole: Tensor, facts: Facts) -> str | None:
    kept = (index >= 0).nonzero()
    if not len(kept) or len(kept) == index.numel():
        return None
    before, last = kept.amin(0).tolist(), kept.amax(0).tolist()
    box = tuple(slice(low, high + 1) for low, high in zip(before, last, strict=True))
    if not torch.equal(index[box], whole):
        return None
    after = [size - high - 1 for size, high in zip(index.shape, last, strict=True)]
    return write.add("Pad", x, write.constant(int64([0, *before, 0, *after])), write.real(torch.tensor(facts.zero)))


def _chosen(write: Writer, x: str, index: Tensor, whole: Tensor, facts: Facts) -> str | None:
    """Each dimension on its own: a repetition of its pixels, or any choice among its places."""
    if bool((index < 0).any()):
        return None
    chosen = []
    for axis, coordinate in enumerate(torch.unravel_index(index, whole.shape)):
        one = coordinate[tuple(slice(None) if i == axis else slice(1) for i in range(index.ndim))]
        if not torch.equal(one.expand_as(coordinate), coordinate):
            return None
        chosen.append(one.flatten().tolist())
    factors = [len(places) // size for places, size in zip(chosen, whole.shape, strict=True)]
    repeats = [[place // factor for place in range(size * factor)]
               for factor, size in zip(factors, whole.shape, strict=True)]
    if chosen == repeats and whole.ndim == 3 and factors[0] == 1:
        return write.add("Resize", x, "", write.real(torch.tensor([1.0, *factors])), mode="nearest",
                         coordinate_transformation_mode="asymmetric", nearest_mode="floor")
    for axis, (places, size) in enumerate(zip(chosen, whole.shape, strict=True)):
        if places != list(range(size)):
            x = write.add("Gather", x, write.constant(int64(places)), axis=axis + 1)
    return x
