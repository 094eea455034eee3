"""How far each layer is pruned or rounded, from what the error does when that layer alone is: sensitivity analysis.

    e_l(d)  error with layer l alone at level d (a density, or bits), all others whole, nothing trained
    d_l     the least level whose drop e_l(d) - e stays within delta, and so do all larger ones
    delta   one for all layers (equal drop), the least at which  sum d_l n_l <= budget sum n_l

After Distiller's sensitivity analysis; the least delta is the least greatest drop that any choice of levels has.

Departures  What delta leaves over goes to all layers: of density in proportion to what the next smaller delta would
            give them; of bits to the layer that drops most, as long as a wider one fits. Where even the least densities
            are too many, all are scaled down by one factor; widths below those measured there are not.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..budget import FLOAT_BITS
from ..errors import BudgetError
from ..train.run import NullRun, Run

LEVELS = tuple(round(1 - 0.05 * i, 2) for i in range(20))  # 1.0, 0.95, ... 0.05: Distiller's range
WIDTHS = tuple(range(8, 1, -1))  # bits

Curves = dict[str, dict[Any, float]]


def measure_curves(layers: Sequence[str], change: Callable[[str, Any], None], error: Callable[[], float],
                   levels: Sequence[float] = LEVELS, *, whole: float = 1.0, run: Run | None = None) -> Curves:
    """{layer: {level: error}}, with `whole` among the levels; every layer is whole again afterwards.

    change  sets one layer to a level, of its whole weights;  error  of the network as it is then
    run     keeps the curves of the layers that are done
    """
    run = NullRun() if run is None else run
    saved = run.load()
    dense, curves = (error(), {}) if saved is None else (saved["dense"], saved["curves"])
    for name in layers[len(curves):]:
        found = {whole: dense}
        for level in levels:
            if level != whole:
                change(name, level)
                found[level] = error()
        change(name, whole)
        curves[name] = found
        run.save({"dense": dense, "curves": curves})
        run.report(len(curves), len(layers), error=max(found.values()))
    return curves


def equal_drop(curves: Curves, sizes: Mapping[str, int], density: float) -> dict[str, float]:
    """{layer: density} of equal drop; together they keep `density` of the weights, of which a layer has sizes[layer].

    >>> equal_drop({"a": {1.0: 0.1, 0.5: 0.1}, "b": {1.0: 0.1, 0.5: 0.4}}, {"a": 10, "b": 10}, 0.75)
    {'a': 0.5, 'b': 1.0}
    """
    total = sum(sizes.values())
    drops = sorted({error - curve[max(curve)] for curve in curves.values() for error in curve.values()})
    before = dict.fromkeys(curves, 1.0)
    for delta in drops:
        found = {name: _least(curve, delta) for name, curve in curves.items()}
        kept, kept_before = (sum(d[name] * sizes[name] for name in curves) for d in (found, before))
        if kept <= density * total:
            share = 0.0 if kept_before == kept else (density * total - kept) / (kept_before - kept)
            return {name: min(d + share * (before[name] - d), 1.0) for name, d in found.items()}
        before = found
    kept = sum(before[name] * sizes[name] for name in curves)
    return {name: d * density * total / kept for name, d in before.items()}


def equal_drop_bits(curves: Curves, sizes: Mapping[str, int], bits: float) -> dict[str, int]:
    """{layer: width} of the least greatest drop; together at most `bits` a weight, of which a layer has sizes[layer].

    curves  {layer: {width: error}}, with the error of the float network at 32
    BudgetError where the narrowest widths take more.

    >>> equal_drop_bits({"a": {32: 0.1, 4: 0.1, 2: 0.2}, "b": {32: 0.1, 4: 0.1, 2: 0.5}}, {"a": 10, "b": 10}, 3)
    {'a': 2, 'b': 4}
    """
    widths = {name: sorted(set(curve) - {FLOAT_BITS}) for name, curve in curves.items()}
    allowed = bits * sum(sizes.values()) * (1 + 1e-12)

    def total(found: Mapping[str, int]) -> int:
        return sum(found[name] * n for name, n in sizes.items())

    if total({name: own[0] for name, own in widths.items()}) > allowed:
        least = total({name: own[0] for name, own in widths.items()}) / sum(sizes.values())
        raise BudgetError(f"budget bits = {bits}: the narrowest widths that were measured take {least:g} a weight")
    drops = {name: {b: max(curves[name][wider] for wider in own if wider >= b) - curves[name][FLOAT_BITS]
                    for b in own} for name, own in widths.items()}
    for delta in sorted({drop for own in drops.values() for drop in own.values()}):
        within = {name: [b for b, drop in own.items() if drop <= delta] for name, own in drops.items()}
        if all(within.values()) and total(found := {name: own[0] for name, own in within.items()}) <= allowed:
            break
    while True:
        wider = [(drops[name][found[name]], name, b) for name, own in widths.items()
                 for b in own if b > found[name] and drops[name][b] < drops[name][found[name]]
                 and total({**found, name: b}) <= allowed]
        if not wider:
            return found
        worst = max(drop for drop, _, _ in wider)
        name, b = next((name, b) for drop, name, b in wider if drop == worst)
        found[name] = b


def _least(curve: Mapping[float, float], delta: float) -> float:
    least = max(curve)
    for level in sorted(curve, reverse=True):
        if curve[level] - curve[max(curve)] > delta:
            break
        least = level
    return least
