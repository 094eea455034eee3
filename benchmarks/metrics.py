"""The numbers of a row that a paper may print, by their dotted paths; others under `paper` are refused as typos."""

import re
from difflib import get_close_matches
from typing import Any

from .accounting import COUNTED

OF_A_ROW = (
    "top1_float", "top1_integer", "error_float", "error_integer", "top1_float_bn_reestimated", "baseline_top1",
    "held_out_top1", "against_baseline.float.change", "against_baseline.integer.change", "bytes",
    "paper_mode_bytes", "float32_bytes", "size_ratio", "dense_weights", "dense_macs",
    *(f"accounting.{kind}.{name}" for kind in ("bits", "ratios") for name in COUNTED),
    *(f"cost.{name}" for name in ("macs", "bops", "sparse_bops", "bops_float_activations", "weights", "kept_weights",
                                  "density", "mean_bits")),
    *(f"bytes_split.{name}" for name in ("codes", "positions", "codebooks", "rest", "activations", "header")),
    *(f"hardware.{name}" for name in ("bb_bops", "bb_bops_percent", "uniq_bops", "cycles", "cycles_sparq",
                                      "energy_ratio", "energy_ratio_sparse", "energy_ratio_skipping",
                                      "macs_per_byte", "utilisation")),
)
OF_A_LAYER = ("weights", "density", "bits", "macs", "index_bits", "levels", "fillers", "code_bits_huffman",
              "index_bits_huffman", "rate_prune_quantize", "rate_prune_quantize_huffman")


def unknown_metric(path: str, known: tuple[str, ...]) -> str | None:
    """What is wrong with a dotted path, with the nearest known ones; None for a known one."""
    if path in known:
        return None
    near = get_close_matches(path, known, 3, 0.5)
    return f"there is no metric {path!r}; near: {', '.join(near if near else known[:4])}"


def number_of(value: Any) -> Any:
    """The number that a text with a 0 as its last decimal spells, as tables have it for printed zeros; anything else as
    it is.

    >>> number_of("0.060"), number_of(0.36), number_of("0.06")
    (0.06, 0.36, '0.06')
    """
    return float(value) if isinstance(value, str) and re.fullmatch(r"-?\d+\.\d*0", value) else value
