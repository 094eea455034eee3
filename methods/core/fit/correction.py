"""What a few pruned weights more change in a trained network, corrected: batch norm is moved, or biases are.

Pruned after the training, weights take the mean and the spread of their layer's outputs with them, and nothing that
is trained later makes it good. On the same inputs, before (whole) and after (less):

    batch norm   mu' = mu + (m_less - m_whole) sqrt(v / v_whole),  v' = v v_less / v_whole,  each with its batch's own
                 statistics (`batchnorm.carried_over`)
    none left    b' = b + m_whole - m_less, the means of a layer's outputs, layer by layer in order of execution, each
                 on inputs that were corrected before (empirical bias correction, Nagel et al. 2019, section 4.2.1)
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..artifact import CompressedModel
from ..errors import CompressError, ConfigError
from ..graph.build import apply
from ..graph.wrapped import copy_inside
from ..train.task import Task
from .batchnorm import carried_over, tracked
from .trim import Change

INPUTS = 512  # training inputs, augmented as in training
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def has_norms(compressed: CompressedModel, model: nn.Module) -> bool:
    """Whether batch norm with statistics is left in a compressed network; `model` is what it was made from."""
    return any(f"{name}.running_mean" in compressed.rest for name in tracked(copy_inside(model)))


def correction_of(whole: CompressedModel, model: nn.Module, task: Task | None, seed: int) -> Change:
    """A function that corrects what `whole` becomes without a few weights; without a task, or where an input is not one
    tensor, it changes nothing."""
    def correct(less: CompressedModel) -> CompressedModel:
        if task is None:
            return less
        try:
            inputs = task.training_inputs(INPUTS, torch.Generator().manual_seed(seed)).cpu()
        except (CompressError, ConfigError):
            return less
        return corrected(less, whole, copy_inside(model).cpu(), inputs)

    return correct


def corrected(less: CompressedModel, whole: CompressedModel, model: nn.Module, inputs: Tensor) -> CompressedModel:
    """`less` with its batch norms moved by what sets it apart from `whole` on inputs [N, ...], or its biases."""
    before, after = apply(whole, model), apply(less, model)
    if tracked(after):
        found = {f"{name}.running_{part}": value for name, statistics in carried_over(before, after, inputs, {}).items()
                 for part, value in zip(("mean", "var"), statistics, strict=True)}
    else:
        found = corrected_biases(before, after, inputs)
    return replace(less, rest={**less.rest, **{name: value.to(less.rest[name].dtype) for name, value in found.items()}})


@torch.no_grad()
def corrected_biases(before: nn.Module, after: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """{bias: its new values} of the layers of `after` that run once, so that each puts out the means of `before`."""
    wanted: dict[str, list[Tensor]] = {}
    found: dict[str, Tensor] = {}

    def watch(name: str, layer: nn.Module, output: Tensor) -> None:
        wanted.setdefault(name, []).append(output_means(layer, output))

    def correct(name: str, layer: nn.Module, output: Tensor) -> Tensor | None:
        if len(wanted.get(name, [])) != 1:
            return None
        lost = wanted[name][0] - output_means(layer, output)
        found[f"{name}.bias"] = layer.bias.double() + lost
        return output + along_channels(lost.to(output.dtype), layer, output)

    for model, act in ((before, watch), (after, correct)):
        hooks = [layer.register_forward_hook(lambda layer, args, output, name=name, act=act: act(name, layer, output))
                 for name, layer in biased_layers(model).items()]
        model.eval()(inputs)
        for hook in hooks:
            hook.remove()
    return found


def biased_layers(model: nn.Module) -> dict[str, nn.Module]:
    """{name: convolution or linear layer} of those that have a bias."""
    return {name: module for name, module in model.named_modules()
            if isinstance(module, (*CONVOLUTIONS, nn.Linear)) and module.bias is not None}


def output_means(layer: nn.Module, output: Tensor) -> Tensor:
    """The mean of each channel, float64 [C]: the last dimension of what a linear layer puts out, else the second."""
    channels = output.movedim(-1 if isinstance(layer, nn.Linear) else 1, -1)
    return channels.reshape(-1, channels.shape[-1]).double().mean(0)


def along_channels(values: Tensor, layer: nn.Module, output: Tensor) -> Tensor:
    """values [C] in a shape that adds to an output."""
    return values if isinstance(layer, nn.Linear) else values.reshape(-1, *[1] * (output.ndim - 2))
