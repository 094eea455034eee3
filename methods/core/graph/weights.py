"""The weights of a network: which tensors methods code, under which names, and what is left in float.

A weight is called by the path of its layer, and its tensor is PATH.weight; the packed projections of a
MultiheadAttention are tensors of their own name (PATH.in_proj_weight), which is what they are called too. Per-channel
grids go along dimension 0: the output channels, the inputs of a transposed convolution, the rows of an embedding.
"""

import warnings

from torch import Tensor, nn

from ..artifact import PACKED, CompressedModel
from ..errors import CompressWarning

WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear,
            nn.Bilinear, nn.Embedding, nn.EmbeddingBag)
FLOAT_SHARE = 0.05  # of the float32 bytes: beyond, float weights are warned about


class Packed:
    """A packed projection as a layer: `weight` [3 E, E] is the tensor `attribute` of `module`."""

    def __init__(self, module: nn.MultiheadAttention, attribute: str):
        self.module, self.attribute = module, attribute

    @property
    def weight(self) -> Tensor:
        return getattr(self.module, self.attribute)

    @weight.setter
    def weight(self, value: nn.Parameter) -> None:
        setattr(self.module, self.attribute, value)

    @property
    def bias(self) -> Tensor | None:
        return self.module.in_proj_bias


Layer = nn.Module | Packed


def weight_layers(model: nn.Module) -> dict[str, Layer]:
    """{name: layer with a `weight`} of every layer whose weight methods code, in definition order. Not of those without
    a single weight.

    >>> list(weight_layers(nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.MultiheadAttention(4, 2))))
    ['0', '2.in_proj_weight', '2.out_proj']
    """
    found: dict[str, Layer] = {}
    for name, module in model.named_modules():
        if isinstance(module, WEIGHTED) and module.weight.numel() > 0:
            found[name] = module
        elif isinstance(module, nn.MultiheadAttention):
            found |= {f"{name}.{attribute}".removeprefix("."): Packed(module, attribute) for attribute in PACKED
                      if getattr(module, attribute, None) is not None}
    return found


def layer_of(model: nn.Module, name: str) -> Layer:
    """The layer that `weight_layers` calls `name`."""
    path, _, attribute = name.rpartition(".")
    return Packed(model.get_submodule(path), attribute) if attribute in PACKED else model.get_submodule(name)


def place_of(layer: Layer) -> tuple[nn.Module, str]:
    """(module, name of its tensor) of a layer's weight, as torch.nn.utils.parametrize takes them."""
    return (layer.module, layer.attribute) if isinstance(layer, Packed) else (layer, "weight")


def float_layers(compressed: CompressedModel) -> dict[str, int]:
    """{name: bytes} of the weights (float tensors of two or more dimensions) that are not stored as codes."""
    return {name: tensor.numel() * tensor.element_size() for name, tensor in compressed.rest.items()
            if tensor.is_floating_point() and tensor.ndim > 1}


def float_share(compressed: CompressedModel) -> float:
    """The share of those weights in the float32 bytes of the whole network."""
    dense = 4 * sum(t.codes.numel() for t in compressed.weights.values())
    dense += sum(t.numel() * t.element_size() for t in compressed.rest.values())
    return sum(float_layers(compressed).values()) / max(dense, 1)


def warn_of_float(compressed: CompressedModel) -> None:
    """One CompressWarning where a model that holds codes left more than 5 % of its bytes as float weights."""
    share = float_share(compressed)
    if compressed.weights and share > FLOAT_SHARE:
        names = list(float_layers(compressed))
        warnings.warn(f"{share:.0%} of the network stay float32: {', '.join(names[:4])}"
                      f"{f' and {len(names) - 4} more' if len(names) > 4 else ''}", CompressWarning, stacklevel=4)

