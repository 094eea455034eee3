"""Energy of a network at 45 nm and 0.9 V, as a ratio to the same network in float32.

    E = MACs (mul + add32) + (W + I + O) SRAM + (W + I + O) DRAM                       pJ per input

with W, I, O the bits of the weights, inputs and outputs of each conv and linear layer, every one of them moved
once between DRAM and SRAM and once between SRAM and the arithmetic; W is divided by the batch over which the
weights are reused. Residual adds, pooling, biases and batch norm are not counted. DRAM is most of E at batch 1,
so the batch says more than the arithmetic. Absolute figures of different libraries differ by 4x (a 32-bit
multiply is 3.1 pJ here, 12.7 pJ in Aladdin's library): only ratios are reported.

Horowitz: "Computing's energy problem", ISSCC 2014. QKeras: the fits of `config_public.py` of google/qkeras,
process "horowitz" (the polynomial in its `settings.py` is another one).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ...core.errors import ConfigError
from ..widths import FLOAT_BITS
from .shapes import LayerShape

KIB = 8 * 1024  # bits
DEFAULT_SRAM = 256 * KIB
SRAM_RANGE = (8 * KIB, 1024 * KIB)  # where the polynomial interpolates
ACCUMULATOR_BITS = 32

TABLE = {  # operation: (pJ, source)
    "int8 add": (0.03, "Horowitz"), "int16 add": (0.05, "Horowitz"), "int32 add": (0.1, "Horowitz"),
    "int8 multiply": (0.2, "Horowitz"), "int32 multiply": (3.1, "Horowitz"),
    "float16 add": (0.4, "Horowitz"), "float16 multiply": (1.1, "Horowitz"),
    "float32 add": (0.9, "Horowitz"), "float32 multiply": (3.7, "Horowitz"),
    "SRAM 8 KB, 64 bit": (10.0, "Horowitz"), "SRAM 32 KB, 64 bit": (20.0, "Horowitz"),
    "SRAM 1 MB, 64 bit": (100.0, "Horowitz"),
    "DRAM, 64 bit": (1300.0, "Horowitz: 1.3 to 2.6 nJ; the lower end, as QKeras"),
}
ADD = (0.003125, "QKeras fpm_add: pJ per bit")
MULTIPLY = ((0.002994791667, 0.001041666667), "QKeras fpm_mul: pJ per bit^2 and per bit")
SRAM = ((9.02427321e-4, -2.68847858e-2, 2.08900804e-1), "QKeras sram_rd: cubic in log2(bits), pJ per bit")
DRAM = (20.3125, "QKeras dram_rd: pJ per bit; 1300 / 64")


@dataclass(frozen=True)
class Load:
    """What one layer does and moves for one input.

    macs            multiply-accumulates carried out
    weight_width, activation_width  of the operands; 32 is float32
    weights, inputs, outputs        bits moved; weights before the division by the batch
    """

    macs: float
    weight_width: int
    activation_width: int
    weights: float
    inputs: float
    outputs: float


def float32_load(shape: LayerShape) -> Load:
    """The layer in float32, without pruning."""
    return Load(shape.macs, FLOAT_BITS, FLOAT_BITS, FLOAT_BITS * shape.weights, FLOAT_BITS * shape.in_elements,
                FLOAT_BITS * shape.out_elements)


def add_pj(bits: float) -> float:
    return ADD[0] * bits


def multiply_pj(weight_width: float, activation_width: float) -> float:
    """QKeras' fit a b^2 + c b of a b x b multiply, with b = sqrt(weight_width x activation_width)."""
    product = weight_width * activation_width
    return MULTIPLY[0][0] * product + MULTIPLY[0][1] * math.sqrt(product)


def mac_pj(weight_width: int, activation_width: int) -> float:
    """One multiply-accumulate: float32 where an operand is, else integers into a 32-bit accumulator."""
    if FLOAT_BITS in (weight_width, activation_width):
        return TABLE["float32 multiply"][0] + TABLE["float32 add"][0]
    return multiply_pj(weight_width, activation_width) + add_pj(ACCUMULATOR_BITS)


def sram_pj(size: int) -> float:
    """pJ per bit of an SRAM of `size` bits."""
    if not SRAM_RANGE[0] <= size <= SRAM_RANGE[1]:
        raise ConfigError(f"an SRAM of {size} bits: allowed are {SRAM_RANGE[0]} to {SRAM_RANGE[1]} (8 KiB to 1 MiB)")
    x = math.log2(size)
    cubic, square, linear = SRAM[0]
    return cubic * x**3 + square * x**2 + linear * x


def energy_ratios(loads: Mapping[str, Load], float32: Mapping[str, Load], batch: int = 1,
                  sram: int = DEFAULT_SRAM) -> dict:
    """Energy relative to float32: {"total", "layers": {layer: ratio}, "shares": {part: of the total energy}}.

    float32  the same network, dense and in float32 (it may have more layers, of more channels), at the same batch
    """
    if not set(loads) <= set(float32):
        raise ConfigError(f"layers {sorted(set(loads) - set(float32))} are not in the float32 network")
    ours = {name: _picojoules(load, batch, sram) for name, load in loads.items()}
    theirs = {name: sum(_picojoules(load, batch, sram).values()) for name, load in float32.items()}
    whole = sum(sum(parts.values()) for parts in ours.values())
    return {
        "total": whole / sum(theirs.values()),
        "layers": {name: sum(parts.values()) / theirs[name] for name, parts in ours.items()},
        "shares": {part: sum(parts[part] for parts in ours.values()) / whole for part in ("mac", "sram", "dram")},
    }


def _picojoules(load: Load, batch: int, sram: int) -> dict[str, float]:
    if batch < 1:
        raise ConfigError(f"batch = {batch}: weights are reused over 1 or more inputs")
    moved = load.weights / batch + load.inputs + load.outputs
    return {"mac": load.macs * mac_pj(load.weight_width, load.activation_width), "sram": moved * sram_pj(sram),
            "dram": moved * DRAM[0]}
