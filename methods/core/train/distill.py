"""Distillation: the network that is compressed listens to the network it was (Hinton, Vinyals, Dean 2015).

    L = alpha hard(z_s, y) + (1 - alpha) soft(z_s, z_t) + sum over links of w d(h_s, h_t)
    soft = T^2 KL(softmax(z_t / T) || softmax(z_s / T));  its gradient in z_s is T (p_s - p_t): T^2 keeps its size

Links, between what a student layer h_s and a teacher layer h_t really put out:
    mse         mean (h_s - h_t)^2
    kl          4 KL(softmax(h_t / 2) || softmax(h_s / 2)) over the last dimension
    fitnet      1/2 mean (r(h_s) - h_t)^2, r a trained 1 x 1 convolution (Romero et al. 2015, hints)
    fsp         |G(h_t) - G(h_s)|^2, G(a, b) = sum over pixels of a b^T / pixels (Yim et al. 2017)
    dynamic     the least distance among several teacher layers (DynamicLayerwise)
    adaptive1d  a distance, through a trained linear map where the last dimensions differ (Adaptive1dLayerwise)

The teacher is in eval mode, sees the same inputs, is never trained, and is no part of what is saved.

Departures  FitNets trains in two stages, FSP likewise; here every link is a term of one loss. Maps start from a fixed
            seed and are trained by the recipe's optimizer without weight decay. Pixels and other positions of outputs
            are averaged.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError
from ..graph.wrapped import copy_detached
from .hooks import Hooks
from .loaders import call, cut, describe, first_batch, fixed_order
from .metric import evaluating
from .recipe import OPTIMIZERS, Distill, Link, Recipe
from .task import Task

Values = dict[str, Tensor]  # {layer: what it put out last}


def soft_loss(outputs: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(wanted / T) || softmax(outputs / T)) over dimension 1, averaged over all others."""
    found, aim = (F.log_softmax(x.float() / temperature, 1) for x in (outputs, wanted))
    return temperature**2 * F.kl_div(found, aim, reduction="none", log_target=True).sum(1).mean()


def flow(a: Tensor, b: Tensor) -> Tensor:
    """G [N, m, n] of maps a [N, m, h, w] and b [N, n, h', w'], pooled to the smaller size. (Yim et al., Eq. 1)"""
    size = (min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3]))
    a, b = (x if x.shape[2:] == size else F.adaptive_avg_pool2d(x, size) for x in (a, b))
    return torch.einsum("nihw,njhw->nij", a, b) / (size[0] * size[1])


def _kl(found: Tensor, wanted: Tensor) -> Tensor:
    return 4 * F.kl_div(F.log_softmax(found / 2, -1), F.softmax(wanted / 2, -1), reduction="batchmean")


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": F.mse_loss, "kl": _kl}


def link_loss(link: Link, found: list[Tensor], wanted: list[Tensor], translator: nn.Module) -> Tensor:
    """d(h_s, h_t) of one link."""
    return {
        "mse": lambda: F.mse_loss(found[0], wanted[0]), "kl": lambda: _kl(found[0], wanted[0]),
        "fitnet": lambda: 0.5 * F.mse_loss(translator(found[0]), wanted[0]),
        "fsp": lambda: (flow(*wanted) - flow(*found)).square().sum((1, 2)).mean(),
        "dynamic": lambda: torch.stack([DISTANCES[link.distance](found[0], h) for h in wanted]).amin(),
        "adaptive1d": lambda: DISTANCES[link.distance](translator(found[0]), wanted[0]),
    }[link.kind]()


def make_translator(link: Link, found: list[Tensor], wanted: list[Tensor]) -> nn.Module:
    """The map from the student's layer to the teacher's, `nn.Identity` where none is trained; checks the shapes."""
    mine, theirs = [h.shape for h in found], [h.shape for h in wanted]
    spatial = all(len(shape) == 4 for shape in mine + theirs)
    fits = {
        "mse": mine == theirs, "kl": mine == theirs, "dynamic": all(shape == mine[0] for shape in theirs),
        "fitnet": 2 <= len(mine[0]) == len(theirs[0]) <= 5 and mine[0][2:] == theirs[0][2:],
        "adaptive1d": mine[0][:-1] == theirs[0][:-1],
        "fsp": spatial and [shape[1] for shape in mine] == [shape[1] for shape in theirs],
    }
    if not fits[link.kind]:
        shown = ["/".join("x".join(map(str, shape[1:])) for shape in shapes) for shapes in (mine, theirs)]
        raise ConfigError(f"a {link.kind} link of {', '.join(link.names()[0])} to {', '.join(link.names()[1])}: their "
                          f"outputs of {shown[0]} and {shown[1]} cannot be compared")
    if link.kind == "fitnet":
        kinds = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
        kernel = () if len(mine[0]) == 2 else (1,)
        return kinds[len(mine[0])](mine[0][1], theirs[0][1], *kernel)
    if link.kind == "adaptive1d" and mine[0][-1] != theirs[0][-1]:
        return nn.Linear(mine[0][-1], theirs[0][-1])
    return nn.Identity()


