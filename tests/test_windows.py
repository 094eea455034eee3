"""SPARQ's windows: the published tables, the rule of pairs against the authors' kernels, and 2:4 groups."""

import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import nn

from methods.core.artifact import Window
from methods.core.errors import CompressError, ConfigError
from methods.core.fit.windows import (
    OPTIONS,
    find_window,
    follows_24,
    keep_24,
    solo_table,
    trim_pairs,
    window_table,
    windowed_sum,
)

ORACLES = Path(__file__).resolve().parents[2] / "shared" / "oracles"
SOLO_6 = (6, (0, 1, 2))  # what a lone activation keeps of 3-bit windows
TABLES = [(name, *OPTIONS[name], rounding) for name in OPTIONS for rounding in (False, True)] + [
    ("3opt", *SOLO_6, rounding) for rounding in (False, True)]
IDS = [f"{bits}bit_{name}_{'round' if rounding else 'trim'}" for name, bits, _, rounding in TABLES]
each_table = pytest.mark.parametrize("bits, shifts, rounding", [table[1:] for table in TABLES], ids=IDS)
WINDOWS = [find_window(name, rounding) for name in OPTIONS for rounding in (False, True)]
each_window = pytest.mark.parametrize("window", WINDOWS, ids=lambda w: f"{w.bits}-{len(w.shifts)}-{w.rounding}")

INPUTS = (15, 16, 17, 23, 27, 31, 47, 63, 79, 100, 127, 143, 200, 248, 255)
EXAMPLES = {  # value -> result, computed with the official device functions
    ("5opt", False): (15, 16, 16, 22, 26, 30, 44, 60, 72, 96, 120, 128, 192, 240, 240),
    ("5opt", True): (15, 16, 16, 24, 28, 30, 48, 60, 80, 96, 120, 144, 192, 240, 240),
    ("3opt", False): (15, 16, 16, 20, 24, 28, 44, 60, 64, 96, 112, 128, 192, 240, 240),
    ("3opt", True): (15, 16, 16, 24, 28, 32, 48, 60, 80, 96, 128, 144, 192, 240, 240),
    ("2opt", False): (15, 16, 16, 16, 16, 16, 32, 48, 64, 96, 112, 128, 192, 240, 240),
    ("2opt", True): (15, 16, 16, 16, 32, 32, 48, 64, 80, 96, 128, 144, 192, 240, 240),
    ("6opt", False): (14, 16, 16, 20, 24, 28, 40, 56, 64, 96, 112, 128, 192, 224, 224),
    ("6opt", True): (14, 16, 16, 24, 28, 28, 48, 56, 80, 96, 112, 128, 192, 224, 224),
    ("7opt", False): (12, 16, 16, 16, 24, 24, 32, 48, 64, 96, 96, 128, 192, 192, 192),
    ("7opt", True): (12, 16, 16, 24, 24, 24, 48, 48, 64, 96, 96, 128, 192, 192, 192),
}
ERRORS = {  # over all 256 values, trimmed and rounded: largest, mean and mean squared error, bias, relative; outputs
    "5opt": ((15, 4.844, 43.59, -4.844, 0.1049), (15, 2.930, 16.25, -0.664, 0.0588), 48),
    "3opt": ((15, 5.906, 58.78, -5.906, 0.190), (15, 3.414, 19.94, -0.531, 0.111), 40),
    "2opt": ((15, 7.031, 72.66, -7.031, 0.484), (15, 3.969, 23.66, -0.469, 0.333), 31),
    "6opt": ((31, 10.17, 184.5, -10.17, 0.195), (31, 6.54, 82.8, -2.66, 0.122), 28),
    "7opt": ((63, 20.84, 759.0, -20.84, 0.330), (63, 15.75, 477.1, -10.66, 0.247), 16),
    "solo": ((3, 0.875, 1.875, -0.875, 0.0229), (3, 0.633, 0.906, -0.039, 0.0154), 128),
}


def oracle(name):
    path = ORACLES / name
    if not path.exists():
        pytest.skip(f"the oracle {name} of the authors' kernels is not beside this checkout")
    return json.loads(path.read_text())


