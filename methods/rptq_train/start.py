"""How rate-aware training begins: the steps of RPTQ for a given size."""

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..core.budget import Budget
from ..core.errors import CompressError, ConfigError
from ..core.fit.rates import round_to_rate
from ..core.fit.size import room
from ..core.graph.build import float_bytes
from ..core.train.task import Task
from ..rptq import Config as Untrained
from ..rptq import Quantizer

if TYPE_CHECKING:
    from . import Config


class Start(Quantizer):
    """RPTQ's quantizer, where prices alone round."""

    def bits(self, c: float) -> float:
        """What the codes of all layers take together at the steps of `c`."""
        steps = self.steps(c)
        return sum(round_to_rate(w / steps[name])[1] for name, w in self.weights.items())


def begin(model: nn.Module, task: Task, budget: Budget, config: "Config", generator: torch.Generator
          ) -> tuple[Start, float, int, int]:
    """(quantizer, c, bytes that the file may take, bytes without codes) for `model` as it is."""
    start = Start(model, task.calibration_inputs(config.sensitivity_inputs).cpu().contiguous(),
                  Untrained(sensitivity_inputs=config.sensitivity_inputs, bias_bits=config.bias_bits,
                            activation_bits=config.activation_bits), generator)
    least = start.least_bytes()
    limit = room(budget.size_ratio, float_bytes(model), least)
    c = config.c if config.c is not None else starting_c(start, 8 * (config.start * limit - least))
    check_codes(start, c, config, limit, least)
    return start, c, limit, least


def starting_c(quantizer: Start, bits: float) -> float:
    """c at which rounding with prices gives codes of `bits` bits in all."""
    low, high = math.log(quantizer.finest), math.log(quantizer.coarsest)
    for _ in range(14):
        middle = (low + high) / 2
        low, high = (middle, high) if quantizer.bits(math.exp(middle)) > bits else (low, middle)
    return math.exp((low + high) / 2)


def check_codes(quantizer: Start, c: float, config: "Config", limit: int, least: int) -> None:
    """ConfigError where no code but 0 is left at the steps of `c`, about what chose it: config.c, or config.start."""
    if quantizer.bits(c) > 0:
        return
    if quantizer.bits(quantizer.finest) == 0:
        raise CompressError("no weight of this network that is not 0 changes an output: there is nothing to code")
    if config.c is not None:
        raise ConfigError(f"c = {c:g}: every code of this network is 0 at such steps; allowed are smaller values")
    edge = starting_c(quantizer, 0.0)  # about where the last codes become 0
    while quantizer.bits(edge) == 0:
        edge = max(0.99 * edge, quantizer.finest)
    share = (least + quantizer.bits(edge) / 8) / limit
    raise ConfigError(f"start = {config.start:g}: every code of this network is 0 in a file of {config.start:g} times "
                      f"the budget; allowed are numbers above {math.ceil(1000 * share) / 1000:g}")
