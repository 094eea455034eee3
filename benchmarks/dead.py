"""What removing dead units alone makes of stored files: a table of sizes, channels, and how far outputs move."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from methods.core.artifact import CompressedModel
from methods.core.errors import ConfigError
from methods.core.file.storage import decode, to_bytes
from methods.core.graph.build import apply, weight_layers
from methods.core.graph.shrink import shrink
from methods.engine.fast import FastNetwork

from .accounting import account
from .data import Dataset, test_batches
from .networks import find
from .rows import read_row, tables

RATIOS = ("with_index", "data_only")


@dataclass(frozen=True)
class Shrunk:
    """One file.

    stored          bytes as it lies there;  before, after  bytes written today, with its dead units and without
    channels        {layer: (outputs left, outputs there were)} of layers that lost some
    ratios          {accounting: (before, after)}, best index width of each layer
    arithmetic      "integer" where the method chose the ranges, else "float"
    largest_change  of a logit over the test set;  changed  test inputs of another class, of `inputs`
    """

    file: str
    stored: int
    before: int
    after: int
    channels: Mapping[str, tuple[int, int]]
    ratios: Mapping[str, tuple[float, float]]
    arithmetic: str
    largest_change: float
    changed: int
    inputs: int


@torch.no_grad()
def shrink_file(path: Path, dataset: Dataset, network: str, skeleton: nn.Module) -> Shrunk:
    """`path` without its dead units, compared over the whole test set."""
    compressed = decode(path)
    small = shrink(compressed, skeleton)
    dense = sum(layer.weight.numel() for layer in weight_layers(skeleton).values())
    counts = [account(model, dense, "auto")["ratios"] for model in (compressed, small)]
    integer = compressed.ranges_by == "method" and bool(compressed.activations)
    one, other = (_network(model, skeleton, integer) for model in (compressed, small))
    largest, changed, inputs = 0.0, 0, 0
    for x, _ in test_batches(dataset, batch_size=250, device="cpu", scaling=find(network).scaling).epoch(None):
        want, found = one(x), other(x)
        largest = max(largest, float((want - found).abs().max()))
        changed, inputs = changed + int((want.argmax(1) != found.argmax(1)).sum()), inputs + len(x)
    outputs = {name: (t.codes.shape[0], compressed.weights[name].codes.shape[0]) for name, t in small.weights.items()}
    return Shrunk(f"{path.parent.name}/{path.name}", path.stat().st_size, len(to_bytes(compressed)[0]),
                  len(to_bytes(small)[0]), {name: pair for name, pair in outputs.items() if pair[0] < pair[1]},
                  {key: (counts[0][key], counts[1][key]) for key in RATIOS}, "integer" if integer else "float",
                  largest, changed, inputs)


def _network(model: CompressedModel, skeleton: nn.Module, integer: bool):
    return FastNetwork(model, skeleton) if integer else apply(model, skeleton)


def networks_of(results: Path) -> dict[str, tuple[str, str]]:
    """{file, as rows name it: (task, network)} of all rows."""
    rows = (read_row(path) for folder in tables(results) for path in sorted(folder.glob("[!.]*.json")))
    return {row["file"]: (row["task"], row["network"]) for row in rows if "file" in row}


def network_of(path: Path, known: Mapping[str, tuple[str, str]], task: str | None, network: str | None
               ) -> tuple[str, str]:
    """(task, network) of a file: as given, else from the row that was measured from it."""
    found = known.get(f"{path.parent.name}/{path.name}", (None, None))
    task, network = found[0] if task is None else task, found[1] if network is None else network
    if task is None or network is None:
        raise ConfigError(f"{path}: no row says which network this is; give --task and --network")
    return task, network


def as_text(one: Shrunk) -> str:
    """Three lines."""
    channels = ", ".join(f"{name} {left} of {there}" for name, (left, there) in one.channels.items())
    ratios = ", ".join(f"{name.replace('_', ' ')} {before:,.0f}x -> {after:,.0f}x"
                       for name, (before, after) in one.ratios.items())
    return (f"{one.file}: stored {one.stored:,} B; written today {one.before:,} B -> {one.after:,} B; {ratios}\n"
            f"  channels left: {channels if channels else 'all'}\n"
            f"  largest change of a logit {one.largest_change:.1e} ({one.arithmetic} arithmetic), "
            f"of a class in {one.changed} of {one.inputs:,} test inputs")
