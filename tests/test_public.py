"""What a user has besides the methods: a method of one's own, going on with zeros kept, examples that run."""

import doctest
import importlib
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import methods
from methods import (
    Budget,
    Codebook,
    CompressedTensor,
    Distill,
    Hooks,
    MaskHooks,
    NullRun,
    Recipe,
    apply,
    apply_masks,
    assemble,
    calibrate,
    decode,
    encode,
    keep_local,
    own_copy,
    ready,
    train,
    weight_layers,
)

ROOT = Path(__file__).parent.parent


def modules_with_examples():
    """Of the library and the harness, by dotted names."""
    files = (path for folder in ("methods", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
    return sorted(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files
                  if ">>> " in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("module", modules_with_examples())
def test_the_examples_run(module):
    if module == "methods.engine.export.onnx":
        pytest.importorskip("onnx", reason="onnx is not installed")
    found = importlib.import_module(module)
    result = doctest.testmod(found, extraglobs={"nn": nn, "torch": torch, **vars(found)})
    assert result.attempted and not result.failed


def test_every_public_name_is_there():
    assert all(hasattr(methods, name) for name in methods.__all__)


def test_going_on_with_zeros_kept(tiny):
    config = methods.find_method("deep_compression").Config(rounds=1, retrain=Recipe(0, 0.01), tune=Recipe(0, 0.01))
    out = methods.find_method("deep_compression").compress(tiny.model(), tiny.task(), Budget(density=0.3, bits=4),
                                                           config, torch.Generator())
    network = apply(out, tiny.net())
    masks = {name: tensor.mask for name, tensor in out.weights.items()}
    train(network, tiny.task(), Recipe(1, 0.05), torch.Generator().manual_seed(0), hooks=MaskHooks(masks))
    for name, mask in masks.items():
        weight = network.get_submodule(name).weight
        assert not bool(weight[~mask].any()) and not torch.equal(weight[mask], out.weights[name].decode()[mask])


# --- a method of one's own, in the words of the public names ------------------------------------------------


@dataclass(frozen=True)
class Config:
    recipe: Recipe = Recipe(epochs=2, lr=0.01)


class Signs(Hooks):
    """Weights of a layer are +a, 0 and -a; the network trains on the float ones under the mask."""


def compress(model, task, budget, config, generator, *, run=None):
    run = NullRun() if run is None else run
    budget.require("signs", "density")
    model = own_copy(model)
    density = budget.per_layer("density", weight_layers(model))
    task = ready(model, task, config)
    masks = keep_local({name: model.get_submodule(name).weight for name in density}, density)
    apply_masks(model, masks)
    train(model, task, config.recipe, generator, hooks=[MaskHooks(masks), Signs()], run=run.stage("train"))
    weights = {}
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight.detach()
        size = weight[mask].abs().mean()
        codes = torch.where(mask, torch.where(weight > 0, 2, 0), 1)
        weights[name] = CompressedTensor.of(codes, Codebook(torch.tensor([-size, 0.0, size])), 2)
    return assemble(model, weights, activations=calibrate(apply(assemble(model, weights), model),
                                                          task.calibration_inputs(48)))


def test_a_method_of_ones_own(tiny, tmp_path):
    for distill in (None, Distill(2.0)):
        out = compress(tiny.model(), tiny.task(), Budget(density={"*": 0.4, "fc": None}),
                       Config(Recipe(2, 0.01, distill=distill)), torch.Generator().manual_seed(0))
        encode(out, tmp_path / "own.jc")
        network = apply(decode(tmp_path / "own.jc"), tiny.net())
        assert "fc" not in out.weights and len(network.conv2.weight.unique()) == 3
        with torch.no_grad():
            assert network(tiny.Batches(24, 2).inputs).isfinite().all()
