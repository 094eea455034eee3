"""SPARQ (Shomron, Gabbay, Kurzum, Weiser, "Post-Training Sparsity-Aware Quantization", NeurIPS 2021).

Starts from a network with 8-bit weights and unsigned 8-bit activations. What meets a multiplier is cut to 4, 3 or 2
bits: a window that follows the leading one of each activation (bSPARQ), and that is twice as wide where the other
activation of its pair is 0 (vSPARQ). Weights keep 8 bits and nothing is trained; batch norm is recalibrated.

Algorithm, for every layer l but the first and the last
    Dw_o = 2 max|w_o| / (2^bw - 1) per filter o;   wq = clamp(round(w / Dw), -2^(bw-1), 2^(bw-1) - 1)        (1)
    R_l = mean over calibration images of the largest input of l, batch norm in training mode                (2)
    Dx = R_l / (2^bx - 1);   a = clamp(round(x / Dx), 0, 2^bx - 1)                                          (3)
    f(a): s = the lowest allowed shift with a < 2^(s+n);  m = a >> s, rounded to even, at most 2^n - 1;  m << s   (4)
    a pair (a1, w1), (a2, w2) gives f(a1) w1 + f(a2) w2, or g(a1) w1 if a2 = 0, or g(a2) w2 if a1 = 0        (5)
    recalibrate batch norm with the windows on                                                              (6)
  round is half to even; g has 2n bits, which for n = 4 is all of a; a pair is two neighbouring channels of one pixel

Symbols    n, shifts: Window.bits, .shifts; core/windows.py is (4) and (5);  bw: budget.bits;  bx: activation_bits
           "5opt", "3opt", "2opt": n = 4 at 5, 3, 2 places; "6opt": n = 3; "7opt": n = 2;  trim: rounding = False
           STC (sparse tensor cores): sparse24;  A8W8, A4W8, A8W4: windows = "none" with activation_bits and budget.bits

Departures (from the authors' code where the paper is silent; numbers in parentheses are those above)
  * The first convolution and the classifier are float in the paper. Here they have 8-bit codes as well, by (1), and
    every other edge an 8-bit range (least and largest value seen, zero point where negative), so that the file can run
    in integers throughout. The paper's policy is a job's `float_policy`, which runs them in float on their decoded
    weights; adds and pools, float in the paper, are 8-bit there too. Calibration runs all of these in float.
  * Any layers may stand between those two: linear ones are treated as 1 x 1 convolutions, pairs being adjacent inputs.
  * Each pass draws `calibration_inputs` training images, shuffled and augmented as in training where the task can, in
    batches of 128 (the authors: 17 batches, one more than their 2,048 images). What batch norm learns from plain images
    suits a network trained on augmented ones badly. recalibrations = 1 is the authors' skip_bn_recal, which omits (6);
    0, which they do not have, leaves batch norm as it is and takes ranges from plain images.
  * Statistics of batches are summed in float64 in a fixed order (`core/fit/norms.py`).
  * Dropout is off. Weights and ranges stay as they are in (6).
  * Inputs without negative values are taken; the authors' code also wants a zero among them. What windows cannot act
    on is treated as the first and the last layer are, and listed in the notes (left_alone): layers with groups, with
    other padding than zeros, and those whose input may be negative (no ReLU, clamp at 0 or sigmoid before it).
  * sparse24 keeps the two largest of four weights along the input channels (as NVIDIA's ASP does), without training:
    start from a network that was trained under this mask, which it then leaves as it is.
  * A bias of a quantized layer is put on a grid (1) of its own and added in float. paired = False is not in their code.
"""

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .core.artifact import ActivationQuantizer, Affine, CompressedModel, CompressedTensor, Window
from .core.budget import Budget
from .core.errors import BudgetError, CompressError, ConfigError, GraphError
from .core.fit.calibrate import BATCH, calibrate, check_calibration, quantizer_of
from .core.fit.norms import following
from .core.fit.size import Knob
from .core.fit.windows import OPTIONS, find_window, keep_24, windowed_sum
from .core.graph.build import NORMS, apply, assemble, own_copy, weight_layers
from .core.graph.graph import Graph, trace
from .core.graph.weights import layer_of
from .core.method import check_call
from .core.settings import check_idle
from .core.train.loaders import check_inputs
from .core.train.run import NullRun, Run
from .core.train.task import Task
from .core.typed import check_types

DATA = "calibration"
SIZE_KNOB = Knob("bits", 2, 8, whole=True)
WIDTH = 8  # of weights and activations, where nothing else is asked for
EPS = torch.finfo(torch.float32).eps  # least scale, of a filter without weights


