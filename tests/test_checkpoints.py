"""Checkpoints: every format in and out, and what must be refused."""

import argparse
import hashlib
import json
import os

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from benchmarks import checkpoints, networks
from benchmarks.checkpoints import digest_of, load_into, read_checkpoint, read_provenance, write_checkpoint
from methods.core.errors import ConfigError


@pytest.fixture
def state():
    return networks.build("resnet18w4", 10, 1).state_dict()


def refused(call, *words):
    with pytest.raises(ConfigError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text
    return True


def same(one, two):
    return list(one) == list(two) and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3, "best": 91.5},
                                  lambda s: {"model": s, "optimizer": {"lr": 0.1}}, lambda s: {"net": s, "acc": 1.0},
                                  lambda s: {f"module.{name}": tensor for name, tensor in s.items()},
                                  lambda s: {"state_dict": {f"module.{name}": t for name, t in s.items()}}])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th", ".tar"])
def test_torch_files(state, tmp_path, wrap, suffix):
    torch.save(wrap(state), tmp_path / f"x{suffix}")
    assert same(read_checkpoint(tmp_path / f"x{suffix}"), dict(state))


AS_SCRIPTS_WRITE = {
    "a.pt": lambda s: {"epoch": 5, "model_state_dict": s, "loss": 0.1, "optimizer_state_dict": {"state": {}}},
    "b.ckpt": lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}, "global_step": 7, "loops": {}},
    "c.bin": dict, "d.pth": lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
    "e.pt": lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()},
    "f.pt": lambda s: {f"_orig_mod.module.{k}": v for k, v in s.items()},
    "g.pt": lambda s: {k.replace("layer1.", "layer1._orig_mod."): v for k, v in s.items()},
    "h.pt": lambda s: {"net": s, "acc": np.float64(98.7), "seen": np.int64(3), "best": np.bool_(True)},
    "i.pth": lambda s: {"model": s, "args": argparse.Namespace(lr=0.1, names=["a"], seed=np.int32(1)), "epoch": 3},
    "j.pt": lambda s: {"model": {"state_dict": s}}, "k.pt": lambda s: {"student": s, "epoch": 1, "note": "x"},
    "l.pt": lambda s: {**s, "head._extra_state": {"version": 1}},
}


@pytest.mark.parametrize("name", AS_SCRIPTS_WRITE)
def test_checkpoints_as_training_scripts_write_them(state, tmp_path, name):
    torch.save(AS_SCRIPTS_WRITE[name](dict(state)), tmp_path / name)
    model = networks.build("resnet18w4", 10, 1)
    load_into(model, read_checkpoint(tmp_path / name))
    assert same(model.state_dict(), state)


def test_a_file_of_two_networks_says_what_to_do(state, tmp_path):
    torch.save({"generator": dict(state), "critic": dict(state), "epoch": 1}, tmp_path / "x.pt")
    assert refused(lambda: read_checkpoint(tmp_path / "x.pt"), "several state dicts, generator, critic", "alone")


def test_a_network_under_an_attribute_called_model_keeps_its_names(tmp_path):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = nn.Linear(2, 2)

    own, other = Own(), Own()
    torch.save(own.state_dict(), tmp_path / "x.pt")
    load_into(other, read_checkpoint(tmp_path / "x.pt"))
    assert same(own.state_dict(), other.state_dict())


def test_npz_and_safetensors(state, tmp_path):
    np.savez(tmp_path / "x.npz", **{name: tensor.numpy() for name, tensor in state.items()})
    safetensors.torch.save_file(dict(state), tmp_path / "x.safetensors")
    assert same(read_checkpoint(tmp_path / "x.npz"), dict(state))
    found = read_checkpoint(str(tmp_path / "x.safetensors"))
    assert same({name: found[name] for name in state}, dict(state)) and len(found) == len(state)


def test_floating_point_becomes_float32(tmp_path):
    values = torch.tensor([0.5, -3.0, 65504.0])
    mixed = {"a": values.half(), "b": values.bfloat16(), "c": values.double(), "n": torch.tensor(7)}
    torch.save(mixed, tmp_path / "x.pt")
    found = read_checkpoint(tmp_path / "x.pt")
    assert [found[name].dtype for name in "abcn"] == [torch.float32] * 3 + [torch.int64]
    assert torch.equal(found["a"], values) and torch.equal(found["c"], values)
    np.savez(tmp_path / "x.npz", a=values.half().numpy())
    assert read_checkpoint(tmp_path / "x.npz")["a"].dtype == torch.float32


