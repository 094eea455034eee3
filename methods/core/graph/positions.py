"""Batch norms that normalise positions, where methods would take them for the channels of the layer before them."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..errors import CompressError
from .fold import norms_after
from .wrapped import copy_inside


@torch.no_grad()
def check_positions(model: nn.Module, inputs: Iterable[Tensor]) -> None:
    """CompressError for a BatchNorm1d that is given what a linear layer puts out for positions, [N, T, C]: it
    normalises dimension 1, T, and the layer's channels are in dimension 2. `inputs`: one batch, asked for only where a
    network has such a pair of layers.

    >>> mixer = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))
    >>> check_positions(mixer, [torch.ones(2, 8)])
    >>> check_positions(mixer, [torch.ones(2, 4, 8)])
    Traceback (most recent call last):
        ...
    methods.core.errors.CompressError: batch norm '1' normalises positions of what '0' puts out, (2, 4, 4), not its \
channels: allowed is [N, C], or a norm over channels (LayerNorm)
    """
    if not any(isinstance(module, nn.BatchNorm1d) for module in model.modules()):
        return
    network, found = copy_inside(model).cpu().eval(), dict[str, tuple[int, ...]]()
    pairs = {norm: layer for layer, norm in norms_after(network).items()
             if isinstance(network.get_submodule(layer), nn.Linear)}
    if not pairs:
        return

    def watched(norm: str) -> Callable[[nn.Module, tuple], None]:
        return lambda module, args: found.update({norm: tuple(args[0].shape)})

    for norm in pairs:
        network.get_submodule(norm).register_forward_pre_hook(watched(norm))
    for batch in inputs:
        try:
            network(batch.cpu())
        except Exception:  # noqa: BLE001 - what the network cannot take is said by what gives it next
            return
    for norm, shape in found.items():
        if len(shape) > 2:
            raise CompressError(f"batch norm {norm!r} normalises positions of what {pairs[norm]!r} puts out, {shape}, "
                                "not its channels: allowed is [N, C], or a norm over channels (LayerNorm)")
