"""A compressed file elsewhere: as ONNX, compared with our integers and timed beside them, and as a C header."""

import dataclasses
import itertools
import os
import tempfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from methods.core.artifact import CompressedModel
from methods.core.errors import ConfigError
from methods.core.file.storage import decode
from methods.engine import onednn
from methods.engine.export import Exported, compare_onnx, onnx_session, openvino_session, to_c_header, to_onnx
from methods.engine.fast import FastNetwork

from .baselines import skeleton
from .data import Dataset, open_dataset, test_batches
from .networks import find
from .speed import BASELINE, FAST, as_table, check_positive, in_turn

ONNX_OPTIONS = {"opset": 13, "residual": "float", "arithmetic": "qdq", "inputs": 10_000}  # and their defaults


def export_file(options: Namespace, console: Console) -> None:
    """`export FILE OUT`: an ONNX graph, compared with our integers over test inputs, or the arrays of a C header."""
    kinds: dict[str, Callable] = {".onnx": _export_onnx, ".h": _export_header}
    if options.out.suffix not in kinds:
        raise ConfigError(f"{options.out}: written are only {' and '.join(kinds)}")
    given = {name: value for name in ONNX_OPTIONS if (value := getattr(options, name)) is not None}
    if options.out.suffix != ".onnx" and (given or options.float_policy):
        name = next(iter([*given, "float-policy"]))
        raise ConfigError(f"--{name} is of .onnx files: {options.out} is none")
    settings = Namespace(**{**vars(options), **ONNX_OPTIONS, **given})
    check_positive({"inputs": settings.inputs})
    dataset, compressed = open_dataset(options.task, options.data_dir, options.image_size), decode(options.file)
    kinds[options.out.suffix](settings, dataset, compressed, skeleton(dataset, options.network), console)


def _export_header(options: Namespace, dataset: Dataset, compressed: CompressedModel, network: nn.Module,
                   console: Console) -> None:
    written = to_c_header(compressed, network, options.out, windows=options.windows)
    console.print(as_stored(options.out, written), soft_wrap=True)


def _export_onnx(options: Namespace, dataset: Dataset, compressed: CompressedModel, network: nn.Module,
                 console: Console) -> None:
    policy = tuple(options.float_policy)
    written = to_onnx(compressed, network, options.out, input_shape(dataset), opset=options.opset,
                      residual=options.residual, windows=options.windows, arithmetic=options.arithmetic,
                      float_policy=policy)
    console.print(as_stored(options.out, written), soft_wrap=True)
    inexact = [name for name, kind in written.layers.items() if kind == "float32"]
    if inexact:
        console.print(f"float32, because 8 bits do not hold them exactly: {', '.join(inexact)}", soft_wrap=True)
    ours = FastNetwork(dataclasses.replace(compressed, windows={}), network, policy)
    batches = pictures(dataset, options.network, 250)
    found = compare_onnx(options.out, ours, itertools.islice(batches, -(-options.inputs // 250)))
    console.print(f"{found.inputs:,} test inputs: top-1 {found.top1_ours:.2f} % here, {found.top1_onnx:.2f} % in ONNX "
                  f"Runtime; the same class for {found.same_argmax:.2f} %; outputs differ by at most "
                  f"{found.largest_difference:.3g} (the largest is {found.largest_output:.3g})", soft_wrap=True)


def as_stored(path: Path, written: Exported) -> str:
    kinds = list(written.layers.values())
    return (f"{path}: {written.bytes:,} bytes; weights of "
            + ", ".join(f"{kinds.count(kind)} layers as {kind}" for kind in dict.fromkeys(kinds)))


def bench_file(options: Namespace, console: Console) -> None:
    """`bench FILE`: CPU time of float32, our integers and the engines that are installed, in one run."""
    check_positive({"batch": options.batch, "rounds": options.rounds, "threads": options.threads})
    torch.set_num_threads(options.threads)
    dataset, compressed = open_dataset(options.task, options.data_dir, options.image_size), decode(options.file)
    network = skeleton(dataset, options.network)
    fast = FastNetwork(compressed, network, tuple(options.float_policy))
    x = next(pictures(dataset, options.network, options.batch))[0]
    candidates = {BASELINE: channels_last(fast.exact.module, x), FAST: lambda: fast(x)}
    with tempfile.TemporaryDirectory() as folder:
        plain = dataclasses.replace(compressed, windows={})
        for residual in ("float", "int8"):
            path = Path(folder) / f"{residual}.onnx"
            to_onnx(plain, network, path, input_shape(dataset), residual=residual,
                    float_policy=tuple(options.float_policy))
            candidates |= others(path, residual, x, options.threads)
        console.print(as_table(in_turn(candidates, options.rounds), len(x)))
    console.print(f"{options.network}, {options.threads} threads of {os.cpu_count()}; kernels: {fast.backend}; "
                  f"CPU: {onednn.capability()}", soft_wrap=True)
    if compressed.windows:
        console.print("the other engines run plain 8-bit activations: they have no bit windows")


def others(path: Path, residual: str, x: Tensor, threads: int) -> dict[str, Callable[[], Tensor]]:
    """The engines that are installed, each with the file at `path`."""
    found: dict[str, Callable[[], Tensor]] = {}
    for name, session in (("ONNX Runtime", onnx_session), ("OpenVINO", openvino_session)):
        try:
            run = session(path, threads)
        except ConfigError:  # not installed
            continue
        found[f"{name}, sums in {residual}"] = lambda run=run: run(x)
    return found


def channels_last(module: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """The float network in the memory format that is fastest on CPUs."""
    if x.ndim != 4:
        return lambda: module(x)
    last, last_x = module.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    return lambda: last(last_x)


def pictures(dataset: Dataset, network: str, batch: int):
    return test_batches(dataset, batch_size=batch, device="cpu", scaling=find(network).scaling).epoch(None)


def input_shape(dataset: Dataset) -> tuple[int, int, int]:
    height, width, channels = dataset.image_shape
    return channels, height, width
