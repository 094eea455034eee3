"""The network inside what people wrap around it, and copies of it."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import CompressError, ConfigError

COMPILED, PARALLEL = "_orig_mod", "module"
COMPUTED = ("_orig", "_g")  # what torch.nn.utils.prune, spectral_norm and weight_norm compute a tensor from


def inside(model: nn.Module) -> nn.Module:
    """The module in torch.compile's OptimizedModule, DataParallel and DistributedDataParallel, however nested."""
    while True:
        if COMPILED in model._modules:
            model = model._modules[COMPILED]
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model._modules[PARALLEL]
        else:
            return model


def check_network(model: Any) -> None:
    """ConfigError for what is no network."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"a {type(model).__name__} was given where a network, a torch.nn.Module, belongs")


def copy_inside(model: nn.Module) -> nn.Module:
    """A deep copy of the network inside `model`, wrapped parts of it taken out of their wrappers too.

    CompressError in one line where there are no values yet (lazy modules, the meta device), where a tensor is computed
    in each forward pass, or no copy can be made.
    """
    check_network(model)
    found = inside(model)
    for name, tensor in [*found.named_parameters(), *found.named_buffers()]:
        if is_lazy(tensor):
            raise CompressError(f"{name} has no shape yet: run the network once on a batch first")
        if tensor.is_meta:
            raise CompressError(f"{name} lies on the meta device and holds no values: load the network's weights first")
    check_computed(found)
    try:
        found = copy_detached(found)
    except Exception as error:  # noqa: BLE001 - whatever a part of the network raises
        raise CompressError(f"{type(found).__name__} cannot be copied: {str(error).splitlines()[0]}") from error
    for name, module in list(found.named_modules()):
        if inside(module) is not module and name:
            found.set_submodule(name, inside(module))
    return found


def check_computed(model: nn.Module) -> None:
    """CompressError where a module's tensor is an attribute that hooks compute from its parameters."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and any(name + ending in module._parameters for ending in COMPUTED):
                raise CompressError(f"the {name} of {path or type(module).__name__} is computed from other tensors "
                                    "(torch.nn.utils.prune or a parametrization): make it permanent first")


def copy_detached(model: nn.Module) -> nn.Module:
    """A deep copy, in which what a forward pass left in attributes has no history; torch cannot copy it with one."""
    stored = [tensor for module in model.modules() for tensor in with_history(vars(module), set())]
    return copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in stored})


def with_history(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Tensors with a history, in containers however nested."""
    if isinstance(value, Tensor):
        if not value.is_leaf:
            yield value
    elif isinstance(value, (Mapping, list, tuple)) and id(value) not in seen:
        seen.add(id(value))
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from with_history(part, seen)
