"""What goes wrong around the command line: full disks, cuts, torn rows, files in place of folders; nothing is lost."""
# ruff: noqa: F811 - fixtures are imported

import errno
import json
import os

import pytest

from benchmarks import baselines
from methods.core.file import container

from .test_cli import QUICK, made, place, rows_of, run  # noqa: F401 - fixtures


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("part", ["model", "row"])
def test_a_full_disk_loses_nothing(run, place, made, monkeypatch, part):
    file, folder = made
    (path,) = folder.iterdir()
    before, writes = path.read_bytes(), []

    def late(*given, whole=container.os.fsync):
        writes.append(1)
        return full() if part == "model" or len(writes) > 1 else whole(*given)

    monkeypatch.setattr(container.os, "fsync", late)
    code, _, err = run(QUICK + " --budget density=0.25 bits=8 --name second")
    monkeypatch.undo()
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(errors) == 1 and "No space left on device" in errors[0] and "Traceback" not in err
    assert list(folder.iterdir()) == [path] and path.read_bytes() == before
    assert file.exists() and not list(place.rglob("*.tmp"))


def test_a_report_is_replaced_whole_or_not_at_all(run, place, made, monkeypatch):
    assert run("report own")[0] == 0
    before = {path: path.read_bytes() for path in (place / "results" / "reports").iterdir()}
    assert run(QUICK + " --budget density=0.25 bits=8 --name second")[0] == 0
    monkeypatch.setattr(container.os, "fsync", full)
    code, _, err = run("report own")
    assert code == 1 and err.startswith("error: cannot write ") and len(err.splitlines()) == 1
    assert {path: path.read_bytes() for path in (place / "results" / "reports").iterdir()} == before


def test_decoding_onto_a_full_disk(run, place, made, monkeypatch):
    monkeypatch.setattr(container.os, "fsync", full)
    code, _, err = run("decode {file} {here}/out.safetensors".replace("{file}", "{here}/" + str(
        made[0].relative_to(place))))
    assert code == 1 and "out.safetensors: No space left on device" in err and len(err.splitlines()) == 1
    assert not (place / "out.safetensors").exists()


