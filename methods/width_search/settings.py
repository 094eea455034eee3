"""The settings of a width search, and of the method that it hands its network to."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .. import data_of, find_method
from ..core.errors import ConfigError
from ..core.settings import check_idle
from ..core.train.recipe import Distill, Recipe
from ..core.train.start import recipes_of
from ..core.typed import check_types
from ..pipeline import Config as PipelineConfig
from .strategies import STRATEGIES

CRITERIA = ("l1", "l2", "fpgm", "taylor", "random")
BITS = range(2, 9)
OWN = "width_search"


@dataclass(frozen=True)
class Inner:
    """The method that compresses the network that was found, and its own Config (None: with its defaults).

    size_ratio  (bytes of its file) / (bytes of all float32 values of the network that is searched); None: the rest of
                the budget says how much it compresses
    """

    method: str = "pipeline"
    config: Any = None
    size_ratio: float | None = None

    def __post_init__(self):
        check_types(self)
        if self.size_ratio is not None and not 0 < self.size_ratio <= 1:
            raise ConfigError(f"inner.size_ratio = {self.size_ratio}: allowed is a number in (0, 1]")
        if self.method == OWN:
            raise ConfigError(f"inner.method = {OWN!r}: allowed is any other method")
        kind = find_method(self.method).Config
        if self.config is None:
            object.__setattr__(self, "config", kind())
        if not isinstance(self.config, kind):
            raise ConfigError(f"inner.config is a {type(self.config).__module__}.{type(self.config).__name__}: needed "
                              f"is that of {self.method}, {{}} for its defaults")

    @classmethod
    def kinds(cls, values: Mapping[str, Any]) -> dict[str, type]:
        """The type of `config` where the method is as in `values`."""
        return {"config": find_method(values["method"]).Config}


@dataclass(frozen=True)
class Config:
    """strategy  "evolutionary", "greedy", "bayes" or "random" (width_search/strategies.py)

    evaluations  networks looked at; `initial` of bayes: spread out first; population of the evolution
    multiple, levels  widths are multiples of so many channels, at most so many of them for each group
    bits         widths of weights in 2..8 among which each layer's is searched, too; (): those of the budget
    activation_bits   of the bit operations that bop_ratio counts
    criterion    which channels stay: "l1", "l2", "fpgm", "taylor" (on `score_batches` training batches) or "random"
    bn_inputs    training inputs that batch norm is re-estimated on before each evaluation
    held_out     examples that an evaluation takes, the first ones (0: all)
    slimmable    recipe of a training of all widths before the search (sandwich rule); None: the weights as they are
    recipe       of the training of what was found; without `distill` in it, logits at temperature 4; None: no training
    """

    strategy: str = "evolutionary"
    evaluations: int = 100
    initial: int = 10
    population: int = 20
    multiple: int = 8
    levels: int = 8
    bits: tuple[int, ...] = ()
    activation_bits: int = 8
    criterion: str = "l1"
    score_batches: int = 8
    bn_inputs: int = 512
    held_out: int = 0
    slimmable: Recipe | None = None
    recipe: Recipe | None = Recipe(epochs=20, lr=0.02, distill=Distill())
    inner: Inner = Inner("pipeline", PipelineConfig(order=("quantize",)))

    def __post_init__(self):
        check_types(self)
        object.__setattr__(self, "bits", tuple(self.bits))
        for name, allowed in (("strategy", STRATEGIES), ("criterion", CRITERIA)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} = {getattr(self, name)!r}: allowed are {', '.join(allowed)}")
        least = {"evaluations": 1, "initial": 1, "population": 1, "multiple": 1, "levels": 2, "score_batches": 1,
                 "bn_inputs": 2, "held_out": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ConfigError(f"{name} = {getattr(self, name)}: allowed is {low} or more")
        wrong = [b for b in self.bits if b not in BITS or self.bits.count(b) > 1]
        if wrong or len(self.bits) == 1:
            raise ConfigError(f"bits = {list(self.bits)}: allowed are two or more different widths in 2..8, or none")
        if not 1 <= self.activation_bits <= 16:
            raise ConfigError(f"activation_bits = {self.activation_bits}: allowed is 1..16")
        if self.recipe is not None and self.recipe.distill is None:
            object.__setattr__(self, "recipe", replace(self.recipe, distill=Distill()))
        check_idle(self)

    def idle(self) -> dict[str, str]:
        chosen, found = f"strategy = {self.strategy!r}", {}
        if self.strategy == "greedy":
            found["evaluations"] = f"{chosen} ends where the budget is met"
        if self.strategy != "bayes":
            found["initial"] = f"{chosen} spreads out none"
        if self.strategy != "evolutionary":
            found["population"] = f"{chosen} has none"
        if self.criterion != "taylor":
            found["score_batches"] = f"criterion = {self.criterion!r} sees no gradients"
        return found

    @property
    def data(self) -> str:
        """What these settings need to see."""
        trains = bool(recipes_of((self.slimmable, self.recipe))) or self.criterion == "taylor"
        trains = trains or data_of(find_method(self.inner.method), self.inner.config) == "train"
        return "train" if trains else "held_out"