def place(a, bits, shifts):
    """The lowest of the windows whose top bit is not below the leading one of `a`."""
    return next(shift for shift in sorted(shifts) if a.bit_length() <= shift + bits)


def windowed(a, bits, shifts, rounding):
    """The definition, on Python integers."""
    shift = place(a, bits, shifts)
    digits = round(Fraction(a, 1 << shift)) if rounding else a >> shift  # Python rounds half to even
    return min(digits, (1 << bits) - 1) << shift


def table_of(name, rounding):
    return window_table(*(SOLO_6 if name == "solo" else OPTIONS[name]), rounding)


# --- tables (W1-W4) ----------------------------------------------------------------------------------------


@each_table
def test_tables_follow_the_definition(bits, shifts, rounding):
    assert window_table(bits, shifts, rounding).tolist() == [windowed(a, bits, shifts, rounding) for a in range(256)]


@pytest.mark.parametrize("name, bits, shifts, rounding", TABLES, ids=IDS)
def test_tables_equal_the_official_ones(name, bits, shifts, rounding):
    found = oracle("sparq_windows.json")["tables"]
    assert set(found) == set(IDS)
    assert window_table(bits, shifts, rounding).tolist() == found[f"{bits}bit_{name}_{'round' if rounding else 'trim'}"]


@pytest.mark.parametrize("name, rounding", EXAMPLES)
def test_examples(name, rounding):
    assert table_of(name, rounding)[list(INPUTS)].tolist() == list(EXAMPLES[name, rounding])


@pytest.mark.parametrize("name", ERRORS)
def test_error_facts(name):
    *facts, outputs = ERRORS[name]
    for rounding, (largest, mean, squared, bias, relative) in zip((False, True), facts, strict=True):
        table = table_of(name, rounding)
        error = (table - torch.arange(256)).double()
        assert int(error.abs().max()) == largest and len(table.unique()) == outputs
        found = [float(error.abs().mean()), float(error.square().mean()), float(error.mean()),
                 float((error[1:].abs() / torch.arange(1, 256)).max())]
        assert found == pytest.approx([mean, squared, bias, relative], rel=6e-3, abs=6e-4)
    if name == "5opt":
        assert (table_of(name, True) - torch.arange(256)).abs().argmax() == 255


@each_table
def test_monotone_idempotent_and_exact_at_powers_of_two(bits, shifts, rounding):
    table, a = window_table(bits, shifts, rounding), torch.arange(256)
    assert bool((table.diff() >= 0).all()) and torch.equal(table[table], table) and int(table[0]) == 0
    assert all(int(table[1 << k]) == 1 << k for k in range(8))
    for value in range(256):
        s, error = place(value, bits, shifts), abs(value - int(table[value]))
        saturated = value >= ((1 << bits) - 1 << s) + (1 << s) / 2
        assert error <= ((1 << s) / 2 if rounding and not saturated else (1 << s) - 1)
    assert rounding or bool((table <= a).all())


def test_more_places_never_trim_more():
    five, three, two = ((table_of(name, False) - torch.arange(256)).abs() for name in ("5opt", "3opt", "2opt"))
    assert bool((five <= three).all()) and bool((three <= two).all())
    rounded = [(table_of(name, True) - torch.arange(256)).double() for name in ("5opt", "3opt", "2opt")]
    assert bool((rounded[0].abs() > rounded[1].abs())[125:128].all())  # 5opt saturates at 120: not for each value
    assert rounded[0].square().mean() < rounded[1].square().mean() < rounded[2].square().mean()


@pytest.mark.parametrize("bits, shifts", [(4, (0, 1, 2)), (4, (0, 5)), (4, ()), (9, (0,)), (0, (8,)), (4, (-1, 4))])
def test_windows_that_lose_the_leading_one_are_refused(bits, shifts):
    with pytest.raises(CompressError, match="highest shift reaches bit 7"):
        window_table(bits, shifts, True)


def test_an_unknown_option_is_refused():
    with pytest.raises(ConfigError, match="'4opt': allowed are 5opt, 3opt, 2opt, 6opt, 7opt"):
        find_window("4opt")


# --- pairs (V1-V7) -----------------------------------------------------------------------------------------


