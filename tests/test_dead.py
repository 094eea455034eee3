"""The command that shows what removing dead units makes of stored files, and rows that have both sizes."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks import networks
from benchmarks.__main__ import main
from benchmarks.dead import network_of
from benchmarks.execute import as_stored
from benchmarks.jobs import Job
from methods.core.artifact import ActivationQuantizer, Affine, CompressedTensor
from methods.core.errors import ConfigError
from methods.core.file.storage import encode
from methods.core.graph.build import assemble
from methods.core.graph.shrink import shrink


def test_of_a_file_whose_dead_units_are_known(tmp_path, capsys):
    torch.manual_seed(0)
    model = networks.build("lenet5_caffe", 10, 1)
    codes = torch.randint(1, 7, model.ip1.weight.shape)
    codes[:30] = 0  # units that read nothing
    model.conv2.weight.data[7] = 0
    ip1 = CompressedTensor.of(codes, Affine(torch.tensor(0.01), torch.tensor(0, dtype=torch.int32)), 4)
    encode(assemble(model, {"ip1": ip1}), tmp_path / "net.jc")
    arguments = ["shrink", str(tmp_path / "net.jc"), "--json", "--results", str(tmp_path)]
    assert main(arguments) == 1 and "give --task and --network" in capsys.readouterr().err
    named = ["--task", "mnist", "--network", "lenet5_caffe"]
    if main([*arguments, *named]) != 0:
        pytest.skip("MNIST is not here")
    (found,) = json.loads(capsys.readouterr().out)
    assert found["channels"] == {"ip1": [470, 500]} and found["after"] < found["before"] and found["changed"] == 0
    assert main([*(word for word in arguments if word != "--json"), *named]) == 0
    assert "ip1 470 of 500" in capsys.readouterr().out


def test_the_network_is_that_of_the_row(tmp_path):
    known = {"table/net.jc": ("mnist", "lenet300")}
    assert network_of(tmp_path / "table" / "net.jc", known, None, None) == ("mnist", "lenet300")
    assert network_of(tmp_path / "table" / "net.jc", known, None, "other") == ("mnist", "other")
    with pytest.raises(ConfigError, match="no row says"):
        network_of(tmp_path / "net.jc", known, "mnist", None)


def test_nothing_dead_nothing_changed():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    compressed = assemble(model, {})
    small = shrink(compressed, model)
    assert small.topology == compressed.topology
    assert all(torch.equal(value, small.rest[name]) for name, value in compressed.rest.items())


def test_what_a_job_asks_for_is_stored():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    model[2].weight.data[:, 1] = 0
    ranges = {name: ActivationQuantizer(0.1) for name in ("0", "2")}
    compressed = assemble(model, {}, activations=ranges)
    job = Job("a", "dfq", "digits", "")
    stored = {(cut, short): as_stored(compressed, replace(job, shrink=cut, sixteen_bit=short), model, None)
              for cut in (False, True) for short in (False, True)}
    for (cut, short), found in stored.items():
        bias = found.rest["0.bias"]
        assert len(bias) == (3 if cut else 4)
        assert bool((bias == bias.half().float()).all() or (bias == bias.bfloat16().float()).all()) == short
