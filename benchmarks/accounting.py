"""Every paper's own way of counting bits, computed from a decoded model.

The headline ratios of the papers count different things; side by side they cannot be mistaken for each other.
All values are bits; `ratios` divides 32 x (conv and linear weights of the dense network) by them.
"""

import math
from collections.abc import Mapping

import numpy as np

from methods.core.artifact import Affine, Codebook, CompressedModel, CompressedTensor
from methods.core.errors import ConfigError
from methods.core.file.coding import filler_count, gap_encode, huffman_lengths
from methods.core.file.layouts import INDEX_BITS
from methods.core.graph.weights import float_layers

FLOAT = 32
IndexBits = int | str | Mapping[str, int]  # of a relative index: one width, "auto", or {layer: width}
FILLER = np.iinfo(np.int32).min  # stands for the zero code in a stream: none of the survivors'
COUNTED = {  # accounting: whose it is
    "data_only": "kept weights x bits (ADMM, ANNC with whole bits)",
    "data_only_fractional": "kept weights x log2(levels in use) (ANNC's evaluation)",
    "with_index": "entries with fillers x (bits + index bits), no Huffman (ADMM with index, CLIP-Q)",
    "prune_quantize": "the same + codebooks x 32 (Deep Compression P+Q)",
    "prune_quantize_huffman": "entries x Huffman averages + codebooks x 32, no tables (Deep Compression P+Q+H)",
    "dense": "all weights x bits + scales (plain quantization); a code for 0 is added to grids that lack one",
    "bitmap": "one bit a weight + kept weights x bits",
    "entropy": "zero-order entropy of the dense codes",
}


def stored_entries(tensor: CompressedTensor, index_bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and gaps (both int64 [E]) of the entries that a relative index stores, fillers included."""
    mask = tensor.mask.reshape(-1).numpy()
    gaps, filler = gap_encode(mask, index_bits)
    entries = np.full(len(gaps), FILLER, np.int64)
    entries[~filler] = tensor.codes.reshape(-1).numpy()[mask]
    return entries, np.asarray(gaps, np.int64)


def tensor_bits(tensor: CompressedTensor, index_bits: int) -> dict[str, float]:
    """{accounting: bits} of one weight tensor, with a relative index of `index_bits`."""
    mask = tensor.mask.reshape(-1).numpy()
    codes = tensor.codes.reshape(-1).numpy()
    kept, n = int(mask.sum()), len(mask)
    entries, gaps = stored_entries(tensor, index_bits)
    points = tensor.grid.code_range(tensor.bits)[1] + (0 if tensor.grid.has_zero() or kept == n else 1)
    dense_bits = max(tensor.bits, points.bit_length())
    book = FLOAT * ((1 << tensor.bits) if isinstance(tensor.grid, Codebook) else tensor.grid.scale.numel())
    levels = len(np.unique(codes[mask]))
    shifted = isinstance(tensor.grid, Affine) and bool(tensor.grid.zero.any())
    offsets = FLOAT * tensor.grid.zero.numel() if shifted else 0
    return {
        "data_only": kept * tensor.bits,
        "data_only_fractional": kept * math.log2(max(levels, 1)),
        "with_index": len(gaps) * (tensor.bits + index_bits),
        "prune_quantize": len(gaps) * (tensor.bits + index_bits) + book,
        "prune_quantize_huffman": huffman_total(entries) + huffman_total(gaps) + book,
        "dense": n * dense_bits + book + offsets,
        "bitmap": n + kept * tensor.bits + book + offsets,
        "entropy": total_entropy(np.where(mask, codes.astype(np.int64), FILLER)),
    }


def best_index_bits(tensor: CompressedTensor) -> int:
    """The width of a relative index with the fewest bits of entries, fillers included; of equal ones the smallest."""
    mask = tensor.mask.reshape(-1).numpy()
    kept = int(mask.sum())
    return min(INDEX_BITS, key=lambda width: (kept + filler_count(mask, width)) * (tensor.bits + width))


def index_widths(compressed: CompressedModel, index_bits: IndexBits) -> dict[str, int]:
    """{layer that stores codes: width of its relative index}."""
    if index_bits == "auto":
        return {name: best_index_bits(tensor) for name, tensor in compressed.weights.items()}
    one_each = isinstance(index_bits, Mapping)
    lacking = [name for name in compressed.weights if one_each and name not in index_bits]
    if lacking:
        raise ConfigError(f"index_bits lacks {lacking[0]!r}; layers that store codes: {', '.join(compressed.weights)}")
    return {name: index_bits[name] if one_each else index_bits for name in compressed.weights}


def huffman_total(symbols: np.ndarray) -> int:
    """Bits of `symbols` under their own Huffman code, without the table. (Deep Compression, section 4)"""
    values, counts = np.unique(symbols, return_counts=True)
    lengths = huffman_lengths(symbols)
    return int(sum(int(count) * lengths[int(value)] for value, count in zip(values, counts, strict=True)))


def total_entropy(symbols: np.ndarray) -> float:
    """Zero-order entropy of a sequence, in bits in total."""
    _, counts = np.unique(symbols, return_counts=True)
    return float(-(counts * np.log2(counts / counts.sum())).sum()) if len(symbols) else 0.0


def account(compressed: CompressedModel, dense_weights: int, index_bits: IndexBits = 5) -> dict:
    """{"bits": {accounting: bits}, "ratios": {accounting: x}} over all conv and linear weights of the dense network.

    index_bits  of the relative index: one width, {layer: width}, or "auto", the best of each layer
    A weight tensor that is not stored as codes counts 32 bits a weight in every accounting; biases and batch
    norm count in none (they are in the bytes of the file).
    """
    sums, widths = dict.fromkeys(COUNTED, 0.0), index_widths(compressed, index_bits)
    for name, tensor in compressed.weights.items():
        for key, bits in tensor_bits(tensor, widths[name]).items():
            sums[key] += bits
    floats = sum(compressed.rest[name].numel() for name in float_layers(compressed))
    bits = {key: value + FLOAT * floats for key, value in sums.items()}
    return {"bits": bits, "ratios": {key: FLOAT * dense_weights / max(value, 1) for key, value in bits.items()}}
