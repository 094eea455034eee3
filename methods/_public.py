"""What `methods` offers by name; loaded when the first of it is asked for, since torch takes seconds to load."""

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
from .core.fit.prune import MaskHooks, apply_masks, global_densities, keep_global, keep_largest, keep_local
from .core.fit.sixteen_bit import sixteen_bit
from .core.fit.size import Knob, compress_to_size
from .core.graph.build import apply, assemble, frozen_layers, own_copy, weight_layers
from .core.graph.shrink import shrink
from .core.graph.weights import float_layers
from .core.method import check_call
from .core.train.finetune import Hooks, Recipe, train
from .core.train.metric import Metric
from .core.train.recipe import Distill, Link
from .core.train.run import NullRun, Run
from .core.train.start import ready
from .core.train.task import Task
from .engine.opened import Opened, open_file

__all__ = NAMES = [
    "ActivationQuantizer", "Affine", "Budget", "BudgetError", "Codebook", "CompressError", "CompressWarning",
    "CompressedModel", "CompressedTensor", "ConfigError", "Distill", "FormatError", "GraphError", "Hooks", "Knob",
    "Levels", "Link", "MaskHooks", "Metric", "NullRun", "Opened", "Recipe", "Run", "Task", "Topology",
    "TrainingDiverged", "Window", "apply", "apply_masks", "assemble", "calibrate", "check_call", "compress_to_size",
    "decode", "encode", "float_layers", "frozen_layers", "global_densities", "inspect", "keep_global", "keep_largest",
    "keep_local", "load", "open_file", "own_copy", "ready", "shrink", "sixteen_bit",
    "train", "weight_layers",
]
