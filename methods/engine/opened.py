"""A compressed file, opened once: whoever runs, costs, verifies or exports it takes the same module and graph."""

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.artifact import CompressedModel, check_compressed
from ..core.errors import ConfigError
from ..core.file.storage import decode
from ..core.graph.build import apply
from ..core.graph.graph import Graph, trace
from ..core.graph.wrapped import check_network
from ..core.train.loaders import describe, first_line
from ..core.train.task import Batch
from .costs import hardware_costs
from .costs.shapes import Traced
from .exact import IntegerNetwork
from .export import Exported, to_c_header, to_onnx
from .fast import FastNetwork
from .layers import LayerCost, layer_costs
from .verify import Verdict, verify


class Opened:
    """A compressed model in its network. Everything is made when it is first asked for, and then kept.

    compressed    codes, grids, ranges
    skeleton      the float network it was made from; not modified
    shape         of one input, without the batch: needed for costs and ONNX only
    float_policy  layers to run in float although they have codes

    >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> from ..core.graph.build import assemble
    >>> Opened(assemble(net, {}), net, (4,)).dense.macs
    {'0': 12, '2': 6}
    """

    def __init__(self, compressed: CompressedModel, skeleton: nn.Module, shape: tuple[int, ...] = (), *,
                 float_policy: tuple[str, ...] = ()):
        check_compressed(compressed, "Opened(compressed, network)")
        check_network(skeleton)
        self.compressed, self.skeleton, self.shape, self.float_policy = compressed, skeleton, shape, float_policy
        check_sizes(shape)

    @cached_property
    def module(self) -> nn.Module:
        """The network with the decoded weights, in float."""
        return apply(self.compressed, self.skeleton)

    @cached_property
    def graph(self) -> Graph:
        return trace(self.module)

    @cached_property
    def fast(self) -> FastNetwork:
        """The integer network on the int8 kernels; called like the module."""
        return FastNetwork(self.compressed, self.skeleton, self.float_policy, built=(self.module, self.graph))

    @property
    def exact(self) -> IntegerNetwork:
        """The integer network that defines every number."""
        return self.fast.exact

    @cached_property
    def traced(self) -> Traced:
        """The stored network with its shapes."""
        return Traced.of(self.module, self.shape, self.graph)

    @cached_property
    def dense(self) -> Traced:
        """The uncompressed network with its shapes."""
        return Traced.of(self.skeleton, self.shape)

    def costs(self) -> dict[str, LayerCost]:
        """{layer: what it costs}, layers that a policy runs in float included."""
        return layer_costs(self.compressed, self.skeleton, self.shape, self.exact.float_nodes, self.traced)

    def hardware(self, sample: Tensor | None = None, **setting) -> dict:
        """Every hardware model (see `costs.hardware_costs`); effective operations are counted on `sample`."""
        network = None if sample is None else self.exact
        try:
            return hardware_costs(self.compressed, self.skeleton, self.shape, network, sample,
                                  traced=(self.traced, self.dense), **setting)
        except (RuntimeError, IndexError) as error:
            raise self._refusal(sample, error) from error

    def verify(self, batches: Iterable[Batch], inputs: int, reference_inputs: int = 0) -> Verdict:
        """Fast kernels against exact ones, and those against int64 arithmetic, code by code."""
        return verify(self.fast, batches, inputs, reference_inputs)

    def to_onnx(self, path: str | Path, **options) -> Exported:
        """The integer network as an ONNX file (options: see `export.to_onnx`)."""
        return to_onnx(self.compressed, self.skeleton, path, self.shape, float_policy=self.float_policy, **options)

    def to_c_header(self, path: str | Path, **options) -> Exported:
        """Codes, tables, scales and geometry as a C header (options: see `export.to_c_header`)."""
        return to_c_header(self.compressed, self.skeleton, path, **options)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Real outputs of the integer network for real inputs [N, ...]; ConfigError for what it cannot take."""
        if not isinstance(x, Tensor):
            raise ConfigError(f"inputs = {describe(x)}: needed is a tensor [N, ...]")
        network = self.fast
        try:
            return network(x)
        except (RuntimeError, IndexError) as error:
            raise self._refusal(x, error) from error

    def _refusal(self, x: Tensor | None, error: Exception) -> ConfigError:
        """Of inputs that the network cannot take; where it takes them, or there are none, the error is raised as is."""
        if x is None:
            raise error
        return ConfigError(f"{type(self.skeleton).__name__} cannot take inputs {describe(x)}: "
                           f"{self._why_not(x, error)}")

    def _why_not(self, x: Tensor, error: Exception) -> str:
        """What the float network says of `x`, in the words of its layers; where it takes `x`, the error as it is."""
        try:
            self.module(x)
        except Exception as found:  # noqa: BLE001 - a network raises what it likes
            return first_line(found)
        raise error


def open_file(path: str | Path, skeleton: nn.Module, shape: tuple[int, ...] = (), *,
              float_policy: tuple[str, ...] = ()) -> Opened:
    """The compressed file at `path`, for the network it was made from.

    Raises FormatError for a damaged file; ConfigError for a shape that is none, or that the network's first layer
    cannot read; CompressError, on first use (with a shape: now), where file and network do not fit.
    """
    check_network(skeleton)
    found = Opened(decode(path), skeleton, shape, float_policy=float_policy)
    if shape:
        check_first(found.graph, shape)
    return found


def check_sizes(shape: Any) -> None:
    """ConfigError where `shape` is no tuple (or list) of whole numbers above 0."""
    sizes = shape if isinstance(shape, (tuple, list)) else [None]
    if not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes):
        raise ConfigError(f"shape = {shape!r}: needed is that of one input, without the batch, such as (3, 32, 32)")


def check_first(graph: Graph, shape: tuple[int, ...]) -> None:
    """ConfigError where a layer that reads the input itself needs another shape."""
    for node in graph.layers():
        if graph.nodes[node.inputs[0]].op != "input":
            continue
        if node.op == "linear":
            fits, needed = shape[-1] == node.module.in_features, f"(..., {node.module.in_features})"
        else:
            fits = len(shape) == 3 and shape[0] == node.module.in_channels
            needed = f"({node.module.in_channels}, height, width)"
        if not fits:
            raise ConfigError(f"shape = {tuple(shape)}: {node.name} reads inputs of the shape {needed}, without the "
                              "batch")
