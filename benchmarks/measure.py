"""Measuring a compressed model: from its file and the test set alone."""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from methods.core.artifact import CompressedModel
from methods.core.errors import CompressError, ConfigError
from methods.core.file.storage import inspect, to_bytes
from methods.core.fit.calibrate import calibrate
from methods.core.fit.norms import reestimate_norms
from methods.core.graph.build import apply, float_bytes, weight_layers
from methods.core.train.task import Batch, Task
from methods.engine.layers import totals
from methods.engine.opened import open_file

from .accounting import IndexBits, account, huffman_total, index_widths, stored_entries, tensor_bits
from .chance import pack

RANGE_METHOD, RANGE_INPUTS, RANGE_BITS = "minmax", 1024, 8  # for methods that leave activations in float
COUNTED_INPUTS = 32  # test inputs on which zero activations are counted for the cost models


def with_ranges(compressed: CompressedModel, skeleton: nn.Module, task: Task) -> CompressedModel:
    """`compressed` with activation quantizers: its own, or the harness's where the method leaves them float."""
    if compressed.activations:
        return compressed
    ranges = calibrate(apply(compressed, skeleton), task.calibration_inputs(RANGE_INPUTS), RANGE_BITS, RANGE_METHOD)
    return dataclasses.replace(compressed, activations=ranges, ranges_by="harness")


def measure(path: Path, skeleton: nn.Module, test: Iterable[Batch], shape: tuple[int, ...], *,
            index_bits: IndexBits = 5, float_policy: tuple[str, ...] = (),
            scores: dict[str, Tensor] | None = None, held_out: Iterable[Batch] | None = None) -> dict:
    """Everything a row says about the file at `path`, as JSON values. `test` is iterated once.

    shape       of one input [C, H, W];  index_bits of the papers' accountings and of the paper-mode bytes, one
                width, {layer: width} or "auto"
    scores      {digest of decoded tensors: which inputs are right in float} on this very test set, looked up, added to
    held_out    batches for `held_out_top1`, in integer arithmetic;  `right`: see `chance.pack`
    """
    opened = open_file(path, skeleton, shape, float_policy=float_policy)
    compressed, module, integer = opened.compressed, opened.module, opened.fast
    index_bits = index_widths(compressed, index_bits)
    batches = iter(test)
    first = next(batches)
    scores, decoded = {} if scores is None else scores, digest_of_state(module)
    found = right_of([integer] if decoded in scores else [integer, module], itertools.chain([first], batches))
    right = {"float": scores.setdefault(decoded, found[-1]), "integer": found[0]}
    chosen = {} if held_out is None else {"held_out_top1": top1_of(right_of([integer], held_out)[0])}
    hardware = opened.hardware(first[0][:COUNTED_INPUTS])
    dense = sum(layer.weight.numel() for layer in weight_layers(skeleton).values())
    costs, dense_macs = opened.costs(), sum(opened.dense.macs.values())
    size, dense_bytes = inspect(path), float_bytes(skeleton)
    return {
        **{f"top1_{kind}": top1_of(answers) for kind, answers in right.items()}, **chosen,
        "right": {kind: pack(answers) for kind, answers in right.items()},
        "bytes": size["bytes"], "bytes_split": size["split"], "float32_bytes": dense_bytes,
        "size_ratio": size["bytes"] / dense_bytes,
        "paper_mode_bytes": len(to_bytes(compressed, mode="paper", index_bits=index_bits)[0]),
        "accounting": account(compressed, dense, index_bits), "dense_weights": dense, "dense_macs": dense_macs,
        "cost": totals(costs, dense), "hardware": {"setting": hardware["setting"], **hardware["total"]},
        "ranges_by": compressed.ranges_by,
        "integer": {"float_nodes": integer.float_nodes,
                    "wide_layers": [n for n, layer in integer.layers.items() if layer.weight.width > 8]},
        "layers": layer_table(compressed, costs, index_bits, {name: layer.weight.numel() for name, layer
                                                              in weight_layers(skeleton).items()}),
    }


def reestimate_batchnorm(model: nn.Module, inputs: Tensor) -> nn.Module:
    """`model` with its batch norms estimated anew on `inputs`, in place.

    Not part of any method: a labelled option of a row, because it needs data. ConfigError where that is not possible.
    """
    try:
        return reestimate_norms(model, inputs)
    except CompressError as error:
        raise ConfigError(f"bn_reestimation = {len(inputs)}: {error}") from None


def digest_of_state(module: nn.Module) -> str:
    """sha256 of names, shapes and bytes of all its tensors."""
    found = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


@torch.no_grad()
def right_of(networks: list, batches: Iterable[Batch]) -> list[Tensor]:
    """Of each network which inputs it has right, bool [n] on the CPU, over one pass of the same batches."""
    found: list[list[Tensor]] = [[] for _ in networks]
    for inputs, targets in batches:
        for right, network in zip(found, networks, strict=True):
            right.append((network(inputs).argmax(1) == targets).cpu())
    return [torch.cat(right) if right else torch.zeros(0, dtype=torch.bool) for right in found]


def top1_of(right: Tensor) -> float:
    """Percent of true values."""
    return 100.0 * int(right.sum()) / max(len(right), 1)


def layer_table(compressed: CompressedModel, costs: Mapping, index_bits: Mapping[str, int], dense: Mapping[str, int]
                ) -> dict[str, dict]:
    """{layer: what the papers' tables print per layer, in our numbers}; `dense` weights are what density refers to."""
    rows = {}
    for name, cost in costs.items():
        tensor = compressed.weights.get(name)
        density = cost.density * cost.weights / dense[name]  # weights of removed channels are pruned weights too
        row = {"weights": dense[name], "density": density, "bits": cost.weight_bits, "macs": cost.macs}
        if tensor is not None:
            width = index_bits[name]
            bits = tensor_bits(tensor, width)
            codes, gaps = stored_entries(tensor, width)
            row |= {"index_bits": width, "levels": len(tensor.codes[tensor.mask].unique()),
                    "code_bits_huffman": huffman_total(codes) / max(len(codes), 1),
                    "index_bits_huffman": huffman_total(gaps) / max(len(gaps), 1),
                    "fillers": len(codes) - tensor.kept,
                    "rate_prune_quantize": bits["prune_quantize"] / (32 * dense[name]),
                    "rate_prune_quantize_huffman": bits["prune_quantize_huffman"] / (32 * dense[name])}
        rows[name] = row
    return rows


