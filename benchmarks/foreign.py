"""torchvision's classifiers under the methods: which combinations run, and whether their integers are exact.

Random weights and small random pictures: this says what a method takes, not how good it is. A cell is "ok" where the
method returned, `apply` rebuilt the network with finite outputs, and, for methods with activation ranges, the integer
network gave the numbers of its int64 reference; else it is the reason in one line.
"""

import json
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from methods import Budget, CompressError, CompressWarning, Recipe, apply, find_method
from methods.core.artifact import CompressedModel
from methods.core.errors import ConfigError
from methods.core.file.container import write_file
from methods.core.graph.build import NORMS
from methods.core.graph.weights import float_share
from methods.core.train.task import Task
from methods.engine.exact import IntegerNetwork
from methods.engine.reference import ReferenceRun
from methods.pipeline.settings import Prune, Quantize

from ._torchvision import import_datasets
from .locks import locked

CLASSES, BATCH = 10, 2
PLAIN = {"aux_logits": False, "init_weights": False}
NETWORKS: dict[str, tuple[int, dict]] = {  # side of the pictures, arguments
    "alexnet": (64, {}), "vgg11_bn": (32, {}), "resnet18": (32, {}), "resnet50": (32, {}), "wide_resnet50_2": (32, {}),
    "resnext50_32x4d": (32, {}), "mobilenet_v2": (32, {}), "mobilenet_v3_small": (32, {}), "mnasnet1_0": (32, {}),
    "shufflenet_v2_x1_0": (32, {}), "squeezenet1_1": (32, {}), "densenet121": (32, {}), "googlenet": (32, PLAIN),
    "inception_v3": (80, PLAIN), "efficientnet_b0": (32, {}), "regnet_y_400mf": (32, {}), "convnext_tiny": (32, {}),
    "vit_b_16": (32, {"image_size": 32}), "swin_t": (32, {})}
# Adam's steps are no longer than its rate, whatever gradients batch norms over two pictures have.
SHORT = {"epochs": 1, "lr": 1e-5, "optimizer": "adam"}


@dataclass(frozen=True)
class Setting:
    """The least that a method can be asked for; integers: whether what it returns is to run in integers."""

    budget: dict
    config: Callable[[Recipe], dict]
    integers: bool = False


Table = Mapping[str, Mapping[str, dict]]
SETTINGS = {
    "deep_compression": Setting({"density": 0.05, "bits": 2}, lambda short: {
        "rounds": 1, "retrain": short, "tune": short}),
    "clip_q": Setting({"density": 0.1, "bits": 3}, lambda short: {"search": "uniform", "finetune": short}),
    "admm": Setting({"density": 0.1, "bits": 3}, lambda short: {
        "prune": short, "retrain": short, "quantize": short, "fix": short, "prune_iterations": 1, "fix_rounds": 1,
        "quantize_iterations": 1}),
    "annc": Setting({"data_ratio": 0.02}, lambda short: {"recipe": short, "least_bits": 2, "most_bits": 3}),
    "prune_then_quantize": Setting({"density": 0.5, "bits": 8}, lambda short: {
        "retrain": short, "calibration_inputs": BATCH}, True),
    "quantize_then_prune": Setting({"density": 0.5, "bits": 8}, lambda short: {
        "aware": short, "calibration_inputs": BATCH}, True),
    "sparq": Setting({"bits": 8}, lambda short: {"calibration_inputs": BATCH}, True),
    "dfq": Setting({"bits": 8}, lambda short: {"rounds": 5}, True),
    "bayesian_bits": Setting({}, lambda short: {
        "recipe": Recipe(**SHORT, schedule="constant"), "init": (6.0, 6.0, -6.0, -6.0),  # 8 bits
        "fast": True,  # two pictures have no variance to normalise by
        "calibration_inputs": BATCH}, True),
    "rptq": Setting({"size_ratio": 0.15}, lambda short: {
        "sensitivity_inputs": BATCH, "calibration_inputs": BATCH}, True),
    "rptq_train": Setting({"size_ratio": 0.15}, lambda short: {
        "recipe": short, "sensitivity_inputs": BATCH, "calibration_inputs": BATCH}, True),
    "pipeline": Setting({"density": 0.5, "bits": 8}, lambda short: {
        "prune": Prune(recipe=short), "quantize": Quantize("qat", recipe=short),
        "calibration_inputs": BATCH}, True),
    "udfc": Setting({"channel_density": 0.8, "bits": 6}, lambda short: {}),
    "neuron_merging": Setting({"channel_density": 0.8}, lambda short: {}),
    "df_mpc": Setting({"bits": 6}, lambda short: {}),
    "sequential_reconstruction": Setting({"channel_density": 0.8, "bits": 6}, lambda short: {
        "images": 4 * BATCH, "steps": 2, "image_size": 32}),
}


