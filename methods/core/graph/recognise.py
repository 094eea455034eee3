"""Which operation of the table a call is, looking at its arguments: whatever does not fit is a barrier."""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import operations
from .nodes import Node

NEAREST = ("nearest", "nearest-exact")
SPLITS = ("chunk", "split", "tensor_split", "unbind")  # they return tuples: only an item of one is a value
PROBE = (2, 3, 4, 5)  # a shape without equal sides


@dataclass(frozen=True)
class Call:
    """What is called, with the arguments that fx recorded.

    operands  names of the nodes among the arguments, in order
    whole     the value is what the call returns, not an item of it
    plain     no argument has to be computed first
    """

    target: Any
    args: tuple
    kwargs: dict
    operands: list[str]
    whole: bool
    plain: bool

    def given(self, *names: str) -> dict[str, Any] | None:
        """The arguments after the tensor, by name; None where there are others."""
        if len(self.args) > len(names) + 1:
            return None
        found = dict(zip(names, self.args[1:], strict=False)) | self.kwargs
        return found if set(found) <= set(names) else None


def operation_of(target: Any) -> operations.Operation | None:
    return operations.of_module(target) if isinstance(target, nn.Module) else operations.of_call(target)


def may_return_tuple(target: Any) -> bool:
    found = operation_of(target)
    return found is None or found.name in ("view", "maxpool")


def is_item(target: Any, args: tuple) -> bool:
    """Whether a call takes one item of a tuple, or of a dictionary."""
    return target is operator.getitem and isinstance(args[1], (int, str))


def refined(node: Node, call: Call) -> Node:
    """`node`, a barrier, as the operation that `call` is, if its arguments allow it."""
    found = operation_of(call.target)
    if found is None:
        return node
    if not call.whole and found.name != "view":  # say, the indices of a max pool
        return node
    return REFINE[found.name](replace(node, op=found.name), call) or node


def _layer(node: Node, call: Call) -> Node | None:
    return replace(node, run=node.module) if call.plain and len(node.inputs) == 1 else None


def _norm(node: Node, call: Call) -> Node | None:
    return _layer(node, call) if node.module.running_var is not None else None


def _add(node: Node, call: Call) -> Node | None:
    plain = call.plain and len(call.args) == 2 and not call.kwargs and len(call.operands) == 2
    return replace(node, inputs=tuple(call.operands), run=torch.add) if plain else None


def _average(node: Node, call: Call) -> Node | None:
    if not call.plain or len(node.inputs) != 1:
        return None
    if isinstance(call.target, nn.Module):
        return replace(node, run=node.module)
    if call.target in (F.avg_pool2d, F.adaptive_avg_pool2d):
        kind = nn.AvgPool2d if call.target is F.avg_pool2d else nn.AdaptiveAvgPool2d
        pool = kind(*call.args[1:], **{key: value for key, value in call.kwargs.items() if key != "input"})
        return replace(node, run=pool, module=pool)
    return node if call.given("dim", "keepdim") is not None else None


def _relu(node: Node, call: Call) -> Node | None:
    return replace(node, run=F.relu, bounds=(0.0, math.inf)) if len(node.inputs) == 1 else None


def _clamp(node: Node, call: Call) -> Node | None:
    found = _bounds(call)
    if found is None or not call.plain or not all(isinstance(end, (int, float)) for end in found):
        return None
    low, high = map(float, found)
    return replace(node, run=lambda x: torch.clamp(x, low, high), bounds=(low, high))


def _bounds(call: Call) -> tuple | None:
    if isinstance(call.target, nn.Module):
        return call.target.min_val, call.target.max_val
    name = call.target if isinstance(call.target, str) else call.target.__name__
    if name == "relu6":
        return 0.0, 6.0
    if name == "hardtanh":
        given = call.given("min_val", "max_val", "inplace")
        return None if given is None else (given.get("min_val", -1.0), given.get("max_val", 1.0))
    names = {"clamp_min": ("min",), "clamp_max": ("max",)}.get(name, ("min", "max"))
    given = call.given(*names)
    if given is None:
        return None
    low, high = given.get("min"), given.get("max")
    return -math.inf if low is None else low, math.inf if high is None else high


