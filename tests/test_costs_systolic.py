"""Systolic cycles: a literal array, layers by hand, and the stored totals of SCALE-Sim."""

from functools import cache

import pytest
import torch

from benchmarks import networks
from methods.core.errors import ConfigError
from methods.engine.costs.shapes import LayerShape, shapes_of
from methods.engine.costs.systolic import Array, array_named, run_layer, total, without_empty_channels


def conv(positions, filters, channels, kernel=1, groups=1):
    return LayerShape("layer", "conv", positions, 1, channels, filters, kernel, kernel, groups)


@cache
def resnet18():
    return list(shapes_of(networks.build("resnet18", 10, 3), (3, 32, 32)).values())


def literal(m, n, k, array):
    """Cycles and SRAM accesses of [m, k] x [k, n], fold by fold, operand by operand."""
    rows, columns, stream = {"ws": (k, n, m), "is": (k, m, n), "os": (m, n, k)}[array.dataflow]
    cycles = along_rows = along_columns = held = 0
    for top in range(0, rows, array.rows):
        for left in range(0, columns, array.columns):
            used_rows, used_columns = min(array.rows, rows - top), min(array.columns, columns - left)
            start = 0 if array.dataflow == "os" else array.rows  # a row of held operands enters per cycle
            last = 0
            for t in range(stream):  # operand t is in element (r, c) r + c cycles after it could enter the first one
                for r in range(array.rows):
                    for c in range(array.columns):
                        last = max(last, start + t + r + c)
                along_rows += used_rows
                along_columns += used_columns
            held += used_rows * used_columns
            cycles += last + 1
    return cycles, along_rows, along_columns, held


@pytest.mark.parametrize("dataflow", ["ws", "is", "os"])
@pytest.mark.parametrize("size", [(2, 3), (4, 4), (1, 1), (3, 2)])
@pytest.mark.parametrize("m, n, k", [(5, 4, 7), (1, 10, 9), (8, 8, 4), (1, 1, 1)])
def test_against_a_literal_array(dataflow, size, m, n, k):
    array = Array(*size, dataflow)
    run = run_layer(conv(m, n, k), array)
    cycles, along_rows, along_columns, held = literal(m, n, k, array)
    roles = {"ws": (along_rows, held, along_columns), "is": (held, along_rows, along_columns),
             "os": (along_rows, along_columns, held)}
    assert run.cycles == cycles and (run.ifmap, run.filter, run.ofmap) == roles[dataflow]
    assert run.utilisation == m * n * k / (cycles * size[0] * size[1])


def test_by_hand():
    layer = conv(positions=16, filters=5, channels=2, kernel=3)  # M = 16, N = 5, K = 18
    ws = run_layer(layer, Array(8, 4, "ws"))  # 3 x 2 folds of 2*8 + 4 + 16 - 2 = 34
    assert ws.cycles == 204 and (ws.ifmap, ws.filter, ws.ofmap) == (16 * 18 * 2, 18 * 5, 16 * 5 * 3)
    assert run_layer(layer, Array(8, 4, "is")).cycles == 3 * 4 * (16 + 4 + 5 - 2)
    assert run_layer(layer, Array(8, 4, "os")).cycles == 2 * 2 * (8 + 4 + 18 - 2)


@pytest.mark.parametrize("array, kilocycles, utilisation", [
    ("ws16", 4178, 0.52), ("ws32", 1569, 0.35), ("ws64", 655, 0.21), ("os16", 2242, 0.97), ("os32", 714, 0.76),
    ("os64", 257, 0.53), ("is16", 2932, 0.74), ("is32", 1088, 0.50)])
def test_stored_totals_of_resnet18(array, kilocycles, utilisation):
    run = total(run_layer(shape, array_named(array)) for shape in resnet18())
    assert run.macs == 555_422_720
    assert round(run.cycles / 1000) == kilocycles and round(run.utilisation, 2) == utilisation


def test_the_exact_total():
    assert total(run_layer(shape, array_named("ws32")) for shape in resnet18()).cycles == 1_568_652


def test_shortened_reduction():
    layer, array = conv(16, 5, 3, kernel=3), Array(8, 4, "ws")  # K = 27 -> 14 -> 7
    assert run_layer(layer, array, 2).cycles == 2 * 2 * 34
    assert run_layer(layer, array, 4).cycles == 1 * 2 * 34
    assert run_layer(layer, Array(8, 4, "os"), 2).cycles == 2 * 2 * (8 + 4 + 14 - 2)
    assert run_layer(layer, array, 2).macs == layer.macs
    assert run_layer(layer, array, 2).utilisation == layer.macs / (2 * 136 * 32)


def test_groups_run_one_after_the_other():
    array = Array(4, 4, "ws")
    one, both = run_layer(conv(9, 3, 5), array), run_layer(conv(9, 6, 10, groups=2), array)
    assert both == total([one, one]) and both.macs == 2 * 9 * 3 * 5


def test_channels_without_weights_are_removed():
    mask = torch.ones(6, 4, 3, 3, dtype=torch.bool)
    mask[[1, 4]] = False
    mask[:, 2] = False
    mask[0, 0] = False  # other filters still read channel 0
    mask[:, 3] = False
    mask[5, 3, 2, 1] = True  # one weight reads channel 3
    small = without_empty_channels(conv(16, 6, 4, kernel=3), mask)
    assert (small.out_channels, small.in_channels, small.macs) == (4, 3, 16 * 4 * 27)
    empty = without_empty_channels(conv(16, 6, 4, kernel=3), torch.zeros_like(mask))
    run = run_layer(empty, Array(4, 4, "os"))
    assert (run.cycles, run.macs, run.utilisation) == (0, 0, 0)
    grouped = conv(16, 6, 8, kernel=3, groups=2)
    assert without_empty_channels(grouped, mask) is grouped
    linear = torch.tensor([[1, 0, 1], [0, 0, 0]], dtype=torch.bool)
    assert without_empty_channels(conv(1, 2, 3), linear).weights == 2


@pytest.mark.parametrize("name", ["ws", "32", "rs32", "ws0", "WS32", "ws032", "ws32x32", ""])
def test_unknown_arrays(name):
    with pytest.raises(ConfigError, match="ws32"):
        array_named(name)


def test_impossible_arrays():
    for make, word in ((lambda: Array(0, 4, "ws"), "0 x 4"), (lambda: Array(4, 4, "rs"), "allowed are ws, os, is"),
                       (lambda: run_layer(conv(1, 1, 1), Array(1, 1, "ws"), 0), "shorten = 0")):
        with pytest.raises(ConfigError, match=word):
            make()
