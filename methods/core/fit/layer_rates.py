"""How far each layer is pruned, from what the error does when that layer alone is: Distiller's sensitivity analysis.

    e_l(d)  error with layer l alone at density d, all others dense, nothing trained
    d_l     the least density whose drop e_l(d) - e stays within delta, and so do all larger ones
    delta   one for all layers (equal drop), the least at which  sum d_l n_l <= density sum n_l

Departures  What delta leaves over goes to all layers, in proportion to what the next smaller delta would give them;
            where even the least densities are too many, all are scaled down by one factor.
"""

from collections.abc import Callable, Mapping, Sequence

LEVELS = tuple(round(1 - 0.05 * i, 2) for i in range(20))  # 1.0, 0.95, ... 0.05: Distiller's range

Curves = dict[str, dict[float, float]]


def measure_curves(layers: Sequence[str], prune: Callable[[str, float], None], error: Callable[[], float],
                   levels: Sequence[float] = LEVELS) -> Curves:
    """{layer: {density: error}}; every layer is dense again afterwards.

    prune  sets one layer to a density, of its dense weights;  error  of the network as it is then
    """
    dense, curves = error(), {}
    for name in layers:
        curves[name] = {}
        for level in levels:
            prune(name, level)
            curves[name][level] = dense if level == 1.0 else error()
        prune(name, 1.0)
    return curves


def equal_drop(curves: Curves, sizes: Mapping[str, int], density: float) -> dict[str, float]:
    """{layer: density} of equal drop; together they keep `density` of the weights, of which a layer has sizes[layer].

    >>> equal_drop({"a": {1.0: 0.1, 0.5: 0.1}, "b": {1.0: 0.1, 0.5: 0.4}}, {"a": 10, "b": 10}, 0.75)
    {'a': 0.5, 'b': 1.0}
    """
    total = sum(sizes.values())
    drops = sorted({error - curve[1.0] for curve in curves.values() for error in curve.values()})
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


def _least(curve: Mapping[float, float], delta: float) -> float:
    least = 1.0
    for level in sorted(curve, reverse=True):
        if curve[level] - curve[1.0] > delta:
            break
        least = level
    return least
