"""Joint pruning and quantization of trained networks: one module per paper, one call for all.

    compressed = deep_compression.compress(model, task, Budget(density=0.1, bits=5), deep_compression.Config(),
                                           torch.Generator().manual_seed(0))
    encode(compressed, "net.jc"); network = apply(decode("net.jc"), skeleton)

Every method module has DATA ("train", "calibration" or "none"), a frozen `Config`, and `compress`. A `Config` with a
property `data` says itself what its settings need (`data_of`).
"""

import importlib
import pkgutil
from types import ModuleType
from typing import Any

from .core.artifact import (
    ActivationQuantizer,
    Affine,
    Codebook,
    CompressedModel,
    CompressedTensor,
    Levels,
    Topology,
    Window,
)
from .core.budget import Budget
from .core.errors import (
    BudgetError,
    CompressError,
    CompressWarning,
    ConfigError,
    FormatError,
    GraphError,
    TrainingDiverged,
)
from .core.file.storage import decode, encode, inspect, load
from .core.graph.build import apply
from .core.graph.shrink import shrink
from .core.graph.weights import float_layers
from .core.train.finetune import Recipe
from .core.train.task import Task

__all__ = [
    "ActivationQuantizer", "Affine", "Budget", "BudgetError", "Codebook", "CompressError", "CompressWarning",
    "CompressedModel", "CompressedTensor", "ConfigError", "FormatError", "GraphError", "Levels", "Recipe", "Task",
    "Topology", "TrainingDiverged", "Window", "apply", "data_of", "decode", "encode", "find_method",
    "float_layers", "inspect", "load", "method_names", "shrink",
]

ROOMS = ("core", "engine")


def method_names() -> list[str]:
    """The methods there are: every module or package beside this file, but for the rooms they share."""
    return sorted(info.name for info in pkgutil.iter_modules(__path__) if info.name not in ROOMS)


def data_of(method: ModuleType, config: Any) -> str:
    """What `compress` needs to see with this configuration: "train", "calibration" or "none" (task = None)."""
    return getattr(config, "data", method.DATA)


def find_method(name: str) -> ModuleType:
    """The module of a method; ConfigError, listing the names, if there is none."""
    if name not in method_names():
        raise ConfigError(f"unknown method {name!r}; there are: {', '.join(method_names())}")
    return importlib.import_module(f".{name}", __name__)
