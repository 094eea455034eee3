"""Inputs made from a network alone: noise with the spectrum of pictures, and images distilled from batch norm.

Inputs are taken to be standardised: every channel about N(0, 1), as a network with input scaling sees them.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CompressError
from ..graph.graph import trace
from ..train.run import NullRun, Run

SIZES = (32, 28, 8, 16, 64, 96, 128, 224, 227, 299)  # tried in this order where no size is given
SHARED, OWN = 0.9, 0.45  # of a channel: what it has in common with the others, and its own
PIXELS = (-2.5, 2.5)  # the least and the largest standardised pixel
SAVES = 10  # times that a distillation keeps its state


def input_shape(model: nn.Module, size: int | None = None) -> tuple[int, int, int]:
    """(channels, side, side) of an input: `size`, or the first of SIZES on which `model` runs (nothing is computed).

    Raises CompressError where the network does not start with a convolution, or runs on none of them.
    """
    empty = trace(copy.deepcopy(model).to("meta").eval())
    first = next((node.module for node in empty if node.op in ("conv", "linear")), None)
    if not isinstance(first, nn.Conv2d):
        raise CompressError(f"{type(model).__name__} does not start with a convolution: no image can be made up for it")
    sides = SIZES if size is None else (size,)
    for side in sides:
        try:
            empty.run(torch.empty(2, first.in_channels, side, side, device="meta"))
        except (RuntimeError, ValueError):  # a pool without room, a linear layer of another width
            continue
        return first.in_channels, side, side
    tried = ", ".join(map(str, sorted(sides)))
    raise CompressError(f"{type(model).__name__} does not run on square images of {tried} pixels a side: give the size "
                        "that it takes")


def noise_images(count: int, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """[count, C, H, W] float32 with a spectrum that falls as 1 / f, as that of pictures does.

    Channel c is 0.9 z_0 + 0.45 z_c, where every z has mean 0 and variance 1 over all images.

    >>> list(noise_images(2, (3, 8, 8), torch.Generator().manual_seed(0)).shape)
    [2, 3, 8, 8]
    """
    channels, height, width = shape
    white = torch.randn(count, channels + 1, height, width, dtype=torch.float64, generator=generator)
    frequency = torch.hypot(torch.fft.fftfreq(height, dtype=torch.float64)[:, None],
                            torch.fft.rfftfreq(width, dtype=torch.float64)[None])
    lowest = 1 / max(height, width)
    pink = torch.fft.irfft2(torch.fft.rfft2(white) / frequency.clamp_min(lowest), s=(height, width))
    pink = pink - pink.mean((0, 2, 3), keepdim=True)
    pink = pink / pink.square().mean((0, 2, 3), keepdim=True).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    return (SHARED * pink[:, :1] + OWN * pink[:, 1:]).float()


def distill_images(model: nn.Module, count: int, steps: int, shape: tuple[int, int, int], generator: torch.Generator,
                   *, lr: float = 0.1, weight: float = 0.5, run: Run | None = None) -> Tensor:
    """[count, C, H, W] inputs on which the batch norms of `model` see about the statistics that they remember.

        sum over norms of mean over channels of (m - mu)^2 / v + (sqrt(v_b / v) - 1)^2,  plus weight * CE(label)

    m, v_b of the batch, mu, v of the norm, label i of image i mod the number of classes; `steps` of Adam from noise,
    the rate falling as a cosine (ZeroQ, Cai et al. 2020, and DeepInversion, Yin et al. 2020, are of this kind).
    CompressError for a network without batch norm.
    """
    run = NullRun() if run is None else run
    model = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    graph, terms = trace(model), []
    if not any(node.op == "bn" for node in graph):
        raise CompressError(f"{graph.why_opaque()}{type(model).__name__} has no batch norm: there is nothing to distil "
                            "images from")
    images = noise_images(count, shape, generator).clamp_(*PIXELS)
    images = images.to(memory_format=torch.channels_last).requires_grad_()
    optimizer = torch.optim.Adam([images], lr)
    state = run.load()
    if state is not None:
        images.data.copy_(state["images"])
        optimizer.load_state_dict(state["optimizer"])

    def see(node, inputs, output):
        if node.op == "bn":
            terms.append(mismatch(inputs[0], node.module))

    for step in range(0 if state is None else state["step"], steps):
        optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        terms.clear()
        logits = graph.run(images, see)
        if logits.ndim == 2:
            terms.append(weight * F.cross_entropy(logits, torch.arange(count) % logits.shape[1]))
        loss = sum(terms)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        images.data.clamp_(*PIXELS)
        run.report(step + 1, steps, loss=float(loss.detach()))
        if (step + 1) % max(steps // SAVES, 1) == 0:
            run.save({"step": step + 1, "images": images.detach().clone(), "optimizer": optimizer.state_dict()})
    return images.detach().contiguous()


def mismatch(x: Tensor, norm: nn.Module) -> Tensor:
    """How far the statistics of a batch at a batch norm are from the remembered ones, in standard deviations."""
    others = [d for d in range(x.ndim) if d != 1]
    mean = x.mean(others)
    variance = (x.square().mean(others) - mean.square()).clamp_min(0)  # the gradient of var_mean is slow
    remembered = norm.running_var + norm.eps
    shift = (mean - norm.running_mean).square() / remembered
    return (shift + (((variance + norm.eps) / remembered).sqrt() - 1).square()).mean()