def literal_sum(row, weight, window):
    """One row of activations times one filter, both in the order of the reduction dimension, as the paper has it."""
    def f(a):
        return windowed(a, window.bits, window.shifts, window.rounding)

    def g(a):
        wide = 2 * window.bits
        return a if wide >= 8 else windowed(a, wide, tuple(range(9 - wide)), window.rounding)

    if not window.paired:
        return sum(f(a) * w for a, w in zip(row, weight, strict=True))
    total, group = 0, 4 if window.sparse24 else 2
    for start in range(0, len(row), group):
        places = range(start, min(start + group, len(row)))
        if window.sparse24:
            places = [k for k in places if weight[k] != 0]
        entries = [(row[k], weight[k]) for k in places] + [(0, 0)] * 2
        (a1, w1), (a2, w2) = entries[:2]
        total += g(a2) * w2 if a1 == 0 else g(a1) * w1 if a2 == 0 else f(a1) * w1 + f(a2) * w2
    return total


def product(rows, weights, window):
    return windowed_sum(nn.Linear(weights.shape[1], len(weights)), rows, weights, window)


def draw(*shape, zeros=0.4, seed=0):
    """(activations with zeros among them, a generator for weights)."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, shape, generator=generator)
    return codes * (torch.rand(shape, generator=generator) >= zeros), generator


def draw_weights(generator, *shape):
    return torch.randint(-128, 128, shape, generator=generator)


@pytest.mark.parametrize("stc", [False, True], ids=["dense", "stc"])
def test_sums_equal_the_official_kernels(stc):
    found = oracle("sparq_gemm.json")
    named = {(bits, len(shifts)): name for name, (bits, shifts) in OPTIONS.items()}
    act, weight = (torch.tensor(found["stc" if stc else "dense"][key]) for key in ("act", "w"))
    cases = [case for case in found["cases"] if case["stc"] == stc]
    assert len(cases) == 11
    for case in cases:
        window = None if case.get("exact") else find_window(
            named[case["bit_group"], case["placements"]], case["round"], sparse24=stc)
        assert product(act, weight, window).tolist() == case["out"], case


@each_window
def test_pairs(window):
    f, g = window_table(window.bits, window.shifts, window.rounding), solo_table(window)
    a, zero, other = torch.arange(256), torch.zeros(256, dtype=torch.int64), torch.full((256,), 200)
    for first, second in ((a, zero), (zero, a)):
        want = torch.stack([g * (first > 0), g * (second > 0)], 1)
        assert torch.equal(trim_pairs(torch.stack([first, second], 1), window), want)
    both = trim_pairs(torch.stack([a, other], 1), window)
    assert torch.equal(both[1:], torch.stack([f, f[other]], 1)[1:]) and both[0].tolist() == [0, int(g[200])]
    if window.bits == 4:
        assert torch.equal(g, a)  # exact


@each_window
@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_sums_follow_the_rule_of_pairs(window, k):
    rows, generator = draw(6, k)
    rows[0] = 0
    weights = draw_weights(generator, 3, k)
    weights[:, 0] = 0  # a weight of 0 frees no bits
    want = [[literal_sum(row, w, window) for w in weights.tolist()] for row in rows.tolist()]
    assert product(rows, weights, window).tolist() == want


@each_window
def test_the_order_in_a_pair_does_not_matter_and_whole_pairs_move_freely(window):
    rows, generator = draw(6, 8)
    weights = draw_weights(generator, 3, 8)
    before = product(rows, weights, window)
    for order in ([1, 0, 3, 2, 5, 4, 7, 6], [4, 5, 0, 1, 6, 7, 2, 3]):
        assert torch.equal(product(rows[:, order], weights[:, order], window), before)
    broken = [0, 2, 1, 3, 4, 5, 6, 7]
    assert not torch.equal(product(rows[:, broken], weights[:, broken], window), before)


@each_window
def test_small_activations_lose_nothing(window):
    rows, generator = draw(6, 9)
    rows, weights = rows % (1 << window.bits), draw_weights(generator, 3, 9)
    assert torch.equal(product(rows, weights, window), rows @ weights.T)


@each_window
def test_the_error_is_bounded_by_the_shifts(window):
    rows, generator = draw(20, 8)
    weights = draw_weights(generator, 3, 8)
    lost = (product(rows, weights, window) - rows @ weights.T).abs()
    steps = torch.tensor([[(1 << place(a, window.bits, window.shifts)) - 1 for a in row] for row in rows.tolist()])
    alone = rows.unflatten(1, (-1, 2)).flip(2).flatten(1) == 0
    if window.bits == 4:
        steps = steps * ~alone
    assert bool((lost <= steps @ weights.abs().T).all())


def test_sequences_are_refused():
    with pytest.raises(CompressError, match="2 dimensions"):
        product(torch.ones(2, 3, 4), torch.ones(5, 4), find_window("5opt"))


def test_without_pairs_every_activation_gets_the_window():
    window = find_window("3opt", paired=False)
    rows, generator = draw(6, 7)
    weights = draw_weights(generator, 3, 7)
    want = [[literal_sum(row, w, window) for w in weights.tolist()] for row in rows.tolist()]
    assert product(rows, weights, window).tolist() == want
    assert torch.equal(product(rows, weights, window), window_table(4, (0, 2, 4), True)[rows] @ weights.T)


# --- 2:4 weights (S1) --------------------------------------------------------------------------------------


@each_window
@pytest.mark.parametrize("k", [3, 6, 8, 16])
def test_two_of_four_pairs_the_kept_weights_of_each_filter(window, k):
    window = Window(window.bits, window.shifts, window.rounding, sparse24=True)
    rows, generator = draw(6, k, zeros=0.3)
    weights = draw_weights(generator, 5, k)
    weights = weights * keep_24(weights) * (torch.rand(5, k, generator=generator) > 0.2)  # groups of 0, 1 and 2
    want = [[literal_sum(row, w, window) for w in weights.tolist()] for row in rows.tolist()]
    assert product(rows, weights, window).tolist() == want


def test_two_of_four_is_dense_on_the_kept_channels():
    """Where every filter keeps positions 0 and 1 of each four."""
    rows, generator = draw(6, 16)
    weights = draw_weights(generator, 5, 16).clamp_min(1)
    kept = torch.tensor([k for k in range(16) if k % 4 < 2])
    sparse = torch.zeros_like(weights)
    sparse[:, kept] = weights[:, kept]
    dense, stc = find_window("5opt"), find_window("5opt", sparse24=True)
    assert torch.equal(product(rows, sparse, stc), product(rows[:, kept], weights[:, kept], dense))


def test_three_of_four_are_refused():
    with pytest.raises(CompressError, match="2:4"):
        product(torch.ones(1, 4), torch.tensor([[1.0, 1.0, 1.0, 0.0]]), find_window("5opt", sparse24=True))


def test_the_two_largest_of_four_channels_are_kept():
    weight = torch.tensor([3.0, -4.0, 1.0, 0.5, 2.0, 2.0, 2.0, -2.0])[None, :, None, None].repeat(2, 1, 1, 3)
    weight[:, :, :, 1] *= -1
    want = torch.tensor([1, 1, 0, 0, 1, 1, 0, 0], dtype=torch.bool)[None, :, None, None].expand_as(weight)
    assert torch.equal(keep_24(weight), want)
    assert not follows_24(weight) and follows_24(weight * want)


@pytest.mark.parametrize("shape", [(3, 8, 3, 3), (3, 5, 3, 3), (4, 6, 1, 1), (4, 7), (2, 3)])
def test_two_of_four_along_the_channels_first(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    mask = keep_24(weight)
    assert mask.shape == weight.shape and follows_24(weight * mask)
    assert torch.equal(keep_24(weight * mask) & mask, mask)  # a network that follows the pattern is left as it is
    for w, kept in zip(weight, mask, strict=True):
        order = [(w[(c, *where)].item(), bool(kept[(c, *where)]))
                 for where in ([(i, j) for i in range(shape[2]) for j in range(shape[3])] if w.ndim == 3 else [()])
                 for c in range(shape[1])]
        for start in range(0, len(order), 4):
            group = order[start:start + 4]
            largest = sorted((abs(value) for value, _ in group), reverse=True)[:2]
            assert sorted((abs(value) for value, one in group if one), reverse=True) == largest
