"""Joint pruning and quantization of trained networks: one module per paper, one call for all.

    compressed = deep_compression.compress(model, task, Budget(density=0.1, bits=5), deep_compression.Config(),
                                           torch.Generator().manual_seed(0))
    encode(compressed, "net.jc"); network = apply(decode("net.jc"), skeleton)
    opened = open_file("net.jc", skeleton, (3, 32, 32)); opened(x)  # in integers; also costs, verify, to_onnx

Every method module has DATA ("train", "calibration" or "none"), a frozen `Config`, and `compress`. A `Config` with a
property `data` says itself what its settings need (`data_of`).

For a method of one's own: `own_copy` the network, `ready` the task, `train` with `Hooks`, `assemble` the codes. To go
on training what was pruned, with its zeros kept:

    masks = {name: tensor.mask for name, tensor in compressed.weights.items()}
    network = apply(compressed, skeleton)
    train(network, task, Recipe(epochs=5, lr=1e-3), torch.Generator().manual_seed(0), hooks=MaskHooks(masks))
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
from .core.fit.calibrate import calibrate
from .core.fit.prune import MaskHooks, apply_masks, keep_global, keep_largest, keep_local
from .core.fit.sixteen_bit import sixteen_bit
from .core.fit.size import Knob, compress_to_size
from .core.graph.build import apply, assemble, frozen_layers, own_copy, weight_layers
from .core.graph.shrink import shrink
from .core.graph.weights import float_layers
from .core.train.finetune import Hooks, Recipe, train
from .core.train.metric import Metric
from .core.train.recipe import Distill, Link
from .core.train.run import NullRun, Run
from .core.train.start import ready
from .core.train.task import Task
from .engine.opened import Opened, open_file

__all__ = [
    "ActivationQuantizer", "Affine", "Budget", "BudgetError", "Codebook", "CompressError", "CompressWarning",
    "CompressedModel", "CompressedTensor", "ConfigError", "Distill", "FormatError", "GraphError", "Hooks", "Knob",
    "Levels", "Link", "MaskHooks", "Metric", "NullRun", "Opened", "Recipe", "Run", "Task", "Topology",
    "TrainingDiverged", "Window", "apply", "apply_masks", "assemble", "calibrate", "compress_to_size", "data_of",
    "decode", "encode", "find_method", "float_layers", "frozen_layers", "inspect", "keep_global", "keep_largest",
    "keep_local", "load", "method_names", "open_file", "own_copy", "ready", "shrink", "sixteen_bit",
    "train", "weight_layers",
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
