"""The papers' accountings: by hand, by loops over the definition, and against what the papers print."""

import heapq
import math
from collections import Counter

import pytest
import torch

from benchmarks.accounting import COUNTED, account, index_widths, stored_entries, tensor_bits, total_entropy
from methods.core.artifact import Affine, Codebook, CompressedModel, CompressedTensor, Levels

INT = torch.int32


def at(positions, n, codes, grid, bits):
    """A tensor [1, n] whose weights at `positions` have `codes`; all others are pruned."""
    whole, mask = torch.zeros(1, n, dtype=INT), torch.zeros(1, n, dtype=torch.bool)
    whole[0, positions], mask[0, positions] = torch.as_tensor(codes, dtype=INT), True
    return CompressedTensor.of(whole, grid, bits, mask)


def book(bits):
    """A codebook of 2^bits values whose entry 0 is 0."""
    return Codebook(torch.arange(1 << bits).float() / 8)


def huffman_bits(symbols):
    """Total length of a Huffman code: the sum of the merged weights; one bit each for a single symbol."""
    heap = list(Counter(symbols).values())
    if len(heap) == 1:
        return heap[0]
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        total += merged
        heapq.heappush(heap, merged)
    return total


def test_deep_compression_by_hand():
    """Positions 1, 4, 15 with 3-bit gaps are stored as V1 V2 F7 V2 (its Figure 2, counted from -1)."""
    tensor = at([1, 4, 15], 16, [1, 2, 1], book(2), 2)
    codes, gaps = stored_entries(tensor, 3)
    assert gaps.tolist() == [1, 2, 7, 2] and codes[[0, 1, 3]].tolist() == [1, 2, 1] and codes[2] not in (1, 2, 3)
    bits = tensor_bits(tensor, 3)
    assert bits["with_index"] == 4 * (2 + 3)
    assert bits["prune_quantize"] == 4 * (2 + 3) + 4 * 32
    # codes 1 2 F 1 and gaps 1 2 7 2 both take 1 + 2 + 2 + 1 bits; no table is counted
    assert bits["prune_quantize_huffman"] == 6 + 6 + 4 * 32
    assert bits["data_only"] == 3 * 2 and bits["data_only_fractional"] == 3 * 1.0
    assert bits["dense"] == 16 * 2 + 4 * 32 and bits["bitmap"] == 16 + 3 * 2 + 4 * 32
    shares = [13 / 16, 2 / 16, 1 / 16]
    assert bits["entropy"] == pytest.approx(-16 * sum(p * math.log2(p) for p in shares))
    assert bits.keys() == COUNTED.keys()


@pytest.mark.parametrize("width", [2, 3, 5])
@pytest.mark.parametrize("off, fillers", [(-1, 0), (0, 0), (1, 1)])
def test_a_filler_stands_after_two_to_the_width(width, off, fillers):
    tensor = at([0, (1 << width) + off], 100, [1, 1], book(1), 1)
    assert len(stored_entries(tensor, width)[0]) == 2 + fillers
    far = at([(3 << width)], 100, [1], book(1), 1)
    assert len(stored_entries(far, width)[0]) == 1 + 3


@pytest.mark.parametrize("density", [0.02, 0.2, 0.9])
def test_streams_by_loops_over_the_definition(density):
    generator = torch.Generator().manual_seed(0)
    for width in (2, 4, 5):
        mask = torch.rand(500, generator=generator) < density
        kept = mask.nonzero().flatten().tolist()
        codes = torch.randint(1, 8, (len(kept),), generator=generator).tolist()
        entries, gaps, last = [], [], -1
        for position, code in zip(kept, codes, strict=True):
            while position - last > 1 << width:
                entries, gaps, last = [*entries, "filler"], [*gaps, (1 << width) - 1], last + (1 << width)
            entries, gaps, last = [*entries, code], [*gaps, position - last - 1], position
        bits = tensor_bits(at(kept, 500, codes, book(3), 3), width)
        assert bits["prune_quantize"] == len(entries) * (3 + width) + 8 * 32
        assert bits["prune_quantize_huffman"] == huffman_bits(entries) + huffman_bits(gaps) + 8 * 32


PRINTED = [  # weights, kept %, weight bits, index bits, their Huffman averages, rates P+Q and P+Q+H in %
    ("LeNet-300 ip1", 235_200, 8, 6, 5, 4.4, 3.7, 3.1, 2.32),
    ("LeNet-300 ip2", 30_000, 9, 6, 5, 4.4, 4.3, 3.8, 3.04),
    ("LeNet-300 ip3", 1_000, 26, 6, 5, 4.3, 3.2, 15.7, 12.70),
    ("LeNet-5 conv2", 25_000, 12, 8, 5, 7.2, 3.9, 6.0, 5.28),
    ("LeNet-5 ip1", 400_000, 8, 5, 5, 4.5, 4.5, 2.7, 2.45),
    ("LeNet-5 ip2", 5_000, 19, 5, 5, 5.2, 3.7, 6.9, 6.13),
]


