"""How much the outputs of a network feel a change of a layer's weights.

    F_l = mean over inputs of E_r || d(r . y) / d W_l ||^2 = mean of sum_j || d y_j / d W_l ||^2,   E[r r^T] = I

y are the outputs (logits). To second order in the outputs an error dW_l of independent entries of variance v costs
E |dy|^2 = v F_l: F_l is the trace of the Gauss-Newton matrix, and asks for no labels.
"""

import torch
from torch import Tensor, nn

from ..errors import CompressError
from ..graph.build import weight_layers
from ..graph.wrapped import copy_inside
from ..train.gradients import gradients
from ..train.layout import laid_out, lay_out
from ..train.loaders import try_call


def sensitivities(model: nn.Module, inputs: Tensor, generator: torch.Generator) -> dict[str, float]:
    """{layer: F_l} of every conv and linear of `model`, in eval mode, over `inputs` [k, ...], one at a time.

    r are random signs, which have the unit covariance that F needs; with them a linear network y = W x has
    F = C_out E|x|^2 exactly, whatever the draw. A layer that no output depends on has 0; CompressError where F is not
    finite.
    """
    model = lay_out(copy_inside(model).eval(), channels_last=False)  # see `needs_contiguous`
    layers = weight_layers(model)
    weights = [layer.weight.requires_grad_(True) for layer in layers.values()]
    total = dict.fromkeys(layers, 0.0)
    with gradients():
        for x in laid_out(inputs, channels_last=False).split(1):
            y = try_call(model, x, "calibration inputs")
            if not isinstance(y, Tensor):
                raise CompressError(f"the network puts out a {type(y).__name__}: needed is one tensor")
            signs = torch.randint(0, 2, y.shape, generator=generator).to(y) * 2 - 1
            found = torch.autograd.grad((y * signs).sum(), weights, allow_unused=True)
            for name, grad in zip(layers, found, strict=True):
                total[name] += 0.0 if grad is None else float(grad.square().sum()) / len(inputs)
    for name, value in total.items():
        if not value < float("inf"):
            raise CompressError(f"the outputs' sensitivity to the weights of {name} is {value}: look at the inputs")
    return total
