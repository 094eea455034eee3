"""Was a printed number reached? Yes, no, or chance does not let anyone tell.

An accuracy (or error) is a mean over n test inputs: it is reached where ours is at least as good, not reached where
ours falls short by more than 1.96 standard errors of ours, and between the two nobody can tell. A change against the
given network has the interval of the pairs instead, which is narrower. Every other number
(bytes, ratios, densities, bit operations) is counted, not sampled: it is reached where ours is at least as good to the
digits that are printed. What the row's budget asks for (`given`) is reached by construction: it says that the setting
is the paper's, and is no result. Where several seeds were run, ours is their mean, and its error that of the mean as
well, by Student's t; a deviation that the paper prints is one more error. Errors add in squares.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from methods.core.errors import ConfigError

from ..chance import Z95, standard_error, t_of
from ..metrics import number_of
from .against_paper import as_printed, deviations, lookup
from .seeds import spread_of

Row = Mapping[str, Any]
REACHED, NOT_REACHED, CANNOT_TELL, MISSING = "reached", "not reached", "cannot tell", "missing"
ACCURACY, COUNTED, GIVEN = "accuracy", "counted", "given"
ACCURACIES = ("top1_", "error_", "baseline_top1", "held_out_top1", "change")
LARGER_IS_BETTER = ("top1", "change", "ratios", "macs_per_byte", "utilisation")  # looked for first
SMALLER_IS_BETTER = ("error_", "bytes", "size_ratio", "density", "bits", "bops", "rate_", "kept", "weights", "macs",
                     "cycles", "energy", "levels", "fillers")


@dataclass(frozen=True)
class Verdict:
    """One printed number of a row beside ours; `gain` is how much better ours is, in the number's own unit; `kind` is
    accuracy, counted or given."""

    metric: str
    printed: float
    ours: float | None
    gain: float | None
    verdict: str
    kind: str


def verdicts(row: Row) -> list[Verdict]:
    """Of every printed number of a row, in order."""
    return [judged(metric, printed, ours, row) for metric, printed, ours in as_printed(row)]


def judged(metric: str, text: float | str, ours: float | None, row: Row) -> Verdict:
    """The verdict on one number; `row` tells how many inputs an accuracy is a mean over."""
    kind, printed = kind_of(metric, row["budget"]), number_of(text)
    if ours is None:
        return Verdict(metric, printed, None, None, MISSING, kind)
    gain = round(direction(metric) * (ours - printed), 9)
    name = metric.split(".")[-1]
    slack = 0.0 if name.startswith(ACCURACIES) else half_unit(text)
    spread, seeds = spread_of(row, lambda one: lookup(one, metric))
    errors = [t_of(seeds) * spread / math.sqrt(seeds), Z95 * deviations(row).get(metric, 0.0)]
    if name == "change":
        ends = [lookup(row, metric.replace("change", end)) for end in ("high", "low")]
        errors.append((ends[0] - ends[1]) / 2)
    elif name.startswith(ACCURACIES):
        errors.append(Z95 * standard_error(100 - ours if name.startswith("error_") else ours, row["n_test"]))
    text = REACHED if gain >= -slack else NOT_REACHED if gain < -max(slack, math.hypot(*errors)) else CANNOT_TELL
    return Verdict(metric, printed, ours, gain, text, kind)


def kind_of(metric: str, budget: Mapping[str, Any]) -> str:
    """Accuracy; given, where the budget alone says the number; else counted.

    >>> kind_of("layers.ip1 density", {"density": 0.1}), kind_of("accounting.ratios.with_index", {"density": 0.1})
    ('given', 'counted')
    """
    name = metric.split(" ")[-1].split(".")[-1]
    if name.startswith(ACCURACIES):
        return ACCURACY
    asked = {field for field, value in budget.items() if value is not None}
    needs = {"density": [{"density"}], "kept_weights": [{"density"}], "bits": [{"bits"}], "mean_bits": [{"bits"}],
             "data_only": [{"data_ratio"}, {"density", "bits"}], "data_only_fractional": [{"data_ratio"}],
             "bytes": [{"size_ratio"}], "size_ratio": [{"size_ratio"}], "macs": [{"mac_ratio"}],
             "bops": [{"bop_ratio"}]}
    return GIVEN if any(fields <= asked for fields in needs.get(name, [])) else COUNTED


def direction(metric: str) -> int:
    """1 where larger is better, -1 where smaller is; ConfigError where neither is known."""
    path = metric.split(" ")[-1]  # of a layer's number the layer comes first
    for parts, sign in ((LARGER_IS_BETTER, 1), (SMALLER_IS_BETTER, -1)):
        if any(part in path for part in parts):
            return sign
    raise ConfigError(f"{metric}: whether more of it or less is better is not known")


def half_unit(printed: float | str) -> float:
    """Half of the last digit of a number as it is printed: 0.005 for 0.36; of a text its zeros count: "0.360"."""
    number = Decimal(printed) if isinstance(printed, str) else Decimal(repr(printed)).normalize()
    return 0.5 * 10.0 ** min(int(number.as_tuple().exponent), 0)


def overall(row: Row) -> str | None:
    """Of a row: reached if all its printed numbers are, not reached if one is not; None without printed numbers."""
    found = [one.verdict for one in verdicts(row)]
    worst = [text for text in (NOT_REACHED, MISSING, CANNOT_TELL, REACHED) if text in found]
    return worst[0] if worst else None
