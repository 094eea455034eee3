"""All kinds of weights: coded, stored and back; what stays float is named, and warned about."""

import warnings

import pytest
import torch
from torch import nn

from methods import (
    Budget,
    CompressWarning,
    Recipe,
    Task,
    admm,
    annc,
    apply,
    clip_q,
    decode,
    deep_compression,
    encode,
    float_layers,
    inspect,
    prune_then_quantize,
    quantize_then_prune,
)
from methods.core.artifact import Affine, CompressedTensor, tensor_name
from methods.core.graph.build import assemble
from methods.core.graph.weights import float_share, layer_of, place_of, weight_layers

KINDS = ["words", "line", "back", "cube", "mix.in_proj_weight", "mix.out_proj", "apart.q_proj_weight",
         "apart.k_proj_weight", "apart.v_proj_weight", "apart.out_proj", "two", "last"]


class Zoo(nn.Module):
    """One layer of every kind that is not a Conv2d, and a module of two names."""

    def __init__(self):
        super().__init__()
        self.words, self.line = nn.Embedding(9, 8), nn.Conv1d(8, 8, 3, padding=1)
        self.back = nn.ConvTranspose1d(8, 8, 2)
        self.cube, self.mix = nn.Conv3d(1, 2, 3, padding=1), nn.MultiheadAttention(8, 2, batch_first=True)
        self.apart = nn.MultiheadAttention(8, 2, kdim=3, vdim=5, batch_first=True)
        self.two, self.last = nn.Bilinear(8, 8, 8), nn.Linear(8, 4)
        self.again = self.last

    def forward(self, x):
        x = self.words(x)
        x = self.back(self.line(x.transpose(1, 2)).relu()).transpose(1, 2)
        x = x + self.cube(x[:, None, :, :, None])[:, 0, ..., 0]
        x = x + self.mix(x, x, x)[0]
        x = x + self.apart(x, x[..., :3], x[..., :5])[0]
        x = self.two(x.mean(1), x[:, 0])
        return self.again(x)


def task():
    data = [(torch.randint(0, 9, (8, 5)), torch.randint(0, 4, (8,))) for _ in range(2)]
    return Task.from_loader(data, data)


SHORT = Recipe(epochs=1, lr=1e-3)
METHODS = {
    "deep_compression": (deep_compression, Budget(density=0.3, bits=4),
                         deep_compression.Config(rounds=1, retrain=SHORT, tune=SHORT)),
    "clip_q": (clip_q, Budget(density=0.3, bits=4), clip_q.Config(search="uniform", finetune=SHORT)),
    "admm": (admm, Budget(density=0.3, bits=4), admm.Config(
        prune=SHORT, retrain=SHORT, quantize=SHORT, fix=SHORT, steps=(1.0,), rho=(1e-3,), prune_iterations=1,
        quantize_rho=(1e-3,), quantize_iterations=1, fix_rounds=1)),
    "annc": (annc, Budget(data_ratio=0.1), annc.Config(recipe=SHORT, stages=(1.0,), finetune=SHORT)),
    "prune_then_quantize": (prune_then_quantize, Budget(density=0.3, bits=4),
                            prune_then_quantize.Config(retrain=SHORT, aware=SHORT, calibration_inputs=8)),
    "quantize_then_prune": (quantize_then_prune, Budget(density=0.3, bits=4),
                            quantize_then_prune.Config(aware=SHORT, calibration_inputs=8)),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_kind_is_coded_and_comes_back(name, tmp_path):
    method, budget, config = METHODS[name]
    model = Zoo().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error", CompressWarning)
        made = method.compress(model, task(), budget, config, torch.Generator().manual_seed(0))
    assert list(made.weights) == KINDS and float_layers(made) == {} and float_share(made) == 0
    encode(made, tmp_path / "zoo.jc")
    back = apply(decode(tmp_path / "zoo.jc"), Zoo())
    state = back.state_dict()
    for layer, tensor in made.weights.items():
        assert torch.equal(state[tensor_name(layer)], tensor.decode()) and tensor.kept > 0
    assert back.again is back.last and bool(back(torch.randint(0, 9, (2, 5))).isfinite().all())
    assert inspect(tmp_path / "zoo.jc")["float_layers"] == {}


class Versioned(nn.Linear):
    _version = 2

    def _load_from_state_dict(self, state, prefix, metadata, *rest):
        if metadata.get("version") != 2:
            raise ValueError(f"version {metadata.get('version')}")
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def test_modules_that_ask_for_their_version_are_rebuilt():
    model = nn.Sequential(Versioned(3, 4))
    codes = torch.randint(-7, 8, (4, 3), dtype=torch.int32)
    grid = Affine(torch.tensor(0.5), torch.tensor(0, dtype=torch.int32))
    back = apply(assemble(model, {"0": CompressedTensor.of(codes, grid, 4)}), model)
    assert torch.equal(back[0].weight, 0.5 * codes)


def test_layers_are_found_by_their_names():
    model = Zoo()
    assert list(weight_layers(model)) == KINDS
    for name, layer in weight_layers(model).items():
        module, attribute = place_of(layer_of(model, name))
        assert layer.weight is getattr(module, attribute) is model.state_dict(keep_vars=True)[tensor_name(name)]
    assert list(weight_layers(nn.Linear(2, 2))) == [""] and tensor_name("") == "weight"


def test_what_stays_float_is_named_and_warned_about(tmp_path):
    model = nn.ModuleDict({"cells": nn.LSTM(8, 16), "last": nn.Linear(16, 4, bias=False)})
    codes = deep_compression.share(model["last"].weight, torch.ones(4, 16, dtype=torch.bool), 4, "linear", None)
    tensor = deep_compression.CompressedTensor.of(codes[1], deep_compression.Codebook(codes[0]), 4)
    with pytest.warns(CompressWarning, match="89% of the network stay float32: cells.weight_ih_l0, cell"):
        made = assemble(model, {"last": tensor})
    floats = {"cells.weight_ih_l0": 4 * 64 * 8, "cells.weight_hh_l0": 4 * 64 * 16}
    assert float_layers(made) == made.notes["float_layers"] == floats
    total = 4 * (64 * 8 + 64 * 16 + 128 + 64)
    assert float_share(made) == pytest.approx(sum(floats.values()) / total)
    encode(made, tmp_path / "cells.jc")
    assert inspect(tmp_path / "cells.jc")["float_layers"] == floats
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert assemble(model, {}).notes == {}  # a method that codes nothing means to
