"""Between a module and a compressed model: collecting what stays float, and rebuilding the module."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..artifact import DTYPES, CompressedModel, CompressedTensor, Topology, check_compressed, tensor_name
from ..errors import CompressError
from .residual import is_block
from .weights import float_layers, warn_of_float, weight_layers
from .wrapped import copy_inside, inside

COUNTER = "num_batches_tracked"  # counts training batches; evaluation never reads it
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def frozen_layers(model: nn.Module) -> list[str]:
    """The weight layers whose weight requires no gradient: `budget.leaving(frozen_layers(model))` leaves them alone."""
    return [name for name, layer in weight_layers(inside(model)).items() if not layer.weight.requires_grad]


def own_copy(model: nn.Module) -> nn.Module:
    """What a method works on: a checked deep copy of the network, without wrappers (torch.compile, DataParallel).

    CompressError as of `copy_inside` and `check_finite`; `model` is left as it is.

    >>> layer = nn.Linear(2, 2)
    >>> own_copy(torch.nn.DataParallel(layer)).weight is layer.weight
    False
    """
    model = copy_inside(model)
    check_finite(model)
    return model


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without what modules add through `get_extra_state`, which stays with the skeleton, and with one
    name for each tensor of a module that has several."""
    again = tuple(f"{path}." for path in second_names(model))
    return {name: value for name, value in model.state_dict().items()
            if isinstance(value, Tensor) and not (again and name.startswith(again))}


def float_bytes(model: nn.Module) -> int:
    """Bytes of every float of a network in float32, each tensor once: what size ratios divide by."""
    return 4 * sum(value.numel() for value in tensors_of(model).values() if value.is_floating_point())


def second_names(model: nn.Module) -> dict[str, nn.Module]:
    """{path: module} of the modules that are there under an earlier path already."""
    first = dict(model.named_modules())
    return {path: module for path, module in model.named_modules(remove_duplicate=False) if path not in first}