@dataclass(frozen=True)
class Config:
    """windows: "5opt", "3opt", "2opt", "6opt", "7opt" or "none"; rounding: in the window; paired: vSPARQ.

    sparse24          prune to 2:4 and pair the kept weights
    activation_bits   other than 8 only without windows
    excluded_bits     weights of the first and the last layer: 8, whatever the budget, or none for the budget's
    recalibrations    0: batch norm stays as it is; 1: it moves while ranges are calibrated; 2: again with the windows
    """

    windows: str = "5opt"
    rounding: bool = True
    paired: bool = True
    sparse24: bool = False
    activation_bits: int = WIDTH
    excluded_bits: int | None = None
    calibration_inputs: int = 2048
    recalibrations: int = 2

    def __post_init__(self):
        check_types(self)
        check_calibration(self.activation_bits, self.calibration_inputs)
        if self.windows not in ("none", *OPTIONS):
            raise ConfigError(f"windows = {self.windows!r}: allowed are none, {', '.join(OPTIONS)}")
        if self.windows != "none" and self.activation_bits != WIDTH:
            raise ConfigError(f"activation_bits = {self.activation_bits}: windows are taken of {WIDTH} bits; "
                              "windows = 'none' allows others")
        if self.activation_bits > WIDTH:
            raise ConfigError(f"activation_bits = {self.activation_bits}: allowed is 1..{WIDTH}")
        if self.excluded_bits is not None and not 2 <= self.excluded_bits <= WIDTH:
            raise ConfigError(f"excluded_bits = {self.excluded_bits}: allowed is 2..{WIDTH} or none")
        if self.recalibrations not in (0, 1, 2):
            raise ConfigError(f"recalibrations = {self.recalibrations}: allowed are 0, 1, 2")
        check_idle(self)

    def idle(self) -> dict[str, str]:
        return {} if self.windows != "none" else dict.fromkeys(("rounding", "paired"), "windows = 'none'")

    def window(self) -> Window | None:
        return None if self.windows == "none" else find_window(self.windows, self.rounding, self.paired, self.sparse24)


def compress(model: nn.Module, task: Task, budget: Budget, config: Config, generator: torch.Generator,
             *, run: Run | None = None) -> CompressedModel:
    """Budget: optionally bits of the weights, 2..8, a number (8) or {layer: number}."""
    check_call(__name__, model, task, budget, config, generator)
    run = NullRun() if run is None else run
    budget.require("sparq", optional=("bits",))
    model = task.placed(own_copy(model)).eval()
    graph, window = trace(model), config.window()
    first = task.calibration_inputs(1).to(task.device)
    if len(graph.layers()) > 2:  # else it is refused for that
        check_inputs(model, first)
    chosen, left = quantized_layers(graph, first)
    bits = weight_bits(budget, config, list(weight_layers(model)), chosen)
    acted, chosen = chosen, [name for name in chosen if name in bits]
    if not chosen:
        raise BudgetError(f"the budget leaves alone what sparq acts on: allowed are bits for one of {', '.join(acted)}")
    weights = quantize_weights(model, bits, chosen, config.sparse24)

    layers = {name: QuantizedLayer(name, model.get_submodule(name), weights[name], config.activation_bits)
              for name in chosen}
    quantized = simulated(graph, layers)
    moving = config.recalibrations >= 1
    pass_over(model, quantized, draw(task, config, moving, generator), moving, run.stage("ranges"))  # (2)
    for layer in layers.values():
        layer.freeze(window)
    if config.recalibrations == 2:
        pass_over(model, quantized, draw(task, config, True, generator), True, run.stage("batch norm"))  # (6)

    compressed = assemble(model, weights, notes={"windowed": chosen if window is not None else [], "left_alone": left})
    others = calibrate(apply(compressed, model), task.calibration_inputs(config.calibration_inputs), WIDTH)
    ranges = {name: layer.quantizer() for name, layer in layers.items()}
    return replace(compressed, activations=others | ranges,
                   windows={} if window is None else dict.fromkeys(chosen, window))


@torch.no_grad()
def quantized_layers(graph: Graph, inputs: Tensor) -> tuple[list[str], dict[str, str]]:
    """Every conv and linear but the first and the last, in order of execution; and {layer: why} of those that windows
    cannot act on, which are left with the first and the last. `inputs` [1, ...] show what the layers read."""
    nodes, least, seen, left = graph.layers(), graph.nonnegative(), {}, {}
    if len(nodes) > 2:
        graph.run(inputs, lambda node, values, output: seen.update({node.name: values[0].ndim if values else 0}))
    for node in nodes[1:-1]:
        groups, mode = getattr(node.module, "groups", 1), getattr(node.module, "padding_mode", "zeros")
        reasons = ((groups != 1, f"it has {groups} groups"), (mode != "zeros", f"it pads with {mode}"),
                   (node.inputs[0] not in least, "its input may be negative"),
                   (seen[node.name] != node.module.weight.ndim, f"its input has {seen[node.name]} dimensions"))
        found = [reason for holds, reason in reasons if holds]
        if found:
            left[node.name] = found[0]
    chosen = [node.name for node in nodes[1:-1] if node.name not in left]
    if not chosen:
        why = [f"{name}: {reason}" for name, reason in left.items()]
        raise GraphError(f"{graph.why_opaque()}sparq has no layer to act on: it leaves the first and the last of "
                         f"{len(nodes)} as they are, and its windows cannot take the others "
                         f"({', '.join(why[:3]) if why else 'there are none'})")
    return chosen, left


# --- weights -----------------------------------------------------------------------------------------------


