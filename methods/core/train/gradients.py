"""Gradients where a caller has switched them off, and a look at them that leaves no trace."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from ..errors import ConfigError
from ..graph.wrapped import with_history
from .loaders import map_tensors


@contextlib.contextmanager
def gradients() -> Iterator[None]:
    """Gradients inside, also in torch.no_grad(); ConfigError in inference mode, whose tensors never have any."""
    if torch.is_inference_mode_enabled():
        raise ConfigError("called inside torch.inference_mode(): its tensors have no gradients, and they are needed "
                          "here; allowed is a call outside it, or inside torch.no_grad()")
    with torch.enable_grad():
        yield


@contextlib.contextmanager
def look(model: nn.Module) -> Iterator[None]:
    """As `gradients`; what forward passes inside leave in attributes of `model` has no history afterwards: torch cannot
    copy it with one."""
    try:
        with gradients():
            yield
    finally:
        for module in model.modules():
            for name, value in list(vars(module).items()):
                if any(True for _ in with_history(value, set())):
                    vars(module)[name] = map_tensors(lambda x: x if x.is_leaf else x.detach(), value)
