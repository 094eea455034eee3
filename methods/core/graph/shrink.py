"""Dead units: what cannot change an output goes, what is constant becomes a bias, what remains is cut to size.

Exact, without data or training. Of a pruned network
    1. a channel that is constant is taken into the bias of the conv or linear that reads it (see channel_flow.py);
    2. weights that no live channel reads, or that read nothing which varies, are pruned;
    3. channels of which nothing is left are cut out of every layer that holds them, and `Topology.widths` says so.

Activation quantizers of the method stay, and a constant is taken as the integer network reads it, rounded to its
code; one on the edge between two codes is left alone, as are all channels that a SPARQ window reads, since its pairs
are neighbours. The integer network then gives the same outputs, but for the rounding of biases to float32 and of a
codebook to integers. Ranges of the harness were observed, not chosen: constants are taken there as they are.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from ..artifact import Affine, Codebook, CompressedModel, CompressedTensor, Grid, Levels, tensor_name
from .build import apply
from .channel_flow import Reading
from .graph import Graph, trace
from .live import Flow, follow

TIE = 1e-3  # of a step: a constant closer to the middle of two codes may be rounded either way


def shrink(compressed: CompressedModel, skeleton: nn.Module) -> CompressedModel:
    """The same network without its dead units.

    skeleton  the network that `compressed` was made from; neither is changed

    Raises GraphError where the network cannot be traced, CompressError where the two do not fit.

    Example: of two linear layers, the middle units 1 and 2 are never read, and 0 is constant.

    >>> import torch
    >>> from torch import nn
    >>> from jointcompress.methods.core.graph.build import apply, assemble
    >>> net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    >>> with torch.no_grad():
    ...     net[0].weight[0], net[2].weight[:, 1:3] = 0, 0
    >>> small = apply(shrink(assemble(net, {}), net), net)
    >>> small[0], bool(torch.allclose(small(torch.ones(1, 4)), net(torch.ones(1, 4))))
    (Linear(in_features=4, out_features=2, bias=True), True)
    """
    module = apply(compressed, skeleton)
    graph = trace(module)
    grouped = [name for name, layer in skeleton.named_modules() if getattr(layer, "groups", 1) != 1]
    flow = follow(graph, lambda edge, constants: _as_read(compressed, edge, constants), list(compressed.windows),
                  grouped)
    weights, rest, widths = dict(compressed.weights), dict(compressed.rest), dict(compressed.topology.widths)
    for node in graph:
        if node.name in flow.readings:
            _cut_layer(node.name, graph, flow, weights, rest, widths)
        elif node.op == "bn" and flow.outputs(node.name) is not None:
            _cut_norm(node.name, flow.outputs(node.name), rest, widths)
    return replace(compressed, weights=weights, rest=rest, topology=replace(compressed.topology, widths=widths))


def _as_read(compressed: CompressedModel, edge: str, constants: np.ndarray) -> np.ndarray:
    """Constants [C] as the reader at `edge` sees them; NaN where that is not certain."""
    quantizer = compressed.activations.get(edge)
    if quantizer is None or compressed.ranges_by == "harness":
        return constants
    steps = torch.from_numpy(constants) / quantizer.scale
    read = quantizer.decode(quantizer.encode(torch.from_numpy(constants))).numpy()
    certain = ((steps - steps.floor() - 0.5).abs() > TIE).numpy()
    return np.where(certain, read, np.nan)


# --- cutting -----------------------------------------------------------------------------------------------


def _cut_layer(name: str, graph: Graph, flow: Flow, weights: dict[str, CompressedTensor], rest: dict[str, Tensor],
               widths: dict[str, tuple[int, int]]) -> None:
    """Prune, move constants and cut one conv or linear, in the dicts."""
    layer, reading = graph.nodes[name].module, flow.readings[name]
    groups = getattr(layer, "groups", 1)
    rows = torch.from_numpy(flow.outputs(name))
    inputs = _inputs(name, graph, flow, reading, groups)
    useful = torch.from_numpy(reading.uses & flow.live[name][:, None])
    columns = inputs if groups == 1 else torch.ones(useful.shape[1], dtype=torch.bool)  # whole groups go, by row
    key = tensor_name(name)
    if name in weights:
        weights[name] = cut_tensor(weights[name], useful, rows, columns)
    else:
        rest[key] = (rest[key] * _like(useful, rest[key]))[rows][:, columns]
    _move_constants(name, graph, torch.from_numpy(reading.moved), rest)
    if f"{name}.bias" in rest:
        rest[f"{name}.bias"] = rest[f"{name}.bias"][rows]
    if not bool(rows.all() and inputs.all()):
        widths[name] = int(rows.sum()), int(inputs.sum())


def _inputs(name: str, graph: Graph, flow: Flow, reading: Reading, groups: int) -> Tensor:
    """bool [I]: the input channels of a layer that stay."""
    if reading.source is None:
        return torch.ones(reading.kept.shape[1] * groups, dtype=torch.bool)
    return torch.from_numpy(flow.outputs(graph.nodes[name].inputs[0])[reading.source])


def _move_constants(name: str, graph: Graph, moved: Tensor, rest: dict[str, Tensor]) -> None:
    """Add `moved` [C_out] to what the layer puts out: to its bias, or to what its batch norm subtracts."""
    if not bool(moved.any()):
        return
    norm = graph.norm_after(name)
    key, sign = (f"{name}.bias", 1) if f"{name}.bias" in rest else (f"{norm}.running_mean", -1)
    rest[key] = (rest[key].double() + sign * moved).to(rest[key].dtype)


def _cut_norm(name: str, rows: np.ndarray, rest: dict[str, Tensor], widths: dict[str, tuple[int, int]]) -> None:
    if rows.all():
        return
    for key in ("weight", "bias", "running_mean", "running_var"):
        if f"{name}.{key}" in rest:
            rest[f"{name}.{key}"] = rest[f"{name}.{key}"][torch.from_numpy(rows)]
    widths[name] = int(rows.sum()), int(rows.sum())


def cut_tensor(tensor: CompressedTensor, useful: Tensor, rows: Tensor, columns: Tensor) -> CompressedTensor:
    """`tensor` pruned outside `useful` (bool [O, I]), then cut to `rows` (bool [O]) and `columns` (bool [I]).

    Values of a codebook that no weight has any more go, too.
    """
    mask = (tensor.mask & _like(useful, tensor.mask))[rows][:, columns]
    codes, grid = tensor.codes[rows][:, columns], _rows_of(tensor.grid, rows)
    if isinstance(grid, Codebook):
        codes, grid = _used_values(codes, mask, grid)
    return CompressedTensor.of(codes, grid, tensor.bits, mask)


def _like(useful: Tensor, weight: Tensor) -> Tensor:
    return useful.reshape(*useful.shape, *[1] * (weight.ndim - 2))


def _rows_of(grid: Grid, rows: Tensor) -> Grid:
    if isinstance(grid, Affine) and grid.scale.ndim:
        return replace(grid, scale=grid.scale[rows], zero=grid.zero[rows])
    return replace(grid, scale=grid.scale[rows]) if isinstance(grid, Levels) and grid.scale.ndim else grid


def _used_values(codes: Tensor, mask: Tensor, grid: Codebook) -> tuple[Tensor, Codebook]:
    """Codes into, and a codebook of, the values in use and the zero that there was."""
    used = torch.zeros(len(grid.values), dtype=torch.bool)
    used[codes[mask].long()] = True
    used |= grid.values == 0
    if not bool(used.any()):
        used[0] = True
    return torch.where(mask, (used.cumsum(0) - 1).to(torch.int32)[codes.long()], 0), Codebook(grid.values[used])