@pytest.mark.parametrize("cut", ["before it", "in the middle", "after it"])
def test_a_training_cut_at_its_one_write_can_be_continued(run, place, monkeypatch, cut):
    """There is no checkpoint without scores; and to continue what is finished is success."""
    words = "train --task digits --network resnet18w2 --epochs 1 --results {here}/results"
    path = place / "results" / "baselines" / "digits_resnet18w2.safetensors"

    def breaking(out, data, whole=container.write_file):
        if cut == "after it":
            whole(out, data)
        elif cut == "in the middle":
            out.with_name(".x.tmp").write_bytes(data[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr("benchmarks.checkpoints.write_file", breaking)
    assert run(words)[0] == 130 and path.exists() == (cut == "after it")
    monkeypatch.undo()
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = run(words + " --resume")
    assert code == 0 and "held-out" in out and baselines.read_provenance(path).keys() >= {"held_out_top1", "test_top1"}
    before = path.read_bytes()
    assert run(words + " --resume")[0] == 0 and path.read_bytes() == before
    code, _, err = run(words + " --resume --seed 1")
    assert code == 1 and "is there already, from another training" in err


def test_a_torn_row_stops_nothing(run, place, made):
    _, folder = made
    (path,) = folder.iterdir()
    path.write_bytes(path.read_bytes()[:500])
    assert run(QUICK + " --budget density=0.25 bits=8 --name second")[0] == 0
    code, out, err = run("report own")
    assert code == 0 and "second" in out and f"set aside: {path} is not a row" in err
    assert run(QUICK + " --budget density=0.5 bits=8 --resume")[0] == 0 and len(rows_of(place, "own")) == 2


@pytest.mark.parametrize("name", ["rows", "models", "reports", "runs"])
def test_a_file_in_place_of_a_folder_is_refused_before_the_work(run, place, name):
    (place / "results").mkdir()
    (place / "results" / name).write_text("")
    code, out, err = run(QUICK + " --budget density=0.5 bits=8")
    assert code == 1 and len(err.splitlines()) == 1 and f"{name} is there and is no folder" in err


def test_a_folder_in_place_of_a_checkpoint_is_refused_before_the_work(run, place):
    (place / "x.safetensors").mkdir()
    code, _, err = run("train --task digits --network resnet18w2 --out {here}/x.safetensors")
    assert code == 1 and "x.safetensors: written are only .safetensors files" in err


def test_escape_sequences_are_shown_not_obeyed(run, place):
    words = QUICK + " --budget density=0.5 bits=8 --name"
    code, out, err = run(words, "red \x1b[31m\x9b2J \u202e name")
    assert code == 0 and not {"\x1b", "\x9b", "\u202e"} & set(out + err) and "\\x1b[31m\\x9b2J \\u202e name" in out
    code, out, err = run("inspect", "a\x1b]0;title\x07.jc")
    assert code == 1 and "a\\x1b]0;title\\x07.jc" in err and "\x1b" not in err
    code, out, err = run(words, "half a letter \ud800")
    assert code == 1 and len(err.splitlines()) == 1 and "needed is a text of whole letters" in err


def test_a_key_given_twice_is_refused(run, place):
    code, _, err = run(QUICK + " --budget density=0.5 bits=8 density=0.6")
    assert code == 1 and err == "error: density is given twice\n"


# --- index widths of a measurement, networks of one's own --------------------------------------------------


def test_measure_takes_the_index_widths_of_the_row(run, place, made):
    (row,) = rows_of(place, "own")
    words = ["measure", made[0], "--task", "digits", "--network", "resnet18w2", "--results", place / "results"]
    for given, width in ((["row"], 5), (["3"], 3), ([f"{name}=4" for name in row["layers"]], 4)):
        code, out, _ = run(*words, "--index-bits", *given)
        assert code == 0 and json.loads(out)["layers"]["conv1"]["index_bits"] == width
        assert (json.loads(out)["accounting"] == row["accounting"]) == (width == 5)
    copy = place / "copy.jc"
    copy.write_bytes(made[0].read_bytes()[:-1])
    for given, fault in ((["17"], "allowed is 1..16"), (["9" * 5000], "allowed is 1..16"),
                         (["conv1=3"], "index_bits lacks"), (["x"], "allowed is 1..16")):
        code, _, err = run(*words, "--index-bits", *given)
        assert code == 1 and fault in err and len(err.splitlines()) == 1
    words[1] = copy
    code, _, err = run(*words, "--index-bits", "row")
    assert code == 1 and "no row under" in err


OWN = """
import torch
from torch import nn

def make(classes, channels):
    return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, classes))

make.size, make.channels, make.scaling = 8, 1, ((0.0,), (1.0,))

def other(classes, channels):
    return "no module"
"""


def test_a_network_of_ones_own(run, place):
    (place / "net.py").write_text(OWN)
    words = "compress prune_then_quantize --budget density=0.5 bits=8 --epochs 1 --name own --network"
    code, out, err = run(words, f"{place}/net.py:make")
    assert code == 0, err
    (row,) = rows_of(place, "own")
    assert row["network"] == "net.py:make" and row["file"].startswith("own/own-net-py-make-") and str(place) not in str(
        dict(row))
    (place / "net.py").write_text(OWN.replace("nn.ReLU()", "nn.ReLU6()"))
    assert run(words, f"{place}/net.py:make", "--resume")[0] == 0
    assert rows_of(place, "own")[0]["job"] != row["job"]  # another source is another job
    for name, fault in (("absent.py:make", "there is no file"), ("net.py:nothing", "has no function 'nothing'"),
                        ("net.py:other", "made str; needed is a torch.nn.Module"), ("bad.py:make", "SyntaxError")):
        (place / "bad.py").write_text("def (")
        code, _, err = run(words, f"{place}/{name}")
        assert code == 1 and fault in err and len(err.splitlines()) == 1, err
