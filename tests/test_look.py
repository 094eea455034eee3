"""A look at a file: the table adds up, and takes no torch."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import methods
from benchmarks.__main__ import main
from methods.core.artifact import DTYPES, Affine, CompressedTensor
from methods.core.file.storage import encode, inspect
from methods.core.graph.build import assemble
from methods.core.quantizers import DTYPE_BYTES

ROOT = Path(__file__).parent.parent


@pytest.fixture
def file(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 7))
    grid = Affine(torch.tensor(0.1), torch.tensor(0, dtype=torch.int32))
    weight = CompressedTensor.of(torch.randint(-8, 8, (20, 30)), grid, 4, torch.rand(20, 30) < 0.4)
    encode(assemble(net, {"0": weight}), tmp_path / "net.jc")
    return tmp_path / "net.jc"


def test_every_byte_is_in_one_row_of_the_table(file, capsys):
    assert main(["inspect", str(file)]) == 0
    out = capsys.readouterr().out
    sizes = [int(size.replace(",", "")) for size in re.findall(r"([\d,]+) +[\d.]+ %", out)]
    assert sum(sizes) == file.stat().st_size
    assert "20x30" in out and "affine" in out and "weights that stay float: 2.weight 560 B" in out


def test_json_is_what_inspect_says(file, capsys):
    assert main(["inspect", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == inspect(file)


@pytest.mark.parametrize("words", [["--help"], ["inspect", "FILE"], ["sweep", "--help"]])
def test_no_torch_is_loaded(words, file):
    code = f"""
import contextlib, sys
from benchmarks.__main__ import main
with contextlib.suppress(SystemExit):
    main({[str(file) if word == "FILE" else word for word in words]!r})
sys.exit("torch" in sys.modules)"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0


def test_every_public_name_is_there():
    names = methods.__all__
    assert len(set(names)) == len(names) and {"encode", "shrink", "sixteen_bit", "find_method"} <= set(names)
    assert all(getattr(methods, name) is not None for name in names)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        methods.nothing  # noqa: B018


def test_dtypes_are_as_wide_as_they_say():
    assert {name: dtype.itemsize for name, dtype in DTYPES.items()} == DTYPE_BYTES
