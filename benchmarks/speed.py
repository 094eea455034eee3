"""CPU time of the integer kernels beside float32: one process, candidates in turn, the ratio of every round.

Of files that methods stored, or, without files, of what `sparq.compress` makes of the network and of the forms of
weights that cost more. Random pictures: the kernels' time does not depend on them.
"""

import collections
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from methods import sparq
from methods.core.artifact import Codebook, CompressedModel, CompressedTensor
from methods.core.budget import Budget
from methods.core.errors import CompressError, ConfigError
from methods.core.file.storage import decode
from methods.core.fit.calibrate import calibrate
from methods.core.fit.quantize import fit_asymmetric, fit_symmetric, quantize
from methods.core.graph.build import apply, assemble, weight_layers
from methods.core.train.task import LoaderBatches, Task
from methods.engine import onednn
from methods.engine.fast import FastNetwork
from methods.engine.layers import layer_macs

from .baselines import SHIPPED
from .checkpoints import load_into, read_checkpoint
from .networks import build, find

CLASSES, SIZE, CHANNELS = 10, 32, 3  # of networks that take any
CALIBRATION = 64
COMPARED = 8  # pictures whose outputs are compared with those of the exact network
BASELINE, FAST, EXACT = "float32, channels_last", "integer, fast", "A8W8 of sparq, exact network"
SPARQ = {"A8W8 of sparq": {"windows": "none"}, "5opt of sparq": {"windows": "5opt"},
         "5opt of sparq, 2:4 weights": {"windows": "5opt", "sparse24": True}}


@dataclasses.dataclass(frozen=True)
class Timing:
    """CPU seconds of the rounds, and for each round the baseline's time over them."""

    name: str
    seconds: list[float]
    ratios: list[float]


@dataclasses.dataclass(frozen=True)
class Profile:
    """Where the time of one candidate goes.

    slow_nodes  operations without a fast form;  wrong  outputs that are not the exact network's
    products    multiplications by int8 kernels over the network's multiply-accumulates: a sum read in two forms is
                multiplied twice, weights of 16 bits by two digits, a channel under 2:4 windows as up to 4 channels
    shares      {what: percent of the CPU time}
    """

    backend: str
    slow_nodes: list[str]
    wrong: int
    products: float
    shares: dict[str, float]

    def line(self) -> str:
        slow = f"without a fast form: {', '.join(self.slow_nodes)}" if self.slow_nodes else "no slow node"
        shares = ", ".join(f"{what} {share:.0f} %" for what, share in self.shares.items())
        return f"{self.backend}; {slow}; outputs that differ from the exact ones: {self.wrong}; " \
               f"{self.products:.2f} products a MAC; {shares}"


@dataclasses.dataclass(frozen=True)
class Report:
    """The timings, the baseline first, and {candidate: its profile}."""

    timings: list[Timing]
    batch: int
    cpu: str
    profiles: dict[str, Profile]


def input_of(network: str) -> tuple[int, int]:
    """Channels and pixels of a side of what a network of the harness takes; those of CIFAR-10 where it takes any."""
    known = find(network)
    return (CHANNELS if known.channels is None else known.channels, SIZE if known.size is None else known.size)


def measure_speed(network: str, files: Sequence[Path], batch: int, rounds: int, threads: int) -> Report:
    """Of files of this network of the harness, or of its own forms; sets the number of threads of this process."""
    check_positive({"batch": batch, "rounds": rounds, "threads": threads})
    torch.set_num_threads(threads)
    channels, size = input_of(network)
    model = trained_or_new(network, channels)
    x = torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(0))
    chosen = {path.stem: decode(path) for path in files} if files else forms(model, x[:CALIBRATION])
    networks = {name: FastNetwork(compressed, model) for name, compressed in chosen.items()}
    last = apply(next(iter(chosen.values())), model).to(memory_format=torch.channels_last)
    last_x = x.contiguous(memory_format=torch.channels_last)
    candidates = {BASELINE: lambda: last(last_x)}
    candidates |= {name: lambda fast=fast: fast(x) for name, fast in networks.items()}
    if not files and EXACT.partition(",")[0] in networks:
        candidates[EXACT] = lambda: networks[EXACT.partition(",")[0]].exact(x)
    timings = in_turn(candidates, rounds)
    return Report(timings, batch, onednn.capability(),
                  {name: profile(fast, model, x) for name, fast in networks.items()})


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


