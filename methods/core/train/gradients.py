"""Gradients where a caller has switched them off."""

import contextlib
from collections.abc import Iterator

import torch

from ..errors import ConfigError


@contextlib.contextmanager
def gradients() -> Iterator[None]:
    """Gradients inside, also in torch.no_grad(); ConfigError in inference mode, whose tensors never have any."""
    if torch.is_inference_mode_enabled():
        raise ConfigError("called inside torch.inference_mode(): its tensors have no gradients, and they are needed "
                          "here; allowed is a call outside it, or inside torch.no_grad()")
    with torch.enable_grad():
        yield
