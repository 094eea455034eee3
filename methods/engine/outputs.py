"""Networks that return several tensors."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..core.errors import ConfigError
from ..core.train.loaders import describe


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of a value, in order: itself, or those in tuples, lists and mappings; ConfigError for other kinds.

    >>> import torch
    >>> len(tensors_in({"logits": torch.zeros(2), "more": (torch.ones(2), None)}))
    2
    """
    if isinstance(value, Tensor):
        return [value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return []
    if not isinstance(value, (Mapping, tuple, list)):
        raise ConfigError(f"the network makes {describe(value)}: allowed are tensors, and tuples, lists and mappings "
                          "of them")
    parts = value.values() if isinstance(value, Mapping) else value
    return [tensor for part in parts for tensor in tensors_in(part)]