class Runs:
    """Unpickling this creates a file: loading a checkpoint must not."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_file_is_executed(tmp_path):
    trap = tmp_path / "trap"
    torch.save({"a": torch.zeros(2), "b": Runs(trap)}, tmp_path / "x.pt")
    assert refused(lambda: read_checkpoint(tmp_path / "x.pt"), "pickled objects", "state dict")
    np.savez(tmp_path / "x.npz", a=np.array([Runs(trap)], dtype=object))
    assert refused(lambda: read_checkpoint(tmp_path / "x.npz"), "x.npz")
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pt")
    assert refused(lambda: read_checkpoint(tmp_path / "whole.pt"), "pickled objects (torch.nn.modules.linear.Linear)")
    assert not trap.exists()


def test_what_is_no_state_dict(tmp_path):
    assert refused(lambda: read_checkpoint(tmp_path / "none.pt"), "no checkpoint file")
    assert refused(lambda: read_checkpoint(tmp_path), "no checkpoint file")
    (tmp_path / "x.onnx").write_bytes(b"")
    assert refused(lambda: read_checkpoint(tmp_path / "x.onnx"), "'.onnx'", ".safetensors", ".npz", ".pt", ".ckpt")
    for suffix in (".pt", ".npz", ".safetensors"):
        for content in (b"", b"garbage" * 50, b"PK\x03\x04" + bytes(100)):
            (tmp_path / f"x{suffix}").write_bytes(content)
            assert refused(lambda path=tmp_path / f"x{suffix}": read_checkpoint(path), f"x{suffix}")
    for content, word in (({"a": 3}, "'a' of int"), ({}, "non-empty"), ([torch.zeros(1)], "no state dict"),
                          ({"a": {"b": 3}}, "'a' of dict"), ({3: torch.zeros(1)}, "3")):
        torch.save(content, tmp_path / "x.pt")
        assert refused(lambda: read_checkpoint(tmp_path / "x.pt"), word)
    np.savez(tmp_path / "x.npz", a=np.array(["text"]))
    assert refused(lambda: read_checkpoint(tmp_path / "x.npz"), "'a'")


def test_a_truncated_file_is_refused(state, tmp_path):
    torch.save(state, tmp_path / "x.pt")
    np.savez(tmp_path / "x.npz", **{name: tensor.numpy() for name, tensor in state.items()})
    write_checkpoint(tmp_path / "x.safetensors", state, {})
    for suffix in (".pt", ".npz", ".safetensors"):
        path = tmp_path / f"x{suffix}"
        path.write_bytes(path.read_bytes()[:-500])
        assert refused(lambda path=path: read_checkpoint(path), path.name)


def test_foreign_bytes_under_every_suffix(tmp_path):
    old = tmp_path / "old.pth"
    torch.save({"a": torch.zeros(500)}, old, _use_new_zipfile_serialization=False)
    np.save(tmp_path / "array", np.zeros(3))
    single = (tmp_path / "array.npy").read_bytes()
    for name, data, word in (("text.pt", b"hello world", ""), ("cut.pth", old.read_bytes()[:400], ""),
                             ("one.npz", single, "it is a single array"), ("noise.safetensors", b"\x08" * 99, "")):
        (tmp_path / name).write_bytes(data)
        assert refused(lambda name=name: read_checkpoint(tmp_path / name), name, word)
    for value in (torch.eye(3).to_sparse(), torch.zeros(3, dtype=torch.complex64)):
        torch.save({"a": value}, tmp_path / "odd.pt")
        assert refused(lambda: read_checkpoint(tmp_path / "odd.pt"), "'a', sparse or complex")


def test_loading_is_strict(state):
    model = networks.build("resnet18w4", 10, 1, seed=1)
    load_into(model, state)
    assert same(model.state_dict(), state)
    short = {name: tensor for name, tensor in state.items() if not name.startswith("layer3")}
    assert refused(lambda: load_into(model, short), "lacks layer3.0.conv1.weight", "in all)")
    assert refused(lambda: load_into(model, {**state, "head.weight": torch.zeros(1)}), "unknown head.weight")
    wrong = {**state, "fc.weight": torch.zeros(100, 32)}
    assert refused(lambda: load_into(model, wrong), "fc.weight [100, 32] instead of [10, 32]")
    assert same(model.state_dict(), state)  # a refused state changes nothing


def test_batch_counters_are_optional(state):
    model = networks.build("resnet18w4", 10, 1, seed=1)
    load_into(model, {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")})
    assert same(model.state_dict(), state)
    load_into(model, {**state, "bn1.num_batches_tracked": torch.tensor(5)})
    assert int(model.bn1.num_batches_tracked) == 5  # loaded where it is there
    load_into(nn.Linear(2, 3), {**nn.Linear(2, 3).state_dict(), "bn.num_batches_tracked": torch.tensor(4)})


def test_written_files(state, tmp_path):
    facts = {"seed": 3, "log": [{"loss": 0.25}], "recipe": {"lr": 0.1, "schedule": None}, "note": "ünïcode"}
    path = tmp_path / "new" / "x.safetensors"
    write_checkpoint(path, state, facts)
    found = read_checkpoint(path)
    assert same({name: found[name] for name in state}, dict(state)) and read_provenance(path) == facts
    assert digest_of(path) == hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    first = path.read_bytes()
    model = networks.build("resnet18w4", 10, 1, seed=2).to(memory_format=torch.channels_last)
    load_into(model, found)
    write_checkpoint(path, dict(reversed(model.state_dict().items())), dict(reversed(facts.items())))
    assert path.read_bytes() == first  # neither memory format nor order shows
    assert [file.name for file in path.parent.iterdir()] == ["x.safetensors"]


def test_half_precision(state, tmp_path):
    write_checkpoint(tmp_path / "x.safetensors", state, {}, half=True)
    write_checkpoint(tmp_path / "full.safetensors", state, {})
    found, stored = read_checkpoint(tmp_path / "x.safetensors"), safetensors.torch.load_file(tmp_path / "x.safetensors")
    for name, tensor in state.items():
        assert stored[name].dtype == (torch.float16 if tensor.is_floating_point() else torch.int64)
        assert torch.equal(found[name], tensor.half().float() if tensor.is_floating_point() else tensor)
    assert (tmp_path / "x.safetensors").stat().st_size < 0.7 * (tmp_path / "full.safetensors").stat().st_size
    write_checkpoint(tmp_path / "x.safetensors", {"a": torch.tensor([65504.0, float("inf")])}, {}, half=True)
    assert refused(lambda: write_checkpoint(tmp_path / "x.safetensors", {"a": torch.tensor([7e4])}, {}, half=True),
                   "float16", "70000")


def test_what_cannot_be_written(state, tmp_path):
    assert refused(lambda: write_checkpoint(tmp_path / "x.pt", state, {}), "'.pt'", ".safetensors")
    for facts in ({"a": torch.zeros(1)}, {"a": float("nan")}):
        assert refused(lambda facts=facts: write_checkpoint(tmp_path / "x.safetensors", state, facts), "JSON")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_the_old_file(state, tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    write_checkpoint(path, state, {"old": True})

    def full_disk(stored, header):
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoints.safetensors.torch, "save", full_disk)
    with pytest.raises(OSError):
        write_checkpoint(path, state, {"old": False})
    assert read_provenance(path) == {"old": True} and [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_provenance_of_other_files(state, tmp_path):
    torch.save(state, tmp_path / "x.pt")
    safetensors.torch.save_file(dict(state), tmp_path / "x.safetensors")
    assert read_provenance(tmp_path / "x.pt") == read_provenance(tmp_path / "x.safetensors") == {}
    safetensors.torch.save_file(dict(state), tmp_path / "x.safetensors", {"provenance": "{", "format": "pt"})
    assert refused(lambda: read_provenance(tmp_path / "x.safetensors"), "provenance")
    safetensors.torch.save_file(dict(state), tmp_path / "x.safetensors", {"provenance": json.dumps({"a": 1})})
    assert read_provenance(tmp_path / "x.safetensors") == {"a": 1}
    assert refused(lambda: read_provenance(tmp_path / "none.safetensors"), "no checkpoint file")
    assert refused(lambda: digest_of(tmp_path / "none.safetensors"), "no checkpoint file")
