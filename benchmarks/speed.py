"""CPU time of the integer kernels beside float32: one process, candidates in turn, the ratio of every round.

Random weights and pictures: the kernels' time does not depend on them.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from rich.table import Table
from torch import Tensor, nn

from methods.core.artifact import CompressedModel
from methods.core.errors import ConfigError
from methods.core.fit.calibrate import calibrate
from methods.core.fit.quantize import fit_symmetric, quantize
from methods.core.fit.windows import find_window
from methods.core.graph.build import apply, assemble, weight_layers
from methods.engine import onednn
from methods.engine.fast import FastNetwork

from .networks import build, find

CLASSES, SIZE, CHANNELS = 10, 32, 3  # of networks that take any
CALIBRATION = 16
WINDOW = "5opt"
BASELINE, EXACT, FAST, WINDOWED = "float32, channels_last", "integer, exact", "integer, fast", "integer, fast, SPARQ"


@dataclasses.dataclass(frozen=True)
class Timing:
    """CPU seconds of the rounds, and for each round the baseline's time over them."""

    name: str
    seconds: list[float]
    ratios: list[float]


@dataclasses.dataclass(frozen=True)
class Report:
    """What a measurement says: the timings, the kernels that ran, the CPU, and outputs that are not the exact ones."""

    timings: list[Timing]
    batch: int
    backend: str
    slow_nodes: list[str]
    cpu: str
    wrong: int


def measure_speed(network: str, batch: int, rounds: int, threads: int) -> Report:
    """Of a network of the harness; sets the number of threads of this process."""
    check_positive({"batch": batch, "rounds": rounds, "threads": threads})
    torch.set_num_threads(threads)
    channels, size = find(network).channels or CHANNELS, find(network).size or SIZE
    model = build(network, CLASSES, channels).eval()
    x = torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(0))
    plain = eight_bit(model, x[:CALIBRATION])
    fast = FastNetwork(plain, model)
    last = apply(plain, model).to(memory_format=torch.channels_last)
    last_x = x.contiguous(memory_format=torch.channels_last)
    candidates = {BASELINE: lambda: last(last_x), EXACT: lambda: fast.exact(x), FAST: lambda: fast(x)}
    wrong, trimmed = int((fast(x) != fast.exact(x)).sum()), with_windows(plain, model)
    if trimmed.windows:
        windowed = FastNetwork(trimmed, model)
        wrong += int((windowed(x) != windowed.exact(x)).sum())
        candidates[WINDOWED] = lambda: windowed(x)
    return Report(in_turn(candidates, rounds), batch, fast.backend, fast.slow_nodes, onednn.capability(), wrong)


def check_positive(options: dict[str, int]) -> None:
    """ConfigError naming the first option below 1."""
    for name, value in options.items():
        if value < 1:
            raise ConfigError(f"--{name} {value}: at least 1 is needed")


@torch.no_grad()
def in_turn(candidates: dict[str, Callable[[], Tensor]], rounds: int) -> list[Timing]:
    """CPU time of every candidate in every round, after one round that does not count; the first is the baseline."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds + 1):
        for name, run in candidates.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    base = next(iter(seconds.values()))
    return [Timing(name, spent[1:], [b / s for b, s in zip(base[1:], spent[1:], strict=True)])
            for name, spent in seconds.items()]


def eight_bit(model: nn.Module, x: Tensor) -> CompressedModel:
    """Every conv and linear on a symmetric 8-bit grid, every edge calibrated on `x`."""
    weights = {name: quantize(layer.weight, fit_symmetric(layer.weight, 8), 8)
               for name, layer in weight_layers(model).items()}
    return assemble(model, weights, activations=calibrate(apply(assemble(model, weights), model), x))


def with_windows(compressed: CompressedModel, model: nn.Module) -> CompressedModel:
    """SPARQ's window at every conv that may have one: unsigned codes with zero point 0, pairs of channels."""
    windows = {name: find_window(WINDOW) for name, layer in weight_layers(model).items()
               if isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.weight.shape[1] % 2 == 0
               and compressed.activations[name].zero == 0}
    return dataclasses.replace(compressed, windows=windows)


def as_table(timings: Sequence[Timing], batch: int) -> Table:
    """Medians of the rounds; the ratios are taken within each round."""
    table = Table(title=f"CPU time, batch {batch}, {len(timings[0].seconds)} rounds in turn")
    for header in ("kernels", "ms per input", "times faster", "in all rounds"):
        table.add_column(header, justify="left" if header == "kernels" else "right", no_wrap=True)
    for timing in timings:
        spread = f"{min(timing.ratios):.2f} to {max(timing.ratios):.2f}"
        table.add_row(timing.name, f"{1e3 * statistics.median(timing.seconds) / batch:.3f}",
                      f"{statistics.median(timing.ratios):.2f}", spread)
    return table
