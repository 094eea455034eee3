"""Joint pruning and quantization of trained networks: one module per paper, one call for all.

    compressed = deep_compression.compress(model, task, Budget(density=0.1, bits=5), deep_compression.Config(),
                                           torch.Generator().manual_seed(0))
    encode(compressed, "net.jc"); network = apply(decode("net.jc"), skeleton)
    opened = open_file("net.jc", skeleton, (3, 32, 32)); opened(x)  # in integers; also costs, verify, to_onnx

Every method takes a size of the file, though most have another budget: `compress_to_size` turns the one knob that the
method names (density, bits, ...) until the file fits. With the other fields that the method needs:

    compressed = compress_to_size(deep_compression, model, task, Budget(size_ratio=0.05, bits=5),
                                  deep_compression.Config(), torch.Generator().manual_seed(0))

Every method module has DATA ("train", "held_out", "calibration" or "none": see `Task.seen_as`), a frozen `Config`, and
`compress`. A `Config` with a property `data` says itself what its settings need (`data_of`).

For a method of one's own: `own_copy` the network, `ready` the task, `train` with `Hooks`, `assemble` the codes. To go
on training what was pruned, with its zeros kept:

    masks = {name: tensor.mask for name, tensor in compressed.weights.items()}
    network = apply(compressed, skeleton)
    train(network, task, Recipe(epochs=5, lr=1e-3), torch.Generator().manual_seed(0), hooks=MaskHooks(masks))
"""

import importlib
import importlib.metadata
import pkgutil
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .core.errors import ConfigError

if TYPE_CHECKING:
    from ._public import *  # noqa: F403

__version__ = "0.2.0"
ROOMS = ("core", "engine")
GROUP = "jointcompress.methods"  # of entry points, by which another distribution brings methods
OWN = ("data_of", "find_method", "method_names")


def __getattr__(name: str) -> Any:
    """A name of `_public`, all of which are loaded at once."""
    if name.startswith("__") and name != "__all__":
        raise AttributeError(name)
    public = importlib.import_module("._public", __name__)
    globals().update({known: getattr(public, known) for known in public.NAMES}, __all__=[*public.NAMES, *OWN])
    try:
        return globals()[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def method_names() -> list[str]:
    """The methods there are: every module or package beside this file, but for the rooms they share, and those that
    other distributions bring by entry points:

        [options.entry_points]
        jointcompress.methods =
            theirs = their_package.their_module
    """
    return sorted({*_own_names(), *_brought()})


def _own_names() -> set[str]:
    found = (info.name for info in pkgutil.iter_modules(__path__))  # noqa: F405
    return {name for name in found if name not in ROOMS and not name.startswith("_")}


def _brought() -> dict[str, importlib.metadata.EntryPoint]:
    return {point.name: point for point in importlib.metadata.entry_points(group=GROUP)}


def data_of(method: ModuleType, config: Any) -> str:
    """What `compress` needs to see with this configuration, a kind of `Task.seen_as`."""
    return getattr(config, "data", method.DATA)


def find_method(name: str) -> ModuleType:
    """The module of a method; ConfigError, listing the names, if there is none. Of equal names ours is meant."""
    if name in _own_names():
        return importlib.import_module(f".{name}", __name__)
    if name not in _brought():
        raise ConfigError(f"unknown method {name!r}; there are: {', '.join(method_names())}")
    try:
        found = _brought()[name].load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"method {name!r} ({_brought()[name].value}) cannot be imported: {error}") from error
    lacking = [part for part in ("DATA", "Config", "compress") if not hasattr(found, part)]
    if lacking:
        raise ConfigError(f"method {name!r} ({_brought()[name].value}) lacks {', '.join(lacking)}: see core/method.py")
    return found