def _largest(node: Node, call: Call) -> Node | None:
    asked = getattr(call.target, "return_indices", False) or call.kwargs.get("return_indices", False)
    return _moving(node, call) if call.plain and not asked else None


def _moving(node: Node, call: Call) -> Node | None:
    name = call.target if isinstance(call.target, str) else getattr(call.target, "__name__", "")
    if len(node.inputs) != 1 or call.whole and name in SPLITS:
        return None
    return replace(node, run=node.module) if isinstance(call.target, nn.Module) and call.plain else node


def _flatten(node: Node, call: Call) -> Node | None:
    """A flatten where all dimensions but the first are joined, else a view."""
    if len(node.inputs) != 1 or any(isinstance(arg, torch.dtype) for arg in call.args):
        return None
    probe = torch.empty(PROBE, device="meta")
    try:
        shape = node.run(probe, *[probe] * len(node.shaped_by)).shape
    except (RuntimeError, IndexError, TypeError, ValueError):
        return node if _names_columns(call) else replace(node, op="view")
    if shape == (PROBE[0], math.prod(PROBE[1:])):
        run = node.module if node.module is not None and call.plain else _joined
        return replace(node, run=run, shaped_by=())
    return replace(node, op="view")


def _names_columns(call: Call) -> bool:
    """Whether this is x.view(-1, K) or x.view(n, K): people write K = C H W."""
    sizes = call.args[1:] if len(call.args) != 2 or isinstance(call.args[1], int) else call.args[1]
    return len(sizes) == 2 and isinstance(sizes[1], int) and (sizes[0] == -1 or not isinstance(sizes[0], int))


def _joined(x: Tensor) -> Tensor:
    return x.flatten(1)


def _resize(node: Node, call: Call) -> Node | None:
    given = call.given("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias")
    if isinstance(call.target, nn.Module):
        given = {"mode": call.target.mode}
    return _moving(node, call) if given is not None and given.get("mode", NEAREST[0]) in NEAREST else None


def _pad(node: Node, call: Call) -> Node | None:
    """Padding with 0, or with values that are there."""
    if isinstance(call.target, nn.Module):
        value = getattr(call.target, "value", 0)
    else:
        given = call.given("pad", "mode", "value")
        value = None if given is None else given.get("value") or 0
    return _moving(node, call) if value == 0 else None


def _cat(node: Node, call: Call) -> Node | None:
    parts = call.args[0] if call.args else call.kwargs.get("tensors")
    joined = isinstance(parts, (list, tuple)) and len(parts) == len(call.operands) and call.plain
    if not joined or len(call.args) > 2 or not set(call.kwargs) <= {"tensors", "dim", "axis"}:
        return None
    dim = call.args[1] if len(call.args) > 1 else call.kwargs.get("dim", call.kwargs.get("axis", 0))
    join = torch.stack if call.target is torch.stack else torch.cat
    return replace(node, inputs=tuple(call.operands), run=lambda *tensors: join(tensors, dim))


def _identity(node: Node, call: Call) -> Node | None:
    if len(node.inputs) != 1:
        return None
    return replace(node, run=node.module if node.module is not None else _same)


def _same(x: Tensor) -> Tensor:
    return x


def _real(node: Node, call: Call) -> Node | None:
    return node if call.plain else None  # a constant tensor may differ from place to place


REFINE: dict[str, Callable[[Node, Call], Node | None]] = {
    "conv": _layer, "linear": _layer, "bn": _norm, "add": _add, "avgpool": _average, "relu": _relu, "clamp": _clamp,
    "maxpool": _largest, "flatten": _flatten, "view": _moving, "resize": _resize, "pad": _pad, "cat": _cat,
    "identity": _identity, "squash": _real, "softmax": _real, "curve": _real,
}