# --- what is timed -----------------------------------------------------------------------------------------


def trained_or_new(network: str, channels: int) -> nn.Module:
    """The shipped baseline, whatever it was trained on, else a network with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(network, CLASSES, channels).eval()
    shipped = sorted(SHIPPED.glob(f"*_{network}.safetensors"))
    if shipped:
        load_into(model, read_checkpoint(shipped[0]))
    return model


def forms(model: nn.Module, x: Tensor) -> dict[str, CompressedModel]:
    """SPARQ's networks, where it takes this one, and one on each other grid, calibrated on `x`."""
    found = {name: made for name, config in SPARQ.items() if (made := with_sparq(model, x, config)) is not None}
    return found | {
        "8 bits, symmetric": on_grid(model, x, lambda w: quantize(w, fit_symmetric(w, 8), 8)),
        "8 bits, asymmetric": on_grid(model, x, lambda w: quantize(w, fit_asymmetric(w, 8, per_channel=False), 8)),
        "8 bits, asymmetric by channel": on_grid(model, x, lambda w: quantize(w, fit_asymmetric(w, 8), 8)),
        "tables of 16 bits": on_grid(model, x, wide_table),
    }


def with_sparq(model: nn.Module, x: Tensor, config: dict) -> CompressedModel | None:
    """Batch norm is left as it is: pictures of noise would only spoil it."""
    batches = LoaderBatches([(x, torch.zeros(len(x), dtype=torch.int64))])
    try:
        return sparq.compress(model, Task(None, batches, calibration=batches), Budget(),
                              sparq.Config(recalibrations=0, calibration_inputs=len(x), **config), torch.Generator())
    except CompressError:  # inputs with negative values, two layers, groups
        return None


def on_grid(model: nn.Module, x: Tensor, quantized: Callable[[Tensor], CompressedTensor]) -> CompressedModel:
    """Every conv and linear as `quantized` makes it, every edge calibrated on `x`."""
    weights = {name: quantized(layer.weight.detach()) for name, layer in weight_layers(model).items()}
    return assemble(model, weights, activations=calibrate(apply(assemble(model, weights), model), x))


def wide_table(weight: Tensor) -> CompressedTensor:
    """Five bits on a table with entries so close that the kernels take 16 bits for it, as Deep Compression's may be."""
    coarse = quantize(weight, fit_symmetric(weight, 5, per_channel=False), 5)
    values = torch.arange(-16, 16) * coarse.grid.scale
    values[17] = values[18] * 0.999
    return CompressedTensor.of(coarse.codes + 16, Codebook(values.float()), 5)


# --- where the time goes -----------------------------------------------------------------------------------

KINDS = {"onednn::q": "int8 kernels", "aten::index_select": "look-ups", "aten::copy_": "copies",
         "aten::clone": "copies", "aten::_to_copy": "copies", "aten::cat": "copies"}


class Clock(TorchDispatchMode):
    """CPU seconds of torch's operations, by kind."""

    def __init__(self):
        super().__init__()
        self.seconds: dict[str, float] = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        start = time.process_time()
        try:
            return function(*args, **(kwargs or {}))
        finally:
            name = function.name()
            kind = next((kind for begin, kind in KINDS.items() if name.startswith(begin)), "all else")
            self.seconds[kind] += time.process_time() - start


@torch.no_grad()
def profile(fast: FastNetwork, model: nn.Module, x: Tensor) -> Profile:
    with Clock() as clock:
        fast(x)
    spent = clock.seconds
    macs = layer_macs(fast.exact.module, tuple(x.shape[1:]))
    products = sum(macs[name] * kernel.products / fast.layers[name].weight.integers.numel()
                   for name, kernel in fast.kernels)
    wrong = int((fast(x[:COMPARED]) != fast.exact(x[:COMPARED])).sum())
    return Profile(fast.backend, fast.slow_nodes, wrong, products / sum(macs.values()), {
        kind: 100 * spent[kind] / sum(spent.values()) for kind in sorted(spent, key=spent.get, reverse=True)})


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
