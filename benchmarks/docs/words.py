"""Names and numbers for people: methods, metrics and units as every page and plot shows them."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from ..report.table import short_bytes as size
from ..report.table import short_count as count

Row = Mapping[str, Any]

METHODS = {
    "prune_then_quantize": "Prune, then quantize", "quantize_then_prune": "Quantize, then prune",
    "deep_compression": "Deep Compression", "clip_q": "CLIP-Q", "admm": "ADMM", "annc": "ANNC",
    "bayesian_bits": "Bayesian Bits", "udfc": "UDFC", "neuron_merging": "Neuron merging", "dfq": "DFQ",
    "df_mpc": "DF-MPC", "sparq": "SPARQ", "rptq": "RPTQ", "rptq_train": "RPTQ, trained",
    "sequential_reconstruction": "Sequential reconstruction", "pipeline": "Pipeline",
    "iterative_sensitivity": "Iterative sensitivity", "width_search": "Width search",
}
# Okabe and Ito's colours, told apart by the colour-blind; with the marker, two methods never look alike.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX*<>hp"
DATA = {"train": "training batches", "held_out": "some inputs, held-out labels",
        "calibration": "some inputs, no labels", "none": "no data"}


def method_name(method: str) -> str:
    """The legend name of a method, everywhere the same; a foreign one's module name with spaces."""
    return METHODS.get(method, method.replace("_", " "))


def look(method: str, others: list[str]) -> tuple[str, str]:
    """(colour, marker) of a method: fixed for those of METHODS, the next free ones for others in their order."""
    order = [*METHODS, *sorted(set(others) - set(METHODS))]
    place = order.index(method)
    return COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]


def points(value: float) -> str:
    """Percentage points: two decimals."""
    return f"{value:.2f}"


def signed(value: float) -> str:
    """A change in percentage points: two decimals, and its sign."""
    return f"{value:+.2f}"


def times(value: float) -> str:
    """A ratio: at most two decimals, none from 100 on."""
    return f"{value:.0f}x" if value >= 100 else f"{value:.1f}x" if value >= 10 else f"{value:.2f}x"


def plain(value: float) -> str:
    """Any other number: whole, or at most two decimals, or three digits where it is small."""
    if float(value).is_integer() and abs(value) < 1e9:
        return f"{value:,.0f}"
    return f"{value:,.2f}" if abs(value) >= 0.1 else f"{value:.3g}"


METRICS: dict[str, tuple[str, Callable[[float], str]]] = {  # dotted path in a row: (for people, how to print)
    "top1_float": ("top-1, float arithmetic, %", points), "top1_integer": ("top-1, integer arithmetic, %", points),
    "top1_float_bn_reestimated": ("top-1, batch norm re-estimated, %", points),
    "against_baseline.float.change": ("change of top-1, float arithmetic, points", signed),
    "against_baseline.integer.change": ("change of top-1, integer arithmetic, points", signed),
    "error_float": ("error, float arithmetic, %", points), "error_integer": ("error, integer arithmetic, %", points),
    "bytes": ("file", size), "paper_mode_bytes": ("file in Deep Compression's layout", size),
    "float32_bytes": ("float32 network", size),
    "cost.density": ("kept weights, share", plain), "cost.kept_weights": ("kept weights", plain),
    "cost.mean_bits": ("bits of a kept weight", plain), "cost.macs": ("multiply-accumulates", count),
    "cost.bops": ("bit operations", count), "hardware.bb_bops_percent": ("bit operations in % of 32-bit", plain),
    "accounting.ratios.data_only": ("smaller, codes of kept weights only", times),
    "accounting.ratios.data_only_fractional": ("smaller, codes of kept weights at log2(levels)", times),
    "accounting.ratios.with_index": ("smaller, with positions", times),
    "accounting.ratios.prune_quantize": ("smaller, P+Q", times),
    "accounting.ratios.prune_quantize_huffman": ("smaller, P+Q+H", times),
    "accounting.bits.data_only": ("bits of kept weights", plain),
}


def metric(path: str) -> tuple[str, Callable[[float], str]]:
    """(name for people, formatter) of a number at a dotted path of a row, or of `LAYER NAME` in a layer."""
    if path in METRICS:
        return METRICS[path]
    return path.replace("accounting.", "").replace(".", ": ").replace("_", " "), plain


def short_metric(path: str) -> str | None:
    """The name of a number of a whole row where little room is; None of others, a layer's above all.

    >>> short_metric("error_float"), short_metric("ip1 density")
    ('error', None)
    """
    if path not in METRICS:
        return None
    return re.sub(", (float|integer) arithmetic|, (%|points)$|^smaller, ", "", METRICS[path][0])


def points_lost(row: Row) -> float:
    """Top-1 of the float32 baseline minus that in integer arithmetic."""
    return row["baseline_top1"] - row["top1_integer"]
