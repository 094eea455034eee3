"""Trained weights in and out of files: state dicts, without ever running code that a file carries."""

import argparse
import codecs
import hashlib
import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from methods.core.errors import ConfigError
from methods.core.file.container import write_file
from methods.core.graph.build import COUNTER

NESTED = ("state_dict", "model_state_dict", "model", "net")  # where training scripts keep the state dict
WRAPPERS = ("module.", "_orig_mod.")  # nn.DataParallel and torch.compile put them before names
ATTRIBUTE = "model."  # Lightning's modules keep the network under it
EXTRA = "_extra_state"  # of modules that keep more than tensors; nothing here reads it
# What training scripts store beside the weights. These classes hold numbers and texts and run no code of a file.
HARMLESS = [argparse.Namespace, codecs.encode, np.dtype, *(type(np.dtype(code)) for code in "?bhilBHILefd"),
            (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
            (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar")]
PROVENANCE = "provenance"
SHOWN = 4  # names listed in an error message


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The state dict in `path` on the CPU, floating-point tensors as float32.

    Formats: .safetensors; .npz (one array per name); .pt .pth .th .tar .bin .ckpt (a state dict, or a dict that holds
    one, as "state_dict", "model_state_dict", "model", "net", or as its only dict of tensors; no object is unpickled).
    "module." before every name and "_orig_mod." anywhere are removed. Raises ConfigError for a file that is missing,
    damaged, of another format, or holds anything but tensors.
    """
    path = _existing(path)
    if path.suffix not in _READERS:
        raise ConfigError(f"checkpoint {path} has the suffix {path.suffix!r}; allowed: {', '.join(_READERS)}")
    try:
        found = _READERS[path.suffix](path)
    except pickle.UnpicklingError as error:
        kind = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise ConfigError(f"checkpoint {path} is damaged or holds pickled objects{f' ({kind[1]})' if kind else ''}; "
                          "allowed is a state dict of plain tensors, as torch.save(model.state_dict(), path) "
                          "writes") from None
    except Exception as error:  # noqa: BLE001 - the readers raise whatever damaged bytes lead them to
        raise ConfigError(f"checkpoint {path} is no readable {path.suffix}: {_first_line(error)}") from error
    inner = {name: value for name, value in _inner(path, found).items() if not str(name).endswith(EXTRA)}
    state = {name: _plain(path, name, value) for name, value in inner.items()}
    return _unwrapped(state)


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` under the names of the network inside its wrappers."""
    for wrapper in (*WRAPPERS, WRAPPERS[0]):  # each may be inside the other
        if state and all(name.startswith(wrapper) for name in state):
            state = {name.removeprefix(wrapper): value for name, value in state.items()}
    return {name.replace(WRAPPERS[1], ""): value for name, value in state.items()}


def load_into(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy `state` into `model`: same names, same shapes, or a ConfigError with the first few differences.

    Only the batch norms' `num_batches_tracked` may be missing or superfluous: evaluation never reads it. A "model."
    before every name of `state`, and of none of the model's, is passed over.
    """
    if all(name.startswith(ATTRIBUTE) for name in state) and not any(map(_under_attribute, model.state_dict())):
        state = {name.removeprefix(ATTRIBUTE): tensor for name, tensor in state.items()}
    want = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(COUNTER)}
    have = {name: tensor for name, tensor in state.items() if not name.endswith(COUNTER)}
    shapes = [f"{name} {list(have[name].shape)} instead of {list(want[name].shape)}"
              for name in want if name in have and have[name].shape != want[name].shape]
    faults = {"lacks": [name for name in want if name not in have],
              "holds unknown": [name for name in have if name not in want],
              "has other shapes:": shapes}
    found = [f"{fault} {_some(names)}" for fault, names in faults.items() if names]
    if found:
        raise ConfigError(f"the checkpoint does not fit {type(model).__name__}: it {'; it '.join(found)}")
    counters = {name: tensor for name, tensor in state.items() if name.endswith(COUNTER) and tensor.ndim == 0}
    model.load_state_dict({**have, **counters}, strict=False)


def write_checkpoint(path: str | Path, state: Mapping[str, Tensor], provenance: Mapping[str, object], *,
                     half: bool = False) -> None:
    """Write `state` as safetensors with `provenance` (JSON values) in its header; equal input, equal bytes.

    half    store floating-point tensors as float16 (score the file that was read back, not `state`)
    Raises ConfigError for another suffix, a provenance that is not JSON, or values beyond float16 if `half`.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ConfigError(f"checkpoint {path} has the suffix {path.suffix!r}; written are only .safetensors")
    try:
        header = {PROVENANCE: json.dumps(dict(provenance), sort_keys=True, allow_nan=False)}
    except (TypeError, ValueError) as error:
        raise ConfigError(f"provenance of {path} takes JSON values only: {_first_line(error)}") from error
    stored = {name: _stored(name, tensor, half) for name, tensor in state.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, safetensors.torch.save(stored, header))


def rounded(state: Mapping[str, Tensor], half: bool) -> dict[str, Tensor]:
    """`state` as `write_checkpoint` stores it and `read_checkpoint` reads it."""
    stored = {name: _stored(name, tensor, half) for name, tensor in state.items()}
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in stored.items()}


def read_provenance(path: str | Path) -> dict[str, object]:
    """The provenance that `write_checkpoint` stored in `path`; {} for a file that carries none."""
    path = _existing(path)
    if path.suffix != ".safetensors":
        return {}
    try:
        with safetensors.safe_open(path, framework="pt") as opened:
            header = opened.metadata()
        return json.loads(header[PROVENANCE]) if header is not None and PROVENANCE in header else {}
    except (safetensors.SafetensorError, ValueError, RecursionError) as error:
        raise ConfigError(f"checkpoint {path} has no readable provenance: {_first_line(error)}") from error


def digest_of(path: str | Path) -> str:
    """The first 16 hex digits of the file's sha256."""
    with _existing(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _read_torch(path: Path) -> object:
    with torch.serialization.safe_globals(HARMLESS):
        return torch.load(path, map_location="cpu", weights_only=True)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    archive = np.load(path, allow_pickle=False)
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError("it is a single array")
    with archive:
        return {name: archive[name] for name in archive.files}


_READERS = {".safetensors": safetensors.torch.load_file, ".npz": _read_npz,
            ".pt": _read_torch, ".pth": _read_torch, ".th": _read_torch, ".tar": _read_torch,
            ".bin": _read_torch, ".ckpt": _read_torch}


def _under_attribute(name: str) -> bool:
    return name.startswith(ATTRIBUTE)


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"there is no checkpoint file {path}")
    return path


def _inner(path: Path, found: object) -> Mapping[str, object]:
    """The state dict in what the file holds."""
    if isinstance(found, Mapping) and not any(isinstance(value, Tensor) for value in found.values()):
        nested = [key for key in NESTED if isinstance(found.get(key), Mapping)]
        dicts = [key for key, value in found.items() if _all_tensors(value)]
        if nested:
            return _inner(path, found[nested[0]])
        if len(dicts) > 1:
            raise ConfigError(f"checkpoint {path} holds several state dicts, {_some(list(map(str, dicts)))}: save the "
                              "one that is meant alone")
        found = found[dicts[0]] if dicts else found
    if not isinstance(found, Mapping) or not found:
        raise ConfigError(f"checkpoint {path} holds no state dict; allowed is a non-empty {{name: tensor}}")
    return found


def _all_tensors(value: object) -> bool:
    return isinstance(value, Mapping) and len(value) > 0 and all(isinstance(item, Tensor) for item in value.values())


def _plain(path: Path, name: str, value: object) -> Tensor:
    numeric = isinstance(value, np.ndarray) and value.dtype.kind in "bif"
    tensor = torch.from_numpy(value.copy()) if numeric else value
    if not isinstance(tensor, Tensor) or not isinstance(name, str):
        what = f"dtype {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        raise ConfigError(f"checkpoint {path} holds {name!r} of {what}; allowed are plain tensors only")
    if tensor.layout != torch.strided or tensor.is_complex():
        raise ConfigError(f"checkpoint {path} holds {name!r}, sparse or complex; allowed are plain real tensors")
    return tensor.detach().to(torch.float32) if tensor.is_floating_point() else tensor.detach()


def _stored(name: str, tensor: Tensor, half: bool) -> Tensor:
    """A contiguous copy on the CPU (safetensors takes no channels_last and no shared memory)."""
    tensor = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    if not (half and tensor.is_floating_point()):
        return tensor
    short = tensor.to(torch.float16)
    if not torch.equal(short.isfinite(), tensor.isfinite()):
        raise ConfigError(f"{name} holds {float(tensor.abs().max()):g}, beyond float16 (65504): store it "
                          "with half=False")
    return short


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" … ({len(names)} in all)" if len(names) > SHOWN else "")


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
