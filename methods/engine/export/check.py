"""Does an ONNX file say what the integers here say? Both run over the same inputs."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...core.errors import CompressError, ConfigError
from ...core.train.task import Batch

EXACT_SUMS = ("session.x64quantprecision", "1")  # else, on a CPU without VNNI, 16-bit sums saturate


@dataclass(frozen=True)
class Agreement:
    """Over `inputs` inputs with classes as targets: top-1 of both in percent, how many percent have the same arg-max,
    the largest difference of an output, and the largest output (for its scale)."""

    inputs: int
    top1_ours: float
    top1_onnx: float
    same_argmax: float
    largest_difference: float
    largest_output: float


def onnx_session(path: str | Path, threads: int = 1) -> Callable[[Tensor], Tensor]:
    """The network in `path` in ONNX Runtime on the CPU; ConfigError where that is not installed."""
    try:
        import onnxruntime
    except ImportError:
        raise ConfigError("running ONNX needs the package onnxruntime: pip install 'jointcompress[export]'") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors
    options.add_session_config_entry(*EXACT_SUMS)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"input": x.numpy()})[0])


def openvino_session(path: str | Path, threads: int = 1) -> Callable[[Tensor], Tensor]:
    """The network in `path` in OpenVINO on the CPU; ConfigError where that is not installed."""
    try:
        import openvino
    except ImportError:
        raise ConfigError("OpenVINO is not installed: pip install openvino") from None
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(str(path)), "CPU", {"INFERENCE_NUM_THREADS": threads})
    return lambda x: torch.from_numpy(compiled(x.numpy())[0])


def compare_onnx(path: str | Path, network: Callable[[Tensor], Tensor], batches: Iterable[Batch]) -> Agreement:
    """The file at `path` in ONNX Runtime beside `network` (an IntegerNetwork or FastNetwork)."""
    session, seen, right = onnx_session(path), 0, [0, 0]
    same, difference, peak = 0, 0.0, 0.0
    for x, targets in batches:
        ours, theirs = network(x), session(x)
        seen += len(x)
        for i, y in enumerate((ours, theirs)):
            right[i] += int((y.argmax(1) == targets).sum())
        same += int((ours.argmax(1) == theirs.argmax(1)).sum())
        difference = max(difference, float((ours - theirs).abs().max()))
        peak = max(peak, float(ours.abs().max()))
    if seen == 0:
        raise CompressError("there is nothing to compare on: the data set is empty")
    return Agreement(seen, 100 * right[0] / seen, 100 * right[1] / seen, 100 * same / seen, difference, peak)
