"""Cycles and SRAM accesses of a dense R x C systolic array, as SCALE-Sim counts them (Samajdar et al. 2018, 2020).

A convolution is the product [M, K] x [K, N] with M = H_out W_out, N filters, K = (C_in / groups) K_h K_w. A
dataflow lays two of the three along rows and columns and streams the third:

    stationary   rows Sr   columns Sc   stream T   cycles of a fold
    weight, ws   K         N            M          2R + C + T - 2    R to load, then fill, stream and drain
    input,  is   K         M            N          2R + C + T - 2
    output, os   M         N            K           R + C + T - 2    outputs leave while the next fold fills

cycles = ceil(Sr / R) ceil(Sc / C) x cycles of a fold. The formula for os is the tool's; the equation printed in
the ISPASS 2020 paper has 2R for all three. These are numbers of cycles: the tool's "Total Cycles" is the index
of the last one, thus one less for every layer. A layer of g groups is g products, one after the other.

What the array can skip shortens K: two multiply-accumulates per element and cycle (SPARQ) or 2:4 weights make it
ceil(K / 2); removed channels make it, and N, smaller. Scattered zeros change nothing.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor

from ...core.errors import ConfigError
from .shapes import LayerShape

DATAFLOWS = ("ws", "os", "is")
DEFAULT_ARRAY = "ws32"


@dataclass(frozen=True)
class Array:
    """An array of `rows` x `columns` processing elements and its dataflow."""

    rows: int
    columns: int
    dataflow: str

    def __post_init__(self):
        if self.dataflow not in DATAFLOWS:
            raise ConfigError(f"dataflow {self.dataflow!r}: allowed are {', '.join(DATAFLOWS)}")
        if self.rows < 1 or self.columns < 1:
            raise ConfigError(f"an array of {self.rows} x {self.columns}: both must be 1 or more")


@dataclass(frozen=True)
class Run:
    """What one or more layers cost on an array.

    macs         multiply-accumulates of the layers; slots  those that the array could have done in `cycles`
    ifmap, filter, ofmap  SRAM reads of inputs (im2col, padding included) and of weights, writes of (partial)
                 outputs, each in operands of one processing element
    """

    cycles: int
    macs: int
    slots: int
    ifmap: int
    filter: int
    ofmap: int

    @property
    def utilisation(self) -> float:
        return self.macs / max(self.slots, 1)


def array_named(name: str) -> Array:
    """A square array by name: `ws32` is 32 x 32, weight stationary."""
    match = re.fullmatch(rf"({'|'.join(DATAFLOWS)})([1-9]\d{{0,4}})", name)
    if match is None:
        raise ConfigError(f"unknown array {name!r}: allowed is one of {', '.join(DATAFLOWS)} and a size, like ws32")
    return Array(int(match[2]), int(match[2]), match[1])


def run_layer(shape: LayerShape, array: Array, shorten: int = 1) -> Run:
    """One layer on the array; `shorten` divides the reduction length, rounding up (2: SPARQ, or 2:4 weights)."""
    if shorten < 1:
        raise ConfigError(f"shorten = {shorten}: the reduction can be divided by 1 or more")
    m, n, k = shape.positions, shape.out_channels // shape.groups, -(-shape.reduction // shorten)
    rows, columns, stream = {"ws": (k, n, m), "is": (k, m, n), "os": (m, n, k)}[array.dataflow]
    row_folds, column_folds = -(-rows // array.rows), -(-columns // array.columns)
    load = 0 if array.dataflow == "os" else array.rows
    cycles = row_folds * column_folds * (load + array.rows + array.columns + stream - 2)
    held, along_rows, along_columns = rows * columns, stream * rows * column_folds, stream * columns * row_folds
    ifmap, weights, ofmap = {"ws": (along_rows, held, along_columns), "is": (held, along_rows, along_columns),
                             "os": (along_rows, along_columns, held)}[array.dataflow]
    g, slots = shape.groups, cycles * array.rows * array.columns * shorten
    return Run(g * cycles, shape.macs, g * slots, g * ifmap, g * weights, g * ofmap)


def total(runs: Iterable[Run]) -> Run:
    """Layers one after the other."""
    runs = list(runs)
    return Run(*(sum(getattr(run, field) for run in runs) for field in Run.__dataclass_fields__))


def without_empty_channels(shape: LayerShape, mask: Tensor) -> LayerShape:
    """`shape` without the filters and the input channels whose weights are all pruned.

    mask  bool [C_out, C_in / groups, ...], True = kept. A layer with groups keeps its shape: its groups would
    become products of different sizes.
    """
    if shape.groups > 1:
        return shape
    flat = mask.reshape(mask.shape[0], mask.shape[1], -1)
    return replace(shape, out_channels=int(flat.any(2).any(1).sum()), in_channels=int(flat.any(2).any(0).sum()))
