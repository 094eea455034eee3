"""Memory layouts of pictures while training, and where oneDNN is wrong in one of them."""

import torch
from torch import Tensor, nn

BLOCK = 16  # channels that oneDNN's kernels take together


def needs_contiguous(model: nn.Module) -> bool:
    """Whether `model` has a strided 1x1 convolution of few channels.

    In channels_last oneDNN's gradient of its weights writes beyond its workspace (uxlfoundation/oneDNN issue 6035):
    wrong gradients, or the end of the process; on contiguous pictures it is right.
    """
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    return any(set(conv.kernel_size) == {1} and max(conv.stride) > 1 and conv.in_channels // conv.groups < BLOCK
               for conv in convs)


def laid_out(x: Tensor, channels_last: bool) -> Tensor:
    """`x`, if it is 4-d, in that layout, a contiguous one by its strides too; gradients flow.

    A tensor of one channel, or of one pixel, is in both layouts, whatever its strides; what reads it goes by them.

    >>> one = torch.zeros(2, 1, 3, 3).to(memory_format=torch.channels_last)
    >>> one.is_contiguous(), one.stride(), laid_out(one, channels_last=False).stride()
    (True, (9, 1, 3, 1), (9, 9, 3, 1))
    """
    if x.ndim != 4:
        return x
    if channels_last:
        return x.contiguous(memory_format=torch.channels_last)
    return x.contiguous().view(-1).view(x.shape)


def lay_out(model: nn.Module, channels_last: bool) -> nn.Module:
    """`model` with its buffers in that layout and its parameters `laid_out`, in place."""
    model.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    for parameter in model.parameters():
        parameter.data = laid_out(parameter.data, channels_last)
    return model
