"""The network inside what people wrap around it, and copies of it."""

import copy
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from ..errors import CompressError, ConfigError

COMPILED, PARALLEL = "_orig_mod", "module"


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

    CompressError in one line where there are no values yet (lazy modules, the meta device), or no copy can be made.
    """
    check_network(model)
    found = inside(model)
    for name, tensor in [*found.named_parameters(), *found.named_buffers()]:
        if is_lazy(tensor):
            raise CompressError(f"{name} has no shape yet: run the network once on a batch first")
        if tensor.is_meta:
            raise CompressError(f"{name} lies on the meta device and holds no values: load the network's weights first")
    try:
        found = copy.deepcopy(found)
    except Exception as error:  # noqa: BLE001 - whatever a part of the network raises
        raise CompressError(f"{type(found).__name__} cannot be copied: {str(error).splitlines()[0]}") from error
    for name, module in list(found.named_modules()):
        if inside(module) is not module and name:
            found.set_submodule(name, inside(module))
    return found
