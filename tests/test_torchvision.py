"""The command that tries torchvision's classifiers: light ones under methods with ranges, its table, resuming."""

import importlib.util
import json

import pytest

from benchmarks import foreign
from benchmarks.__main__ import main
from methods.core.errors import ConfigError

installed = pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed")


@installed
@pytest.mark.parametrize("method", ["sparq", "dfq", "prune_then_quantize"])
@pytest.mark.parametrize("network", ["squeezenet1_1", "shufflenet_v2_x1_0"])
def test_integers_are_exact(network, method):
    assert foreign.try_one(*foreign.build(network), method)["result"].startswith("ok")


def test_a_table_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    path, tried = tmp_path / "networks.json", []
    path.write_text(json.dumps({"resnet18": {"dfq": {"result": "ok, 21 of 21 layers in integers", "seconds": 1.0}}}))

    def try_one(model, task, method):
        tried.append((model, method))
        return {"result": "refused: no ReLU" if method == "sparq" else "ok", "seconds": 0.0}

    monkeypatch.setattr(foreign, "try_one", try_one)
    monkeypatch.setattr(foreign, "build", lambda network: (network, None))
    words = ["networks", "--networks", "alexnet", "resnet18", "--methods", "sparq", "dfq", "--out", str(path)]
    assert main(words) == main(words) == 0
    assert tried == [("alexnet", "sparq"), ("alexnet", "dfq"), ("resnet18", "sparq")]
    table = capsys.readouterr().out
    assert "| resnet18 | no (1) | ok, 21 of 21 layers in integers |" in table and "\n1. refused: no ReLU\n" in table
    assert "Taken: sparq 0 of 2, dfq 2 of 2" in table


@installed
def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="unknown network 'resnet19'"):
        foreign.build("resnet19")
    with pytest.raises(ConfigError, match="unknown method 'magic'"):
        foreign.run_networks(tmp_path / "x.json", ["alexnet"], ["magic"], print)