class Distillation(Hooks):
    """The teacher of one training of `model`, and the loss that listens to it.

    ConfigError where the task has no teacher, a layer is not there, or outputs of linked layers cannot be compared.
    """

    def __init__(self, model: nn.Module, task: Task, distill: Distill):
        if task.teacher is None:
            raise ConfigError("recipe.distill needs a teacher: give Task(teacher=network)")
        self.task, self.distill = task, distill
        self.teacher = task.placed(copy_detached(task.teacher)).eval().requires_grad_(False)
        self.found: Values = {}
        self.wanted: Values = {}
        self.translators = nn.ModuleList()
        if distill.links:
            self._try_links(model)

    def _try_links(self, model: nn.Module) -> None:
        """One look at the shapes of what linked layers put out."""
        batch = first_batch(self.task.train)
        inputs = cut(self.task.placed_batch(batch)[0], 2)
        with torch.no_grad(), self.watching(model), evaluating(model), fixed_order():
            call(model, inputs)
            call(self.teacher, inputs)
            self.translators.extend(make_translator(link, *self._linked(link)) for link in self.distill.links)
        self.translators.to(self.task.device)

    def own_optimizers(self, model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
        trained = list(self.translators.parameters())
        return OPTIMIZERS[recipe.optimizer]([{"params": trained, "weight_decay": 0.0}], recipe) if trained else []

    def state(self) -> dict:
        return self.translators.state_dict()

    def restore(self, state: dict) -> None:
        self.translators.load_state_dict(state)

    @contextlib.contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Inside, linked layers of `model` and of the teacher leave what they put out in `found` and `wanted`."""
        names = [link.names() for link in self.distill.links]
        pupils, teachers = ({name for pair in names for name in pair[i]} for i in (0, 1))
        with contextlib.ExitStack() as stack:
            for network, layers, values in ((model, pupils, self.found), (self.teacher, teachers, self.wanted)):
                stack.enter_context(tapped(network, layers, values))
            yield

    def objective(self, hard: Callable[[Any, Any, Any], Tensor]) -> Callable[[Any, Any, Any], Tensor]:
        """The loss (outputs, targets, inputs) -> L, given the hard one."""
        def loss(outputs: Any, targets: Any, inputs: Any) -> Tensor:
            with torch.no_grad(), self.task.precision():
                wanted = call(self.teacher, inputs)
            total = self.distill.alpha * hard(outputs, targets, inputs) if self.distill.alpha else 0.0
            if self.distill.alpha < 1:
                total = total + (1 - self.distill.alpha) * self._soft(outputs, wanted)
            for link, translator in zip(self.distill.links, self.translators, strict=True):
                found, aim = ([h.float() for h in side] for side in self._linked(link))
                total = total + link.weight * link_loss(link, found, aim, translator)
            return total

        return loss

    def _soft(self, outputs: Any, wanted: Any) -> Tensor:
        tensors = isinstance(outputs, Tensor) and isinstance(wanted, Tensor) and outputs.shape == wanted.shape
        classes = tensors and outputs.ndim > 1 and outputs.shape[1] > 1
        if not (classes if self.distill.soft == "kl" else tensors):
            needed = "[N, classes, ...]; soft = \"mse\" takes others" if self.distill.soft == "kl" else "of one shape"
            raise ConfigError(f"student and teacher return {describe(outputs)} and {describe(wanted)}: the soft loss "
                              f"needs outputs {needed}, alpha = 1 none")
        if self.distill.soft == "mse":
            return F.mse_loss(outputs, wanted.float())
        return soft_loss(outputs, wanted, self.distill.temperature)

    def _linked(self, link: Link) -> tuple[list[Tensor], list[Tensor]]:
        sides = []
        for whose, names, values in zip(("student", "teacher"), link.names(), (self.found, self.wanted), strict=True):
            missing = [name for name in names if not isinstance(values.get(name), Tensor)]
            if missing:
                raise ConfigError(f"the {whose}'s layer {missing[0]!r} put out no tensor: link another layer")
            sides.append([values[name] for name in names])
        return sides[0], sides[1]


@contextlib.contextmanager
def tapped(model: nn.Module, layers: Iterable[str], values: Values) -> Iterator[None]:
    """Inside, each of `layers` leaves its output in `values`; a network that runs its layers itself offers `tap`."""
    handles = []
    try:
        for name in sorted(layers):
            own = getattr(model, "tap", None)
            handles.append(own(name, values) if own is not None else _hooked(model, name, values))
        yield
    finally:
        for handle in handles:
            handle.remove()
        values.clear()


def _hooked(model: nn.Module, name: str, values: Values) -> Any:
    named = dict(model.named_modules())
    if name not in named or not name:
        raise ConfigError(f"a link names the layer {name!r}; the network has: {', '.join(list(named)[1:])}")
    return named[name].register_forward_hook(lambda module, inputs, output: values.__setitem__(name, output))
