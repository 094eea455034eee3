"""What every operation of a network is, in one table: how it is recognised, and what it does to integer codes.

Whatever walks a graph asks this table. An operation that it does not list is a "barrier": codes are decoded before
it, it computes with real values itself, and ranges are taken after it.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SUMS, CLAMPS, MOVES, JOINS, SAME, REAL = "sums", "clamps", "moves", "joins", "same", "real"


@dataclass(frozen=True)
class Operation:
    """One row of the table.

    name       what `Node.op` says
    acts       on codes: SUMS reads quantized values and makes new ones; CLAMPS is a clamp, on codes as on values; MOVES
               puts values (or 0) elsewhere, or takes the largest; JOINS puts several tensors into one; SAME returns
               what it is given; REAL needs real values
    modules    of torch.nn (and subclasses with the same forward);  functions, methods  as they are called
    named      classes and functions of other packages, by name
    apart      it keeps channels apart and commutes with factors >= 0 per channel
    aliases    it may return the tensor that it was given, or a view of it
    positive   what it returns is never below 0
    elementwise  every output value depends on the input values of its own place alone
    """

    name: str
    acts: str
    modules: tuple[type[nn.Module], ...] = ()
    functions: tuple[Callable, ...] = ()
    methods: tuple[str, ...] = ()
    named: tuple[str, ...] = ()
    apart: bool = False
    aliases: bool = False
    positive: bool = False
    elementwise: bool = False


TABLE = (
    Operation("input", REAL),
    Operation("conv", SUMS, (nn.Conv2d,)),
    Operation("linear", SUMS, (nn.Linear,)),
    Operation("bn", REAL, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)),
    Operation("add", SUMS, (), (operator.add, operator.iadd, torch.add), ("add", "add_")),
    Operation("avgpool", SUMS, (nn.AvgPool2d, nn.AdaptiveAvgPool2d),
              (F.avg_pool2d, F.adaptive_avg_pool2d, torch.mean), ("mean",), apart=True),
    Operation("relu", CLAMPS, (nn.ReLU,), (F.relu, torch.relu, F.relu_, torch.relu_), ("relu", "relu_"), apart=True,
              positive=True, elementwise=True),
    Operation("clamp", CLAMPS, (nn.ReLU6, nn.Hardtanh),
              (F.relu6, F.hardtanh, torch.clamp, torch.clip, torch.clamp_min, torch.clamp_max),
              ("clamp", "clip", "clamp_", "clip_", "clamp_min", "clamp_max"), elementwise=True),
    Operation("maxpool", MOVES, (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool2d),
              (F.max_pool1d, F.max_pool2d, F.max_pool3d, F.adaptive_max_pool2d, torch.max_pool2d), apart=True),
    Operation("flatten", MOVES, (nn.Flatten,), (torch.flatten, torch.reshape), ("flatten", "view", "reshape"),
              apart=True, aliases=True),
    Operation("view", MOVES, (nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle),
              (torch.permute, torch.transpose, torch.movedim, torch.swapaxes, torch.squeeze, torch.unsqueeze,
               torch.chunk, torch.split, torch.tensor_split, torch.unbind, torch.unflatten, torch.narrow, torch.select,
               torch.roll, torch.flip, torch.repeat_interleave, torch.tile, F.pixel_shuffle, F.pixel_unshuffle,
               F.channel_shuffle, operator.getitem),
              ("permute", "transpose", "movedim", "swapaxes", "squeeze", "unsqueeze", "chunk", "split", "tensor_split",
               "unbind", "unflatten", "narrow", "select", "roll", "flip", "expand", "expand_as", "repeat",
               "repeat_interleave", "tile", "view_as", "reshape_as", "t", "__getitem__"), ("Permute",), aliases=True),
    Operation("resize", MOVES, (nn.Upsample, nn.UpsamplingNearest2d), (F.interpolate, F.upsample), apart=True),
    Operation("pad", MOVES, (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d,
                             nn.ConstantPad3d, nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReplicationPad1d,
                             nn.ReplicationPad2d, nn.CircularPad1d, nn.CircularPad2d), (F.pad,), apart=True),
    Operation("cat", JOINS, (), (torch.cat, torch.concat, torch.concatenate, torch.stack)),
    Operation("identity", SAME, (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
                                 nn.FeatureAlphaDropout),
              (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, torch.dropout),
              ("contiguous", "clone", "detach"), ("StochasticDepth", "stochastic_depth", "DropPath", "drop_path",
                                                  "DropBlock2d", "drop_block2d"), apart=True, aliases=True),
    Operation("squash", REAL, (nn.Sigmoid, nn.Hardsigmoid, nn.Softplus),
              (F.sigmoid, torch.sigmoid, F.hardsigmoid, F.softplus, torch.abs, torch.square, torch.exp, torch.sqrt),
              ("sigmoid", "abs", "square", "exp", "sqrt"), positive=True, elementwise=True),
    Operation("softmax", REAL, (nn.Softmax, nn.Softmax2d), (F.softmax, torch.softmax), ("softmax",), positive=True),
    Operation("curve", REAL, (nn.SiLU, nn.Hardswish, nn.GELU, nn.Mish, nn.ELU, nn.SELU, nn.CELU, nn.LeakyReLU, nn.Tanh,
                              nn.Softsign, nn.LogSigmoid),
              (F.silu, F.hardswish, F.gelu, F.mish, F.elu, F.selu, F.celu, F.leaky_relu, F.tanh, torch.tanh,
               F.logsigmoid, operator.mul, operator.imul, torch.mul, operator.sub, operator.isub, torch.sub,
               operator.truediv, operator.itruediv, torch.div, operator.neg),
              ("tanh", "mul", "mul_", "sub", "sub_", "div", "div_"), elementwise=True),
    Operation("barrier", REAL),
)

OPERATIONS = {row.name: row for row in TABLE}
_BY_TYPE = {kind: row for row in TABLE for kind in row.modules}
_BY_FUNCTION = {function: row for row in TABLE for function in row.functions}
_BY_METHOD = {method: row for row in TABLE for method in row.methods}
_BY_NAME = {name: row for row in TABLE for name in row.named}
# Never the memory of what they are given, though `aliases` of their row.
COPIES = ("clone", "roll", "flip", "repeat", "repeat_interleave", "tile", torch.clone, torch.roll, torch.flip,
          torch.tile, torch.repeat_interleave)
SIZE_METHODS = ("size", "dim", "ndimension", "numel", "nelement")  # what a tensor says of its shape alone
SIZE_ATTRIBUTES = ("shape", "ndim", "dtype")


def of_module(module: nn.Module) -> Operation | None:
    """The operation of a module; None where the table has none. A subclass counts if it computes as its parent."""
    found = _BY_TYPE.get(type(module)) or _BY_NAME.get(type(module).__name__)
    if found is not None:
        return found
    same = (kind for kind in _BY_TYPE if isinstance(module, kind) and type(module).forward is kind.forward
            and getattr(type(module), "_conv_forward", None) is getattr(kind, "_conv_forward", None))
    kind = next(same, None)
    return None if kind is None else _BY_TYPE[kind]


def of_call(target: Callable | str) -> Operation | None:
    """The operation of a function, or of a method by its name; None where the table has none."""
    if isinstance(target, str):
        return _BY_METHOD.get(target)
    return _BY_FUNCTION.get(target) or _BY_NAME.get(getattr(target, "__name__", ""))


def changes_its_input(target: Callable | str | nn.Module, args: tuple, kwargs: dict) -> bool:
    """Whether a call writes into the first tensor that it is given."""
    if isinstance(target, nn.Module):
        return bool(getattr(target, "inplace", False)) and of_module(target) is not OPERATIONS["identity"]
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):
        return True
    if target in (F.relu, F.relu6, F.silu, F.hardswish, F.hardsigmoid, F.elu, F.leaky_relu, F.hardtanh, F.mish):
        return bool(kwargs.get("inplace", target is F.relu and len(args) > 1 and args[1]))
    return getattr(operator, name, None) is target and name.startswith("i") and name[1:] in dir(operator)


def count_macs(module: nn.Module | None, inputs: tuple[Tensor, ...], output: Tensor) -> int:
    """Multiply-accumulates of one call of a module with weights; 0 for everything else."""
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return inputs[0].numel() * module.weight[0].numel()
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
        return output.numel() * module.weight[0].numel()
    return 0