def build(name: str) -> tuple[nn.Module, Task]:
    """A torchvision classifier with random weights, and a task of one batch of random pictures."""
    if name not in NETWORKS:
        raise ConfigError(f"unknown network {name!r}; there are: {', '.join(NETWORKS)}")
    import_datasets()
    from torchvision import models
    side, arguments = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(models, name)(num_classes=CLASSES, **arguments)
        data = [(torch.randn(BATCH, 3, side, side), torch.randint(0, CLASSES, (BATCH,)))]
        settle(model, torch.randn(4 * BATCH, 3, side, side))
    return model.eval(), Task.from_loader(data, data)


@torch.no_grad()
def settle(model: nn.Module, x: Tensor) -> None:
    """Batch norms take the statistics of `x`: with those that they start from, deep networks overflow."""
    momenta = {norm: norm.momentum for norm in model.modules() if isinstance(norm, NORMS)}
    for norm in momenta:
        norm.momentum = None
    model.train()(x)
    for norm, momentum in momenta.items():
        norm.momentum = momentum


@torch.no_grad()
def examine(compressed: CompressedModel, model: nn.Module, x: Tensor, integers: bool) -> str:
    """"ok", and what of the network is not in codes; or what is wrong."""
    if not bool(apply(compressed, model)(x).isfinite().all()):
        return "outputs are not finite"
    notes = [f"{float_share(compressed):.0%} of the weights float"] if float_share(compressed) > 0.05 else []
    if integers:
        network = IntegerNetwork(compressed, model)
        layers = network.graph.layers()
        got, want = network(x), ReferenceRun(network, x).real(network.graph.output)
        if not torch.equal(got, torch.from_numpy(want)):
            return "the integer network differs from its reference"
        notes += [f"{len(network.layers)} of {len(layers)} layers in integers"]
    return ", ".join(["ok", *notes])


def try_one(model: nn.Module, task: Task, method: str) -> dict[str, str | float]:
    """{"result", "seconds" of CPU time} of one combination."""
    module, setting = find_method(method), SETTINGS[method]
    x, start = next(iter(task.held_out.epoch(None)))[0], time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompressWarning)
        try:
            compressed = module.compress(model, task.seen_as(module.DATA), Budget(**setting.budget),
                                         module.Config(**setting.config(Recipe(**SHORT))),
                                         torch.Generator().manual_seed(0))
            result = examine(compressed, model, x, setting.integers)
        except CompressError as error:
            result = f"refused: {error}"
    return {"result": " ".join(result.split()), "seconds": round(time.process_time() - start, 1)}


def read_table(path: Path) -> dict[str, dict[str, dict]]:
    """{network: {method: cell}} as the command wrote it; {} where there is no such file yet."""
    return json.loads(path.read_text()) if path.exists() else {}


def run_networks(path: Path, networks: Iterable[str], methods: Iterable[str], said: Callable[[str], None]
                 ) -> dict[str, dict[str, dict]]:
    """{network: {method: cell}} at `path`, where every cell is written when it is known, and not tried again."""
    unknown = [name for name in methods if name not in SETTINGS]
    if unknown:
        raise ConfigError(f"unknown method {unknown[0]!r}; there are: {', '.join(SETTINGS)}")
    table = read_table(path)
    for network in networks:
        missing = [method for method in methods if method not in table.get(network, {})]
        subject = build(network) if missing else None  # methods leave it as it is
        for method in missing:
            said(f"{network} {method}")
            cell = try_one(*subject, method)
            with locked(path.with_suffix(".lock")):  # another process may have written cells of its own
                table = read_table(path)
                table.setdefault(network, {})[method] = cell
                write_file(path, (json.dumps(table, indent=1) + "\n").encode())
    return table


def in_words(table: Table) -> dict:
    """What a page or a terminal shows: {"methods", "rows": [(network, cells)], "reasons", "taken"}.

    A cell is "ok ..." or "no (N)", N counting the `reasons` from 1; "" where a combination was not tried. taken counts,
    for each method, "N of M" that were tried.
    """
    methods = [name for name in SETTINGS if any(name in row for row in table.values())]
    reasons: dict[str, int] = {}

    def cell(result: str) -> str:
        good = not result or result.startswith("ok")
        return result if good else f"no ({reasons.setdefault(result, len(reasons) + 1)})"

    rows = [(network, [cell(table[network].get(method, {}).get("result", "")) for method in methods])
            for network in NETWORKS if network in table]
    tried = {method: [cells[i] for _, cells in rows if cells[i]] for i, method in enumerate(methods)}
    taken = {method: f"{sum(c.startswith('ok') for c in cells)} of {len(cells)}" for method, cells in tried.items()}
    return {"methods": methods, "rows": rows, "reasons": list(reasons), "taken": taken}


def as_markdown(table: Table) -> str:
    """Networks by methods, "ok" or a number into the reasons below."""
    words = in_words(table)
    lines = ["| network | " + " | ".join(words["methods"]) + " |", "| --- |" + " --- |" * len(words["methods"])]
    lines += [f"| {network} | " + " | ".join(cells) + " |" for network, cells in words["rows"]]
    lines += ["", *(f"{number}. {reason}" for number, reason in enumerate(words["reasons"], 1))]
    taken = ", ".join(f"{method} {count}" for method, count in words["taken"].items())
    return "\n".join([*lines, "", f"Taken: {taken}"]) + "\n"