@pytest.mark.parametrize("row", PRINTED, ids=lambda row: row[0])
def test_random_masks_come_near_the_printed_rates(row):
    """Not equal: the kept percentage is printed in whole numbers, and real masks are banded."""
    _, n, kept, code, index, *_, rate, _ = row
    generator = torch.Generator().manual_seed(0)
    positions = torch.randperm(n, generator=generator)[:n * kept // 100]
    codes = torch.randint(1, 1 << code, (len(positions),), generator=generator)
    bits = tensor_bits(at(positions, n, codes, book(code), code), index)
    assert 100 * bits["prune_quantize"] / (32 * n) == pytest.approx(rate, rel=0.1)


def test_lenet_of_two_thousand_five_hundred_weights():
    """ADMM's LeNet-5: 2,570 weights at 3 and 2 bits are 7,213 bits, 1,910x; with an index of 5.8 bits 623x."""
    sizes = {"conv1": 500, "conv2": 25_000, "ip1": 400_000, "ip2": 5_000}
    kept = {"conv1": (100, 3), "conv2": (1_700, 3), "ip1": (497, 2), "ip2": (273, 3)}
    width = {"conv1": 3, "conv2": 4, "ip1": 8, "ip2": 5}
    weights, entries = {}, 0
    for name, (count, bits) in kept.items():
        gap = sizes[name] // count
        top = 1 << bits - 1
        levels = Levels(torch.tensor(0.1), torch.tensor([*range(-top, 0), *range(1, top + 1)], dtype=INT))
        positions = torch.arange(1, count + 1) * gap - 1
        weights[name] = at(positions, sizes[name], torch.arange(count) % (2 * top), levels, bits)
        entries += count * (1 + (gap - 1) // 2**width[name]) * (bits + width[name])
    found = account(CompressedModel(weights, {}), 430_500, width)
    assert found["bits"]["data_only"] == 7_213 and round(found["ratios"]["data_only"]) == 1_910
    assert found["bits"]["with_index"] == entries  # a filler costs as much as an entry, though 0 is no level
    assert found["bits"]["bitmap"] == 430_500 + 7_213 + 4 * 32
    assert found["bits"]["dense"] == 4 * (500 + 25_000 + 5_000) + 3 * 400_000 + 4 * 32  # 2^b levels and 0


def test_a_grid_without_zero_needs_a_dense_code_only_where_weights_are_pruned():
    six = Levels(torch.tensor(1.0), torch.tensor([-3, -2, -1, 1, 2, 3], dtype=INT))
    four = Levels(torch.tensor(1.0), torch.tensor([-2, -1, 1, 2], dtype=INT))
    assert tensor_bits(at([0, 1], 8, [0, 5], six, 3), 4)["dense"] == 8 * 3 + 32  # two codes of three bits are free
    assert tensor_bits(at([0, 1], 8, [0, 3], four, 2), 4)["dense"] == 8 * 3 + 32
    assert tensor_bits(at(range(8), 8, [0, 1] * 4, four, 2), 4)["dense"] == 8 * 2 + 32


def test_scales_and_zero_points():
    codes = torch.tensor([[3, 5, 7], [1, 2, 3]])
    symmetric = Affine(torch.tensor([1.0, 2.0]), torch.zeros(2, dtype=INT))
    shifted = Affine(torch.tensor([1.0, 2.0]), torch.tensor([1, 0], dtype=INT), signed=False)
    assert tensor_bits(CompressedTensor.of(codes, symmetric, 4), 4)["dense"] == 6 * 4 + 2 * 32
    assert tensor_bits(CompressedTensor.of(codes, shifted, 4), 4)["dense"] == 6 * 4 + 4 * 32


def test_layers_left_in_float_count_32_bits_a_weight_and_biases_count_in_none():
    tensor = at([1, 4, 15], 16, [1, 2, 1], book(2), 2)
    rest = {"b.weight": torch.zeros(3, 5), "b.bias": torch.zeros(3), "norm.weight": torch.zeros(7)}
    found = account(CompressedModel({"a": tensor}, rest), 31, 3)
    alone = tensor_bits(tensor, 3)
    assert found["bits"] == {key: value + 32 * 15 for key, value in alone.items()}
    assert found["ratios"]["data_only"] == 32 * 31 / (6 + 32 * 15)


def test_nothing_kept():
    bits = tensor_bits(at([], 64, [], book(2), 2), 4)
    assert all(bits[key] == 0 for key in ("data_only", "data_only_fractional", "with_index", "entropy"))
    assert bits["prune_quantize"] == bits["prune_quantize_huffman"] == 4 * 32
    assert account(CompressedModel({}, {}), 0)["ratios"]["data_only"] == 0


def test_one_level_costs_annc_nothing():
    assert tensor_bits(at([1, 2, 3], 9, [2, 2, 2], book(2), 2), 4)["data_only_fractional"] == 0
    assert tensor_bits(at([1, 2, 3], 9, [1, 2, 3], book(2), 2), 4)["data_only_fractional"] == 3 * math.log2(3)


def test_entropy_of_a_coin():
    assert total_entropy(torch.tensor([0, 1, 1, 0]).numpy()) == 4.0 and total_entropy(torch.zeros(5).numpy()) == 0


def test_the_best_index_width_of_each_layer():
    """By trying all: widths differ between a dense and a sparse layer, and no other choice has fewer bits."""
    compressed = CompressedModel({"dense": at(range(0, 90, 3), 100, [0, 1] * 15, book(2), 2),
                                  "sparse": at([5, 700, 1900], 2000, [0, 1, 1], book(2), 2)}, {})
    totals = {(a, b): account(compressed, 2100, {"dense": a, "sparse": b})["bits"]["with_index"]
              for a in range(1, 17) for b in range(1, 17)}
    best = index_widths(compressed, "auto")
    assert account(compressed, 2100, "auto")["bits"]["with_index"] == min(totals.values())
    assert totals[best["dense"], best["sparse"]] == min(totals.values()) and best["dense"] < best["sparse"]
    assert index_widths(compressed, 4) == {"dense": 4, "sparse": 4}
