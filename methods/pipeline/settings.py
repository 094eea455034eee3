"""The settings of a pipeline and of its stages; what has no sense is refused as soon as it is said."""

from dataclasses import dataclass, replace

from ..core.errors import ConfigError
from ..core.fit.calibrate import check_calibration
from ..core.fit.criteria import CRITERIA, SCOPES, find_criterion
from ..core.fit.quantize import find_scheme
from ..core.fit.schedules import find_schedule
from ..core.fit.size import Knob
from ..core.fit.weight_quantizers import QUANTIZERS, find_quantizer
from ..core.settings import check_idle
from ..core.train.recipe import Distill, Recipe
from ..core.typed import check_types

FLOAT16 = "float16"
ON_GRIDS = ("rtn", "qat", "lsq", "lsq+")
CONTROLS = ("none", "reinitialised", "shuffled")
OF_BLOCKS = ("one_shot", "geometric")  # schedules
STAGES = ("prune", "quantize", "distil")
SIZED = {"weight": Knob("density", 1e-3, 1.0), "channel": Knob("channel_density", 0.02, 1.0)}


@dataclass(frozen=True)
class Prune:
    """criterion, granularity ("weight", "channel", "block"), schedule: of core/fit; scope: rank per layer or over all.

    floor    share of the density that each layer keeps at least, of scope "global"
    blocks   how many residual blocks go, of granularity "block"
    rates    of layers: "budget", or "sensitivity": of equal drop in the held-out error, together the budget's density
    updates  of the masks (linear, agp), or rounds;  until  share of the training after which masks stay: what goes last
             (of linear most of what is left) needs learning rate to heal, and schedules of rates fall, too
    recipe   of the training while or after pruning, in every round;  before  of a training that precedes one_shot
    rewind   step of the first training to which the lottery goes back;  fresh  it starts from initial weights
    control  of the lottery, for its last training: "none", "reinitialised" (the same masks on other initial weights) or
             "shuffled" (random masks of the same densities on the weights it goes back to)
    score_batches  training batches that taylor and movement look at where no training showed them any
    penalty  lambda of slim
    """

    criterion: str = "level"
    granularity: str = "weight"
    schedule: str = "one_shot"
    scope: str = "local"
    floor: float = 0.2
    blocks: int = 0
    rates: str = "budget"
    updates: int = 10
    until: float = 0.25
    rewind: int = 0
    fresh: bool = False
    control: str = "none"
    score_batches: int = 8
    penalty: float = 1e-4
    recipe: Recipe | None = None
    before: Recipe | None = None

    def __post_init__(self):
        check_types(self)
        find_criterion(self.criterion, self.granularity)
        find_schedule(self.schedule)
        if self.scope not in SCOPES:
            raise ConfigError(f"scope = {self.scope!r}: allowed are {', '.join(SCOPES)}")
        if self.control not in CONTROLS:
            raise ConfigError(f"control = {self.control!r}: allowed are {', '.join(CONTROLS)}")
        if self.rates not in ("budget", "sensitivity"):
            raise ConfigError(f"rates = {self.rates!r}: allowed are budget, sensitivity")
        if self.rates == "sensitivity" and (self.granularity, self.scope) != ("weight", "local"):
            raise ConfigError("rates = 'sensitivity' are densities of weights in each layer: allowed are granularity = "
                              "'weight' and scope = 'local'")
        for name, least in (("updates", 1), ("rewind", 0), ("score_batches", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} = {getattr(self, name)}: allowed is {least} or more")
        if self.granularity == "block":
            self._check_blocks()
        if not 0 <= self.floor <= 1:
            raise ConfigError(f"floor = {self.floor}: allowed is a number in [0, 1]")
        if not 0 < self.until <= 1 or not self.penalty >= 0:
            raise ConfigError(f"until = {self.until}, penalty = {self.penalty}: allowed are a number in (0, 1] and one "
                              "of 0 or more")
        if self.schedule != "one_shot" and self.recipe is None:
            raise ConfigError(f"schedule = {self.schedule!r} prunes while it trains: give prune.recipe")
        check_idle(self)

    def _check_blocks(self) -> None:
        """A block is there or not: no mask that a schedule could take back."""
        if self.schedule not in OF_BLOCKS:
            raise ConfigError(f"schedule = {self.schedule!r} chooses masks anew, and blocks go for good: allowed are "
                              f"{', '.join(OF_BLOCKS)}")
        if self.blocks < 1:
            raise ConfigError(f"blocks = {self.blocks}: granularity = 'block' removes 1 or more")
        if self.schedule == "geometric" and self.updates > self.blocks:
            raise ConfigError(f"updates = {self.updates}: {self.blocks} blocks go in at most as many rounds")

    def idle(self) -> dict[str, str]:
        chosen, found = f"schedule = {self.schedule!r}", {}
        if self.granularity == "block":
            found["scope"] = "granularity = 'block' has one ranking"
        else:
            found["blocks"] = f"granularity = {self.granularity!r} prunes within layers"
        if self.scope == "local":
            found["floor"] = "scope = 'local' has a density for each layer"
        if self.schedule == "one_shot":
            found["updates"] = f"{chosen} chooses masks once"
        else:
            found["before"] = f"{chosen} trains while it prunes"
        if self.schedule not in ("linear", "agp"):
            found["until"] = f"{chosen} chooses masks between trainings"
        if self.schedule != "lottery":
            found |= dict.fromkeys(("rewind", "fresh", "control"), f"{chosen} winds nothing back")
        if CRITERIA[self.criterion].sees != "gradients":
            found["score_batches"] = f"criterion = {self.criterion!r} sees no gradients"
        if self.criterion != "slim":
            found["penalty"] = f"criterion = {self.criterion!r} penalises nothing"
        elif self.schedule == "one_shot" and self.before is None:
            found["penalty"] = f"{chosen} without `before` trains nothing before it chooses masks"
        return found


@dataclass(frozen=True)
class Quantize:
    """quantizer: "rtn", "qat", "lsq", "lsq+", "dorefa", "bnn" (core/fit/weight_quantizers.py) or "float16".

    scheme  grid of rtn and qat: "symmetric", "mse" or "asymmetric";  recipe  of the training through the quantizer
    widths  of layers: "budget", or "sensitivity": 2 to 8 bits of equal drop in the held-out error, each layer rounded
            alone on a grid of rtn, together at most the budget's bits a weight
    """

    quantizer: str = "rtn"
    widths: str = "budget"
    scheme: str = "symmetric"
    per_channel: bool = True
    recipe: Recipe | None = None

    def __post_init__(self):
        check_types(self)
        if self.quantizer not in (*QUANTIZERS, FLOAT16):
            raise ConfigError(f"quantizer = {self.quantizer!r}: allowed are {', '.join((*QUANTIZERS, FLOAT16))}")
        find_scheme(self.scheme)
        trains = self.quantizer != FLOAT16 and find_quantizer(self.quantizer).trains
        if trains and self.recipe is None:
            raise ConfigError(f"quantizer = {self.quantizer!r} is trained through: give quantize.recipe, or rtn")
        if self.widths not in ("budget", "sensitivity"):
            raise ConfigError(f"widths = {self.widths!r}: allowed are budget, sensitivity")
        if self.widths == "sensitivity" and self.quantizer not in ON_GRIDS:
            raise ConfigError(f"widths = 'sensitivity' rounds on grids of rtn: allowed are the quantizers "
                              f"{', '.join(ON_GRIDS)}, not {self.quantizer}")
        check_idle(self)

    @property
    def has_zero(self) -> bool:
        return self.quantizer == FLOAT16 or find_quantizer(self.quantizer).has_zero

    def idle(self) -> dict[str, str]:
        kind = None if self.quantizer == FLOAT16 else find_quantizer(self.quantizer)
        effective = () if kind is None else kind.settings
        found = {name: f"quantizer = {self.quantizer!r} has its own" for name in ("scheme", "per_channel")
                 if name not in effective}
        if kind is None or not kind.trains:
            found["recipe"] = f"quantizer = {self.quantizer!r} is not trained through"
        return found


@dataclass(frozen=True)
class Config:
    """order: stages, each at most once, of "prune", "quantize" (which there has to be) and "distil"; their settings.

    distil       recipe of that stage; without `distill` in it, logits at temperature 4
    activations  "static": ranges from calibration inputs; "float": none
    """

    order: tuple[str, ...] = ("prune", "quantize")
    prune: Prune = Prune()
    quantize: Quantize = Quantize()
    distil: Recipe | None = None
    activations: str = "static"
    activation_bits: int = 8
    calibration_inputs: int = 1024
    range_method: str = "minmax"

    def __post_init__(self):
        check_types(self)
        object.__setattr__(self, "order", tuple(self.order))
        wrong = [stage for stage in self.order if stage not in STAGES or self.order.count(stage) > 1]
        if wrong or "quantize" not in self.order:
            raise ConfigError(f"order = {list(self.order)}: allowed are prune, quantize, distil, each at most once; "
                              "quantize has to be there (quantizer = 'float16' keeps floats)")
        if "distil" in self.order and self.distil is None:
            raise ConfigError("order has a distil stage: give distil, its recipe")
        if self.distil is not None and self.distil.distill is None:
            object.__setattr__(self, "distil", replace(self.distil, distill=Distill()))
        if self.activations == "dynamic":
            raise ConfigError("activations = 'dynamic': a file holds fixed ranges; allowed are 'static', 'float'")
        if self.activations not in ("static", "float"):
            raise ConfigError(f"activations = {self.activations!r}: allowed are 'static', 'float'")
        check_calibration(self.activation_bits, self.calibration_inputs, self.range_method)
        check_idle(self)
        if "prune" in self.order and self.prune.granularity == "weight" and not self.quantize.has_zero:
            raise ConfigError(f"quantizer = {self.quantize.quantizer!r} has no 0 that a single weight could be pruned "
                              "to: allowed are granularity = 'channel', or a quantizer with a zero")
        if self.prune.fresh and self.order[0] != "prune":
            raise ConfigError(f"fresh = True starts from initial weights: prune has to be first in {list(self.order)}")

    def idle(self) -> dict[str, str]:
        found = {stage: f"order has no {stage} stage" for stage in ("prune", "distil") if stage not in self.order}
        if self.activations == "float":
            found |= dict.fromkeys(("activation_bits", "calibration_inputs", "range_method"), "activations are float")
        return found

    @property
    def size_knob(self) -> Knob | None:
        """What a size of the file turns: the pruning of weights or channels, else the bits of codes, if any."""
        if "prune" in self.order and self.prune.granularity in SIZED:
            return SIZED[self.prune.granularity]
        if self.quantize.quantizer == FLOAT16:
            return None
        low, high = find_quantizer(self.quantize.quantizer).widths
        return None if low == high else Knob("bits", max(low, 2), min(high, 8), whole=True)

    @property
    def data(self) -> str:
        """What these settings need to see."""
        recipes = [self.quantize.recipe, self.distil]
        recipes += [self.prune.recipe, self.prune.before] if "prune" in self.order else []
        sees = CRITERIA[self.prune.criterion].sees if "prune" in self.order else "nothing"
        judged = sees == "losses" or self.quantize.widths == "sensitivity"
        judged = judged or "prune" in self.order and self.prune.rates == "sensitivity"
        if any(recipe is not None for recipe in recipes) or sees == "gradients":
            return "train"
        if judged:
            return "held_out"
        return "calibration" if self.activations == "static" else "none"