def check_finite(model: nn.Module) -> None:
    """Raise CompressError naming the first tensor of `model` that holds NaN or infinity.

    Also where the weight of a layer is not a float32 parameter of its own, or a tensor is of a kind that no file holds.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise CompressError("a TorchScript module has no layers to compress: give the network it was made from")
    owners: dict[nn.Parameter, str] = {}
    for name, layer in weight_layers(model).items():
        if not isinstance(layer.weight, nn.Parameter):
            raise CompressError(f"the weight of {name} is computed from other tensors (torch.nn.utils.prune or a "
                                "parametrization): make it permanent first")
        if layer.weight.dtype != torch.float32:
            raise CompressError(f"the weight of {name} is {layer.weight.dtype}: call model.float() first")
        if layer.weight in owners:
            raise CompressError(f"{owners[layer.weight]} and {name} share one weight: give each a copy of its own")
        owners[layer.weight] = name
    for name, tensor in tensors_of(model).items():
        if str(tensor.dtype).removeprefix("torch.") not in DTYPES or tensor.layout != torch.strided:
            what = "sparse" if tensor.layout != torch.strided else str(tensor.dtype).removeprefix("torch.")
            raise CompressError(f"{name} is {what}: a file holds dense tensors of {', '.join(DTYPES)}")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CompressError(f"{name} holds NaN or infinite values: the network cannot be compressed")


def assemble(model: nn.Module, weights: Mapping[str, CompressedTensor], **fields) -> CompressedModel:
    """A CompressedModel of `weights` (any subset of the layers) and all else that `model` holds, as float.

    Warns where weights that have no codes make up more than 5 % of the network, and names them in the notes.
    """
    taken = {tensor_name(layer) for layer in weights}
    rest = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors_of(model).items()
            if name not in taken and not name.endswith(COUNTER)}
    compressed = CompressedModel(dict(weights), rest, **fields)
    warn_of_float(compressed)
    left = float_layers(compressed) if weights else {}
    return replace(compressed, notes={**compressed.notes, "float_layers": left}) if left else compressed


def apply(compressed: CompressedModel, skeleton: nn.Module) -> nn.Module:
    """A copy of `skeleton` in eval mode with the decoded weights and the compressed model's topology.

    Raises CompressError where names or shapes of the two do not fit, or they are no compressed model and no network.
    """
    check_compressed(compressed, "apply(compressed, network)")
    model = copy_inside(skeleton).cpu()
    remove_blocks(model, compressed.topology.removed)
    _fold(model, compressed.topology)
    _resize(model, compressed.topology)
    want, have = tensors_of(model), compressed.state_dict()
    missing = [name for name in want if name not in have and not name.endswith(COUNTER)]
    unknown = [name for name in have if name not in want]
    wrong = [name for name in have if name in want and have[name].shape != want[name].shape]
    for names, fault in ((missing, "lacks"), (unknown, "holds unknown"), (wrong, "has other shapes for")):
        if names:
            raise CompressError(f"the compressed model {fault} {', '.join(names[:4])}"
                                f"{' …' if len(names) > 4 else ''}: it belongs to another network")
    state = OrderedDict(have)  # with the versions that some modules ask for when they load
    vars(state)["_metadata"] = vars(model.state_dict())["_metadata"]
    model.load_state_dict(state, strict=False)
    return model.eval()


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise CompressError(f"the network has no layer {name!r}: the compressed model belongs to another") from None


def remove_blocks(model: nn.Module, blocks: Iterable[str]) -> None:
    """Put the identity in the place of residual blocks, in place; CompressError for what is none (see `is_block`)."""
    for path in blocks:
        if not path or not is_block(_module(model, path)):
            raise CompressError(f"{path or 'the network'} cannot be removed: it is no residual block whose shortcut is "
                                "the identity")
        model.set_submodule(path, nn.Identity())


def _fold(model: nn.Module, topology: Topology) -> None:
    for layer, norm in topology.folded.items():
        module = _module(model, layer)
        if not isinstance(module, (nn.Conv2d, nn.Linear)) or not isinstance(_module(model, norm), NORMS):
            raise CompressError(f"{norm} cannot be folded into {layer} in this network")
        if module.bias is None:
            module.bias = nn.Parameter(torch.zeros(module.weight.shape[0]))
        model.set_submodule(norm, nn.Identity())


def _resize(model: nn.Module, topology: Topology) -> None:
    for name, (out, into) in topology.widths.items():
        module = _module(model, name)
        _check_width(name, module, out, into)
        shape: dict[str, tuple[int, ...]] = {}
        if isinstance(module, nn.Conv2d):
            _resize_conv(name, module, out, into)
            shape = {"weight": (out, into // module.groups, *module.kernel_size), "bias": (out,)}
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = out, into
            shape = {"weight": (out, into), "bias": (out,)}
        else:
            module.num_features = out
            shape = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (out,))
        for key, size in shape.items():
            if isinstance(getattr(module, key), Tensor):
                _replace(module, key, torch.empty(size))


def _check_width(name: str, module: nn.Module, out: int, into: int) -> None:
    """CompressError unless a layer can lose channels and keep so many."""
    if isinstance(module, nn.Conv2d):
        there = module.out_channels, module.in_channels
    elif isinstance(module, nn.Linear):
        there = module.out_features, module.in_features
    elif isinstance(module, NORMS):
        there = module.num_features, module.num_features
    else:
        raise CompressError(f"{name} is no layer whose width can change (conv, linear, batch norm)")
    if not (1 <= out <= there[0] and 1 <= into <= there[1]):
        raise CompressError(f"{name} cannot have {out} outputs and {into} inputs: it has {there[0]} and {there[1]}")


def _resize_conv(name: str, conv: nn.Conv2d, out: int, into: int) -> None:
    """Widths of a conv; one with groups loses whole groups."""
    group_out, group_in = conv.out_channels // conv.groups, conv.in_channels // conv.groups
    if conv.groups > 1:
        groups = into // group_in
        if groups < 1 or (groups * group_out, groups * group_in) != (out, into):
            raise CompressError(f"{name} cannot have {out} outputs and {into} inputs: its groups have {group_out} "
                                f"and {group_in}")
        conv.groups = groups
    conv.out_channels, conv.in_channels = out, into


def _replace(module: nn.Module, key: str, value: Tensor) -> None:
    if key in module._parameters:
        setattr(module, key, nn.Parameter(value))
    else:
        module.register_buffer(key, value)
