"""Renewing the statistics of batch norm after a network was compressed: with data, on noise, or in closed form.

A compressed layer's outputs have other means and variances than its batch norm remembers, and the errors add up from
block to block. `renew` is a last step that any method may take; mu, v below are a norm's mean and variance + eps in
the given network, m, u the same of a batch, where every norm normalises with the batch's own statistics.

    "noise"   mu' = mu + (m_student - m_given) sqrt(v / u_given),  v' = v u_student / u_given  on made-up inputs:
              the noise is wrong for both networks alike, and only what sets them apart is carried over
    "closed"  no layer is run: behind the first layer of a pair from how its filters changed, behind the second the
              same differences from E x and Cov x of its inputs, x = ReLU(y) with y ~ N(beta, gamma^2)
    "data"    means over batches of training inputs, augmented as in training
    "keep"    nothing

Plain images are wrong for "data" where a network was trained on padded crops: its own statistics then differ from
those that it was trained to see. "noise" has no such trap, with real images neither.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..artifact import CompressedModel
from ..errors import CompressError, ConfigError
from ..graph.build import NORMS, apply
from ..graph.channels import Pair, find_pairs
from ..graph.graph import trace
from ..graph.wrapped import copy_inside
from ..train.task import Task
from .images import input_shape, noise_images
from .norms import batch_statistics, reestimate_norms

IMAGES, TRAINING_INPUTS = 100, 12_000
MODES = ("keep", "noise", "closed", "data")
DEAD = 1e-10  # variance of a batch below which a channel counts as constant: it keeps its variance
TERMS = 24  # of the series of a covariance after ReLU
REACH = 3.0  # pixels over which the correlation of neighbours falls to 1 / e
Statistics = tuple[Tensor, Tensor]  # mean and variance per channel, float64 [C]


def check_mode(mode: str) -> None:
    """ConfigError for a mode that there is not."""
    if mode not in MODES:
        raise ConfigError(f"batchnorm = {mode!r}: allowed are {', '.join(MODES)}")


def check_renewal(model: nn.Module, mode: str, task: Task | None = None) -> None:
    """One line where `renew` could not work on a network like `model`: for methods that train before they renew.

    CompressError without a batch norm that `mode` can renew; ConfigError where the task's inputs are not one tensor.
    """
    if mode == "keep":
        return
    given = copy_inside(model).cpu().eval()
    if not tracked(given):
        raise CompressError(f"batchnorm = {mode!r}: the network has no batch norm with statistics to renew")
    if mode == "noise":
        statistics_on(given, noise_images(2, input_shape(given, None), torch.Generator().manual_seed(0)))
    elif mode == "closed":
        closed_form(given, given, {})
    elif task is not None:
        task.training_inputs(2, torch.Generator().manual_seed(0))


def tracked(model: nn.Module) -> dict[str, nn.Module]:
    """{name: batch norm} of those with running statistics."""
    return {name: module for name, module in model.named_modules()
            if isinstance(module, NORMS) and module.running_mean is not None}


def idle_size(mode: str) -> dict[str, str]:
    """For the `idle` of a method: a side of noise images where there are none."""
    return {} if mode == "noise" else {"image_size": f"batchnorm = {mode!r} makes up no images"}


def needed_data(mode: str, otherwise: str) -> str:
    """The `DATA` of a method that renews batch norm in this mode and has `otherwise` without that."""
    return "calibration" if mode == "data" and otherwise == "none" else otherwise


def renew(compressed: CompressedModel, model: nn.Module, mode: str, generator: torch.Generator, *,
          kept: Mapping[str, Tensor] | None = None, task: Task | None = None, count: int | None = None,
          size: int | None = None) -> CompressedModel:
    """`compressed` with the statistics of its batch norms renewed; `model` is the network that it was made from.

    mode   one of MODES; "data" needs `task`
    kept   {batch norm: indices of the channels it kept}, for those that lost some
    count  images of noise (None: 100) or training inputs (None: 12,000)
    size   side of a noise image, None for the first usual one that the network runs on
    CompressError where the compressed network has no batch norm left (closed form: no pair with one).
    """
    check_mode(mode)
    if mode == "keep":
        return compressed
    given = copy_inside(model).cpu().eval()
    student = apply(compressed, given)
    norms = tracked(student)
    if not norms:
        raise CompressError(f"batchnorm = {mode!r}: the compressed network has no batch norm left to renew")
    kept = {} if kept is None else kept
    if mode == "noise":
        inputs = noise_images(IMAGES if count is None else count, input_shape(given, size), generator)
        found = carried_over(given, student, inputs, kept)
    elif mode == "closed":
        found = closed_form(given, student, kept)
    else:
        if task is None:
            raise CompressError("batchnorm = 'data' needs a task with training or calibration batches")
        inputs = task.training_inputs(TRAINING_INPUTS if count is None else count, generator)
        reestimate_norms(student, inputs.cpu())
        found = {name: (norm.running_mean, norm.running_var) for name, norm in norms.items()}
    new = {f"{name}.running_{part}": value.float() for name, statistics in found.items()
           for part, value in zip(("mean", "var"), statistics, strict=True)}
    return replace(compressed, rest={**compressed.rest, **new})


# --- on any inputs, made up or real ---------------------------------------------------------------------------


def carried_over(given: nn.Module, student: nn.Module, inputs: Tensor, kept: Mapping[str, Tensor]
                 ) -> dict[str, Statistics]:
    """Statistics for the batch norms of `student`: the given ones, moved by what sets the two apart on `inputs`."""
    ours, theirs = statistics_on(student, inputs), statistics_on(given, inputs)
    found = {}
    for name, (mean, variance) in ours.items():
        norm = given.get_submodule(name)
        chosen = kept.get(name, slice(None))
        mean_given, variance_given = (part[chosen] for part in theirs[name])
        found[name] = moved(norm, chosen, (mean, variance), (mean_given, variance_given))
    return found


def moved(norm: nn.Module, chosen: Tensor | slice, ours: Statistics, theirs: Statistics) -> Statistics:
    """mu' = mu + (m - m_given) sqrt(v / u_given),  v' = v u / u_given  for the channels `chosen` of `norm`."""
    mu, v = norm.running_mean.double()[chosen], norm.running_var.double()[chosen] + norm.eps
    (m, u), (m_given, u_given) = ours, theirs
    alive = u_given >= DEAD
    u, u_given = u + norm.eps, u_given + norm.eps
    return mu + (m - m_given) * (v / u_given).sqrt(), (torch.where(alive, v * u / u_given, v) - norm.eps).clamp_min(0)


@torch.no_grad()
def statistics_on(model: nn.Module, inputs: Tensor) -> dict[str, Statistics]:
    """Mean and variance of one batch at every batch norm of `tracked`, each of which normalizes with them.

    Means over its calls where one runs more than once. CompressError where none runs.
    """
    found: dict[str, list[Statistics]] = {}

    def watched(name: str) -> Callable:
        def hook(norm: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
            found.setdefault(name, []).append(batch_statistics(args[0]))
            return with_statistics(norm, args[0], found[name][-1])
        return hook

    hooks = [norm.register_forward_hook(watched(name)) for name, norm in tracked(model).items()]
    try:
        model.eval()(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise CompressError(f"no batch norm runs in {type(model).__name__}")
    return {name: tuple(torch.stack(parts).mean(0) for parts in zip(*calls, strict=True))
            for name, calls in found.items()}


def with_statistics(norm: nn.Module, x: Tensor, statistics: Statistics) -> Tensor:
    """What a batch norm makes of x with these in place of its own."""
    mean, variance = (part.to(x.dtype) for part in statistics)
    return F.batch_norm(x, mean, variance, norm.weight, norm.bias, training=False, eps=norm.eps)


# --- closed form ------------------------------------------------------------------------------------------------


def closed_form(given: nn.Module, student: nn.Module, kept: Mapping[str, Tensor]) -> dict[str, Statistics]:
    """Statistics for the batch norms behind both layers of every pair: behind the first `response`, behind the second

        mu' = mu + sum over taps (V m_S - W m) + what the bias moved,   v' = v [V (Cov_S x K) V^T] / [W (Cov x K) W^T]

    W its weight in `given`, V in `student`; m, Cov of its inputs, m_S, Cov_S of those in `student`, whose first norm is
    renewed: gamma and beta may be others (s tilde of UDFC, c of DF-MPC). K correlates the taps. Pools are passed over.
    """
    graph, found = trace(given), {}
    for pair in find_pairs(given):
        name, chosen = graph.norm_after(pair.second), kept.get(pair.norm, slice(None))
        taps = tap_correlation(given.get_submodule(pair.second))
        old, new = (taps_of(model, pair) for model in (given, student))
        if pair.norm is None or name is None or old.shape[2] != len(taps):  # the columns of a flatten are no taps
            continue
        mean, covariance = input_moments(given, pair)
        if pair.norm not in found:  # it is when the first layer is the second of another pair
            found[pair.norm] = response(given, student, pair, chosen)
        mean_s, covariance_s = input_moments(student, pair)  # its norm renewed
        left = kept.get(name, slice(None))  # outputs of the second layer, which may be the first of another pair
        shift = bias_of(student, pair.second) - bias_of(given, pair.second)[left]
        ours = (new.sum(2) @ mean_s + shift, spread(new, covariance_s, taps))
        theirs = ((old.sum(2) @ mean)[left], spread(old, covariance, taps)[left])
        norm = given.get_submodule(name)
        mu, v = norm.running_mean.double()[left], norm.running_var.double()[left] + norm.eps
        ratio = torch.where(theirs[1] > 0, ours[1] / torch.where(theirs[1] > 0, theirs[1], 1.0), 1.0)
        found[name] = mu + ours[0] - theirs[0], (v * ratio - norm.eps).clamp_min(0)
    if not found:
        raise CompressError("batchnorm = 'closed' needs two convolutions in a row with a batch norm behind each: "
                            f"{type(given).__name__} has none")
    return found


def bias_of(model: nn.Module, name: str) -> Tensor:
    """float64 [C_out], 0 for a layer without a bias."""
    layer = model.get_submodule(name)
    return torch.zeros(len(layer.weight), dtype=torch.float64) if layer.bias is None else layer.bias.detach().double()


def taps_of(model: nn.Module, pair: Pair) -> Tensor:
    """The weight of the second layer of a pair, float64 [M, N, taps], N the channels of the first."""
    first, second = (model.get_submodule(name).weight.detach() for name in (pair.first, pair.second))
    return second.double().reshape(len(second), len(first), -1)


def tap_correlation(layer: nn.Module) -> Tensor:
    """K [taps, taps]: exp(-distance / 3) of the pixels that two taps of a kernel read; [1, 1] of a linear layer."""
    if not isinstance(layer, nn.Conv2d):
        return torch.ones(1, 1, dtype=torch.float64)
    axes = zip(layer.kernel_size, layer.dilation, strict=True)
    points = torch.cartesian_prod(*(torch.arange(count, dtype=torch.float64) * step for count, step in axes))
    return (-torch.cdist(points, points) / REACH).exp()


def spread(weight: Tensor, covariance: Tensor, taps: Tensor) -> Tensor:
    """[M] variance of the outputs of `weight` [M, N, taps], whose inputs have covariance[i, j] * taps[a, b]."""
    mixed = torch.einsum("mia,ij->mja", weight, covariance) @ taps
    return (mixed * weight).sum((1, 2))


def response(given: nn.Module, student: nn.Module, pair: Pair, chosen: Tensor | slice) -> Statistics:
    """Mean and variance [N] of the outputs of the first layer of a pair in `student`.

    Its filters are a share of the given ones and what is at right angles to these, which has the mean 0. Where inputs
    went, too, others make up for them, and the outputs are those of the given layer.
    """
    old, new = (model.get_submodule(pair.first) for model in (given, student))
    norm = given.get_submodule(pair.norm)
    share = ratio = torch.ones(len(new.weight), dtype=torch.float64)
    if new.weight.shape[1:] == old.weight.shape[1:]:
        wanted, have = old.weight.detach().double().flatten(2)[chosen], new.weight.detach().double().flatten(2)
        taps = tap_correlation(old)
        size = (wanted @ taps * wanted).sum((1, 2))
        alive, size = size > 0, torch.where(size > 0, size, 1.0)
        share, ratio = (torch.where(alive, (have @ taps * one).sum((1, 2)) / size, 1.0) for one in (wanted, have))
    mean = share * (norm.running_mean.double()[chosen] - bias_of(given, pair.first)[chosen])
    variance = ratio * (norm.running_var.double()[chosen] + norm.eps) - norm.eps
    return mean + bias_of(student, pair.first), variance.clamp_min(0)


def input_moments(model: nn.Module, pair: Pair) -> tuple[Tensor, Tensor]:
    """Mean [N] and covariance [N, N] of what the second layer of a pair reads, from the first one's batch norm.

    Outputs of the first are as much alike as its filters, w_i^T (I x K) w_j: those of inputs of equal variance.
    """
    layer, norm = model.get_submodule(pair.first), model.get_submodule(pair.norm)
    weight = layer.weight.detach().double().flatten(2)
    alike = torch.einsum("mka,nka->mn", weight @ tap_correlation(layer), weight)
    size = alike.diagonal().clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    gamma, beta = norm.weight.detach().double(), norm.bias.detach().double()
    rho = (alike / torch.outer(size, size) * torch.outer(gamma.sign(), gamma.sign())).clamp(-1, 1)
    if pair.rectified:
        return rectified_moments(beta, gamma.abs(), rho)
    return beta, rho * torch.outer(gamma, gamma).abs()


def rectified_moments(beta: Tensor, sigma: Tensor, rho: Tensor) -> tuple[Tensor, Tensor]:
    """E x and Cov x of x = ReLU(y), y ~ N(beta, sigma^2) with correlations rho, float64 [N], [N, N].

        E x = s phi(t) + beta Phi(t),  t = beta / s;   Cov_ij = sum_k a_k(i) a_k(j) rho_ij^k / k!  (Hermite),
        a_1 = s Phi(t),  a_k = s He_{k-2}(-t) phi(t);  the variances exactly
    """
    t = (beta / sigma.clamp_min(1e-12)).clamp(-30, 30)
    density, below = (-t.square() / 2).exp() / math.sqrt(2 * math.pi), torch.special.ndtr(t)
    mean = torch.where(sigma > 0, sigma * density + beta * below, beta.clamp_min(0))
    factor, power = sigma * below, rho.clone()
    covariance = torch.outer(factor, factor) * power
    before, now = torch.zeros_like(t), torch.ones_like(t)  # He_{k-3}, He_{k-2} at -t
    for k in range(2, TERMS + 1):
        factor, power = sigma * now * density, power * rho / k
        covariance = covariance + torch.outer(factor, factor) * power
        before, now = now, -t * now - (k - 2) * before
    second = (beta.square() + sigma.square()) * below + beta * sigma * density
    variance = torch.where(sigma > 0, second - mean.square(), 0.0).clamp_min(0)
    return mean, covariance - covariance.diag().diag() + variance.diag()
