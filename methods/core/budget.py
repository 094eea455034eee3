"""The budget: how small the result has to be, in the unit of the paper at hand."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

from .errors import BudgetError

PerLayer = float | Mapping[str, float]


@dataclass(frozen=True)
class Budget:
    """Limits that a compressed model has to meet; a field that is None is not limited.

    density          kept fraction of the weights, in (0, 1]; a number, or {layer: number}
    channel_density  kept fraction of the output channels, in (0, 1]; a number, or {layer: number}
    bits             code width of a kept weight, 1..16; a number, or {layer: number}
    data_ratio       (bits of kept codes) / (32 bits x number of weights), in (0, 1]: ANNC's budget
    size_ratio       (bytes of the file) / (bytes of the float32 weights), in (0, 1]
    """

    density: PerLayer | None = None
    channel_density: PerLayer | None = None
    bits: PerLayer | None = None
    data_ratio: float | None = None
    size_ratio: float | None = None

    def __post_init__(self):
        for name in ("density", "channel_density", "data_ratio", "size_ratio"):
            self._check(name, lambda v: 0.0 < v <= 1.0, "a number in (0, 1]")
        self._check("bits", lambda v: float(v).is_integer() and 1 <= v <= 16, "a whole number of bits in 1..16")

    def _check(self, name: str, good, allowed: str) -> None:
        given = getattr(self, name)
        if isinstance(given, Mapping) and name in ("data_ratio", "size_ratio"):
            raise BudgetError(f"budget {name} = {given!r}: allowed is one number for the whole network")
        values = given.items() if isinstance(given, Mapping) else [(None, given)] if given is not None else []
        for layer, value in values:
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (number and good(value)):
                where = f"{name}[{layer!r}]" if layer is not None else name
                raise BudgetError(f"budget {where} = {value!r}: allowed is {allowed}")

    def require(self, method: str, *needed: str, optional: tuple[str, ...] = ()) -> None:
        """Refuse a budget that lacks a field in `needed` or sets one in neither `needed` nor `optional`."""
        taken = ", ".join(needed + optional) if needed + optional else "none"
        for field in fields(self):
            given = getattr(self, field.name) is not None
            if given and field.name not in needed + optional:
                raise BudgetError(f"{method} cannot honour the budget field {field.name!r}; it takes: {taken}")
            if not given and field.name in needed:
                raise BudgetError(f"{method} needs the budget field {field.name!r}; it takes: {taken}")

    def per_layer(self, name: str, layers: Iterable[str]) -> dict[str, float]:
        """The field `name` spelled out for each of `layers`; a mapping must name every layer and no other."""
        given, layers = getattr(self, name), list(layers)
        if not layers:
            raise BudgetError(f"budget {name} has nothing to act on: the network has no Conv2d and no Linear layer")
        if not isinstance(given, Mapping):
            return dict.fromkeys(layers, given)
        unknown, missing = sorted(set(given) - set(layers)), sorted(set(layers) - set(given))
        if unknown or missing:
            fault = f"names unknown layers {unknown}" if unknown else f"misses the layers {missing}"
            raise BudgetError(f"budget {name} {fault}; the network has: {', '.join(layers)}")
        return {layer: given[layer] for layer in layers}
