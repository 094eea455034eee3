"""The budget: how small the result has to be, in the unit of the paper at hand."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace

from .errors import BudgetError

PerLayer = float | Mapping[str, float | None]
OTHERS = "*"  # in a mapping: every layer that it does not name
FLOAT_BITS = 32  # a layer of that many bits is left alone
WEIGHT_FIELDS = ("density", "bits")
RATIOS = ("data_ratio", "size_ratio", "mac_ratio", "bop_ratio")  # of the whole network


@dataclass(frozen=True)
class Budget:
    """Limits that a compressed model has to meet; a field that is None is not limited.

    density          kept fraction of the weights, in (0, 1]; a number, or {layer: number}
    channel_density  kept fraction of the output channels, in (0, 1]; a number, or {layer: number}
    bits             code width of a kept weight, 1..16; a number, or {layer: number}, where 32 is float32
    data_ratio       (bits of kept codes) / (32 bits x number of weights), in (0, 1]: ANNC's budget
    size_ratio       (bytes of the file) / (bytes of all float32 values of the network), in (0, 1]; taken by every
                     method through `compress_to_size`, which turns the knob that the method names
    mac_ratio        (multiply-accumulates) / (those of the network), in (0, 1]: of networks that lose channels
    bop_ratio        (multiply-accumulates x bits of weights x bits of inputs) / (those of the network at 32 x 32 bits)

    In a mapping "*" stands for every layer it does not name. A layer that a mapping of density or bits leaves out, or
    gives None (bits: or 32), is left alone: neither pruned nor quantized, whatever the other field says.

    >>> Budget(density={"*": 0.1, "fc": None}, bits=4).per_layer("bits", ["conv1", "conv2", "fc"])
    {'conv1': 4, 'conv2': 4}
    """

    density: PerLayer | None = None
    channel_density: PerLayer | None = None
    bits: PerLayer | None = None
    data_ratio: float | None = None
    size_ratio: float | None = None
    mac_ratio: float | None = None
    bop_ratio: float | None = None

    def __post_init__(self):
        for name in ("density", "channel_density", *RATIOS):
            self._check(name, lambda v: 0.0 < v <= 1.0, "a number in (0, 1]")
        self._check("bits", lambda v: float(v).is_integer() and 1 <= v <= 16, "a whole number of bits in 1..16")

    def _check(self, name: str, good: Callable[[float], bool], allowed: str) -> None:
        given = getattr(self, name)
        if isinstance(given, Mapping) and name in RATIOS:
            raise BudgetError(f"budget {name} = {given!r}: allowed is one number for the whole network")
        values = given.items() if isinstance(given, Mapping) else [(None, given)] if given is not None else []
        for layer, value in values:
            if layer is not None and (value is None or (name == "bits" and value == FLOAT_BITS)):
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (number and good(value)):
                where = f"{name}[{layer!r}]" if layer is not None else name
                raise BudgetError(f"budget {where} = {value!r}: allowed is {allowed}")

    def require(self, method: str, *needed: str, optional: tuple[str, ...] = ()) -> None:
        """Refuse a budget that lacks a field in `needed` or sets one in neither `needed` nor `optional`.

        A size_ratio that is not taken comes first, with the way in that every method has.
        """
        taken = ", ".join(needed + optional) if needed + optional else "none"
        if self.size_ratio is not None and "size_ratio" not in needed + optional:
            raise BudgetError(f"{method} cannot honour the budget field 'size_ratio' (compress_to_size({method}, "
                              f"model, task, budget, config, generator) can); it takes: {taken}")
        for field in fields(self):
            given = getattr(self, field.name) is not None
            if given and field.name not in needed + optional:
                raise BudgetError(f"{method} cannot honour the budget field {field.name!r}; it takes: {taken}")
            if not given and field.name in needed:
                raise BudgetError(f"{method} needs the budget field {field.name!r}; it takes: {taken}")

    def per_layer(self, name: str, layers: Iterable[str]) -> dict[str, float]:
        """{layer: value of the field `name`} for those of `layers` that are not left alone, in their order.

        BudgetError for a name that is no layer's, and where every layer is left alone.
        """
        layers = list(layers)
        if not layers:
            raise BudgetError(f"budget {name} has nothing to act on: the network has no Conv2d and no Linear layer")
        fields = WEIGHT_FIELDS if name in WEIGHT_FIELDS else (name,)
        spread = {field: self._spread(field, layers) for field in {*fields, name}}
        alone = {layer for field, values in spread.items() if isinstance(getattr(self, field), Mapping)
                 for layer, value in values.items() if value is None}
        if len(alone) == len(layers):
            raise BudgetError(f"budget {name} leaves every layer alone: {', '.join(layers)}")
        return {layer: spread[name][layer] for layer in layers if layer not in alone}

    def _spread(self, name: str, layers: list[str]) -> dict[str, float | None]:
        given = getattr(self, name)
        if not isinstance(given, Mapping):
            return dict.fromkeys(layers, given)
        unknown = sorted(set(given) - {*layers, OTHERS})
        if unknown:
            raise BudgetError(f"budget {name} names unknown layers {unknown}; the network has: {', '.join(layers)}")
        found = {layer: given.get(layer, given.get(OTHERS)) for layer in layers}
        return {layer: None if value == FLOAT_BITS else value for layer, value in found.items()}

    def every_layer(self, name: str, layers: Iterable[str], method: str) -> dict[str, float]:
        """As `per_layer`, for a method that works on all layers together: BudgetError where one is left alone."""
        layers = list(layers)
        found = self.per_layer(name, layers)
        alone = [layer for layer in layers if layer not in found]
        if alone:
            raise BudgetError(f"{method} works on all layers together: it cannot leave {', '.join(alone)} alone; "
                              f"give budget {name} a number for each")
        return found

    def leaving(self, layers: Iterable[str]) -> "Budget":
        """The budget with `layers` left alone, such as `frozen_layers(model)`; BudgetError without density and bits.

        >>> Budget(density=0.1).leaving(["fc"])
        Budget(density={'*': 0.1, 'fc': None}, channel_density=None, bits=None, data_ratio=None, size_ratio=None, \
mac_ratio=None, bop_ratio=None)
        """
        given = {name: getattr(self, name) for name in WEIGHT_FIELDS if getattr(self, name) is not None}
        if not given:
            raise BudgetError("a budget without density and bits has no layers to leave alone")
        alone = dict.fromkeys(layers)
        return replace(self, **{name: {**(value if isinstance(value, Mapping) else {OTHERS: value}), **alone}
                                for name, value in given.items()})