def weight_bits(budget: Budget, config: Config, layers: list[str], chosen: list[str]) -> dict[str, int]:
    """Bits of the weights of each layer."""
    given = Budget(bits=WIDTH) if budget.bits is None else budget
    bits = {name: int(b) for name, b in given.per_layer("bits", layers).items()}
    if config.excluded_bits is not None:
        bits |= {name: config.excluded_bits for name in bits if name not in chosen}
    for name, width in bits.items():
        if not 2 <= width <= WIDTH:
            raise BudgetError(f"budget bits of {name} = {width}: sparq allows 2..{WIDTH}")
    return bits


@torch.no_grad()
def quantize_weights(model: nn.Module, bits: Mapping[str, int], chosen: list[str], sparse24: bool
                     ) -> dict[str, CompressedTensor]:
    """Codes of every layer; the biases of the chosen ones are quantized in `model`, in place."""
    weights = {}
    for name in bits:
        layer = layer_of(model, name)
        mask = keep_24(layer.weight) if sparse24 and name in chosen else torch.ones_like(layer.weight, dtype=torch.bool)
        weights[name] = quantize_filters(layer.weight * mask, bits[name])
        if name in chosen and layer.bias is not None:
            layer.bias.copy_(quantize_filters(layer.bias[None], bits[name]).decode()[0])
    return weights


def quantize_filters(weight: Tensor, bits: int) -> CompressedTensor:
    """(1), per filter. The largest |w| lies on +-127.5: + is clamped, - becomes -128, or -127 by float32 rounding."""
    weight = weight.detach().cpu()
    top = weight.reshape(len(weight), -1).abs().amax(1)
    scale = (2 * top / ((1 << bits) - 1)).clamp_min(EPS)
    codes = torch.round(weight / scale.reshape(-1, *[1] * (weight.ndim - 1)))
    codes = codes.clamp(-(1 << bits - 1), (1 << bits - 1) - 1).to(torch.int32)
    return CompressedTensor.of(codes, Affine(scale, torch.zeros_like(scale, dtype=torch.int32)), bits)


# --- activations and batch norm ----------------------------------------------------------------------------


class QuantizedLayer:
    """A conv or linear as it is simulated while calibrating: integer sums, everything around them in float."""

    def __init__(self, name: str, layer: nn.Module, weight: CompressedTensor, bits: int):
        self.name, self.layer, self.bits, self.window, self.frozen = name, layer, bits, None, False
        self.total, self.count = 0.0, 0  # of the largest values of images
        self.codes = weight.codes.to(layer.weight.device, torch.float32)  # integers, as the authors carry them
        self.scale = weight.grid.scale.to(layer.weight.device).reshape(-1, *[1] * (layer.weight.ndim - 2))

    def freeze(self, window: Window | None) -> None:
        self.window, self.frozen = window, True

    def watch(self, x: Tensor) -> None:
        """(2): a mean that is used while it is taken, so that batch i is quantized by the batches up to i."""
        low = float(x.min())
        if low < 0:
            raise CompressError(f"the input of {self.name} goes down to {low:.3g}: sparq's activations are unsigned, "
                                "a ReLU has to come before the layer")
        self.total += float(x.flatten(1).amax(1).double().sum())
        self.count += len(x)
        if not math.isfinite(self.total):
            raise CompressError(f"the activations at {self.name!r} are not finite: look at the calibration inputs")

    def quantizer(self) -> ActivationQuantizer:
        return quantizer_of(0.0, self.total / self.count, self.bits)  # (3)

    def __call__(self, x: Tensor) -> Tensor:
        if not self.frozen:
            self.watch(x)
        quantizer = self.quantizer()
        y = windowed_sum(self.layer, quantizer.encode(x), self.codes, self.window) * (self.scale * quantizer.scale)
        return y if self.layer.bias is None else y + self.layer.bias.reshape(self.scale.shape)


def simulated(graph: Graph, layers: Mapping[str, QuantizedLayer]) -> Graph:
    """`graph` with these layers in place of its own."""
    return Graph([replace(node, run=layers.get(node.name, node.run)) for node in graph], graph.output, graph.opaque)


def draw(task: Task, config: Config, moving: bool, generator: torch.Generator) -> Tensor:
    """The images of one pass: as in training where batch norm moves, else plain."""
    n = config.calibration_inputs
    return (task.training_inputs(n, generator) if moving else task.calibration_inputs(n)).to(task.device)


@torch.no_grad()
def pass_over(model: nn.Module, graph: Graph, inputs: Tensor, moving: bool, run: Run) -> None:
    """Run `graph` on the inputs; if `moving`, the batch norms of `model` use and follow each batch's statistics."""
    if moving and len(inputs) < 2 and any(isinstance(module, NORMS) for module in model.modules()):
        raise CompressError("batch norm cannot be recalibrated on one input: allowed are more, or recalibrations = 0")
    batches = inputs.tensor_split(math.ceil(len(inputs) / BATCH))  # sizes differ by 1 at most: none is a single image
    with following(model) if moving else contextlib.nullcontext():
        for step, batch in enumerate(batches, 1):
            graph.run(batch)
            run.report(step, len(batches))
