"""torch.fx, made to take networks as people write them.

Optional arguments of forward keep their defaults; an assertion, or a condition one of whose branches only raises,
is taken to hold; a module that cannot be traced is called as a whole, and the network around it is traced on.
"""

import dis
import functools
import inspect
import operator
from collections.abc import Callable

from torch import fx, nn

from ..errors import GraphError
from . import operations

IN_PLACE = {"__iadd__": operator.iadd, "__isub__": operator.isub, "__imul__": operator.imul,
            "__itruediv__": operator.itruediv}


class _Proxy(fx.Proxy):
    """Records x += y as such, where fx would record x + y."""


def _in_place(function: Callable, name: str) -> Callable:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {}, name=name)


for _method, _function in IN_PLACE.items():
    setattr(_Proxy, _method, _in_place(_function, _function.__name__[1:]))


class Tracer(fx.Tracer):
    """opaque: {path: why} of the modules that are called as a whole because fx cannot trace them."""

    def __init__(self):
        super().__init__(param_shapes_constant=True)
        self.opaque: dict[str, str] = {}

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return operations.of_module(m) is not None or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m, forward, args, kwargs):
        last, stack = self._last(), dict(self.module_stack)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:  # noqa: BLE001 - fx raises many types; all mean that this module is one operation
            path = self.path_of_module(m)
            self.opaque[path] = f"{type(m).__name__}, {reason(error)}"
            self.module_stack.clear()
            self.module_stack.update(stack)
            while self._last() is not last:
                self.graph.erase_node(self._last())
            return self.create_proxy("call_module", path, args, kwargs)

    def _last(self) -> fx.Node:
        return self.graph._root._prev

    def to_bool(self, obj: fx.Proxy) -> bool:
        frame = inspect.currentframe().f_back.f_back  # Proxy.__bool__, and who called it
        answer = _wanted(frame.f_code, frame.f_lasti)
        return super().to_bool(obj) if answer is None else answer

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        """One placeholder for the input; whatever has a default is left out."""
        found = list(inspect.signature(self.root.forward).parameters.values())
        needed = [p for p in found if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        named = [p.name for p in found if p.default is p.empty and p.kind is p.KEYWORD_ONLY]
        if not needed:  # forward(*args), or an input with a default
            needed = [p for p in found if p.kind not in (p.KEYWORD_ONLY, p.VAR_KEYWORD)][:1]
        if len(needed) + len(named) != 1:
            raise GraphError(f"a network takes exactly one input tensor here; forward of {type(self.root).__name__} "
                             f"takes {', '.join(p.name for p in needed) or 'none'}")
        function = root_fn
        proxies = [self.create_proxy("placeholder", p.name, (), {}) for p in needed]
        if named:
            function = functools.partial(function, **{named[0]: self.create_proxy("placeholder", named[0], (), {})})
        return function, [self.root, *proxies]


def reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _wanted(code, at: int) -> bool | None:
    """What the condition at instruction `at` of `code` has to be, so that nothing is raised; None if both may be."""
    found = [one for one in dis.get_instructions(code) if one.opname != "CACHE"]
    here = next(i for i, one in enumerate(found) if one.offset >= at)
    while here < len(found) and found[here].opname in ("TO_BOOL", "COMPARE_OP"):
        here += 1
    jump = found[here] if here < len(found) else None
    if jump is None or "JUMP" not in jump.opname or not jump.opname.endswith(("TRUE", "FALSE")):
        return None
    jumps_if = jump.opname.endswith("TRUE")
    falls, jumps = _raises(found, here + 1), _raises(found, _index(found, jump.argval))
    if falls == jumps:
        return None
    return jumps_if if falls else not jumps_if


def _index(found: list[dis.Instruction], offset: int) -> int:
    return next((i for i, one in enumerate(found) if one.offset >= offset), len(found))


def _raises(found: list[dis.Instruction], start: int) -> bool:
    """Whether the instructions from `start` on raise before they branch or return."""
    for one in found[start:]:
        if one.opname == "RAISE_VARARGS":
            return True
        if "JUMP" in one.opname or one.opname.startswith(("RETURN", "FOR_ITER", "SEND")):
            return False
    return False
