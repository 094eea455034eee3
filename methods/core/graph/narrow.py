"""A network with fewer channels: the same layers, cut to the channels that are kept.

Nothing is moved into biases, and no channel is judged: what goes is said. With everything kept the result is the
network itself, bit for bit.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from ..artifact import CompressedModel, Topology, tensor_name
from .build import apply, tensors_of
from .channel_flow import Forward
from .graph import Graph

OF_A_NORM = ("weight", "bias", "running_mean", "running_var")


class Channels:
    """Which classes (sets of channels that go together, numbered 0, 1, ...) the layers of a network write and read.

    count    classes there are
    rows     {conv, linear or batch norm: class of each output channel, int [C_out]}
    columns  {conv or linear: class of each input channel, int [I]}, where that is known
    inputs   {conv or linear: its input channels}
    grouped  convs with groups: their weights lose rows alone
    """

    def __init__(self, graph: Graph):
        forward = Forward(graph, lambda edge, constants: constants, (), (), {})
        for node in graph:
            forward.values[node.name] = forward.value_of(node)
        roots = forward.classes.roots()
        self.count, self.rows, self.columns = len(roots), {}, {}
        self.inputs, self.grouped = {}, set()
        for node in graph:
            value = forward.values[node.name]
            if node.op in ("conv", "linear", "bn") and value.classes is not None:
                self.rows[node.name] = roots[value.classes]
            if node.name in forward.readings:
                source = forward.readings[node.name].source
                if source is not None:
                    self.columns[node.name] = roots[forward.values[node.inputs[0]].classes[source]]
                groups = getattr(node.module, "groups", 1)
                self.inputs[node.name] = node.module.weight.shape[1] * groups
                self.grouped |= {node.name} if groups > 1 else set()
        self.norms = {node.name for node in graph if node.op == "bn"}

    def widths(self, kept: np.ndarray) -> dict[str, tuple[int, int]]:
        """{layer: (outputs, inputs)} of those that lose channels, as `Topology.widths`; `kept` is bool [count]."""
        found = {}
        for name, rows in self.rows.items():
            columns = rows if name in self.norms else self.columns.get(name)
            into = self.inputs[name] if columns is None else int(kept[columns].sum())
            if not (kept[rows].all() and (columns is None or kept[columns].all())):
                found[name] = int(kept[rows].sum()), into
        return found

    def cut(self, tensors: Mapping[str, Tensor], kept: np.ndarray) -> dict[str, Tensor]:
        """Parameters or buffers by their names, cut to what is kept; a gradient flows back to the whole ones."""
        found = dict(tensors)
        for name, rows in self.rows.items():
            stay = torch.from_numpy(np.flatnonzero(kept[rows]))
            keys = OF_A_NORM if name in self.norms else ("weight", "bias")
            for key in (f"{name}.{key}".removeprefix(".") for key in keys):
                if key in found and len(stay) < len(rows):
                    found[key] = found[key].index_select(0, stay.to(found[key].device))
            columns, key = self.columns.get(name), tensor_name(name)
            if columns is not None and name not in self.grouped and key in found and not kept[columns].all():
                stay = torch.from_numpy(np.flatnonzero(kept[columns]))
                found[key] = found[key].index_select(1, stay.to(found[key].device))
        return found


def narrowed(model: nn.Module, channels: Channels, kept: np.ndarray) -> nn.Module:
    """A copy of `model` on the CPU, in eval mode, with the classes that `kept` (bool [channels.count]) says.

    >>> from jointcompress.methods.core.graph.graph import trace
    >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> channels = Channels(trace(net))
    >>> kept = np.ones(channels.count, bool)
    >>> kept[channels.rows["0"][1:]] = False
    >>> narrowed(net, channels, kept)[2]
    Linear(in_features=1, out_features=2, bias=True)
    """
    whole = {name: tensor.detach().cpu() for name, tensor in tensors_of(model).items()}
    made = apply(CompressedModel({}, channels.cut(whole, kept), topology=Topology(widths=channels.widths(kept))), model)
    for parameter, given in zip(made.parameters(), model.parameters(), strict=True):
        parameter.requires_grad_(given.requires_grad)
    return made
