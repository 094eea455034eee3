"""The command line: each mistake is one line that names the value and what is allowed; nothing earlier is lost."""

import re

import pytest
import safetensors.torch
import torch

from benchmarks import baselines, commands, execute, jobs, sources, specs
from benchmarks.__main__ import main
from benchmarks.baselines import shorter
from benchmarks.checkpoints import write_checkpoint
from benchmarks.data import open_dataset
from benchmarks.networks import build
from benchmarks.rows import read_row, read_rows

TABLE = """
method = "prune_then_quantize"
title = "Quick rows"
[[compare]]
name = "8 bits, ünï"
task = "digits"
network = "resnet18w2"
budget = { density = 0.5, bits = 8 }
[[compare]]
name = "4 bits"
task = "digits"
network = "resnet18w2"
budget = { density = 0.5, bits = 4 }
[[row]]
name = "first"
task = "digits"
network = "resnet18w2"
budget = { density = 0.9, bits = 8 }
paper = { error_float = 1.5, cost.density = 0.5 }
[[row]]
name = "second"
task = "digits"
network = "resnet18w2"
budget = { density = 0.8, bits = 8 }
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with start.safetensors (resnet18w2 for digits) and quick.toml, the only configuration there is."""
    folder = tmp_path / "somewhere with [brackets] ü"
    folder.mkdir()
    monkeypatch.setattr(jobs, "CONFIGS", folder)
    monkeypatch.setenv("COLUMNS", "200")
    (folder / "quick.toml").write_text(TABLE, encoding="utf-8")
    write_checkpoint(folder / "start.safetensors", build("resnet18w2", 10, 1).eval().state_dict(), {})
    return folder


@pytest.fixture
def run(place, capsys):
    """run(command line, ...) -> (exit code, stdout, stderr); {here} stands for the folder, results go into it."""

    def run(text, *more):
        words = [*(word.replace("{here}", str(place)) for word in text.split()), *map(str, more)]
        if words[0] in ("compare", "reproduce", "compress", "report", "docs") and "--results" not in words:
            words += ["--results", str(place / "results")]
        capsys.readouterr()
        code = main(words)
        out, err = capsys.readouterr()
        return code, out, err

    return run


QUICK = "compress prune_then_quantize --network resnet18w2 --checkpoint {here}/start.safetensors"
START = " --network resnet18w2 --checkpoint {here}/start.safetensors"


@pytest.fixture
def made(run, place):
    """The file and the rows of one finished `compress`."""
    assert run(QUICK + " --budget density=0.5 bits=8")[0] == 0
    (path,) = (place / "results" / "models" / "own").glob("prune-then-quantize-density-0-5-bits-8-resnet18w2-*.jc")
    return path, place / "results" / "rows" / "own"


def rows_of(place, table):
    return read_rows(place / "results" / "rows" / table, print)


MISTAKES = [
    ("compress magic --budget bits=4", "unknown method 'magic'; there are: .*deep_compression.*prune_then_quantize"),
    ("compare --methods magic", "unknown method 'magic'; there are: prune_then_quantize"),
    ("compare --task imagenette", "unknown data set 'imagenette'; there are: digits, cifar10, mnist, folder:DIR, imag"),
    ("compare --task imagenet:{here}", "there is no folder .*train; imagenet takes train/CLASS/"),
    ("compare --task folder:{here}/absent", "there is no folder .*absent"),
    ("compare --network resnet9", "unknown network 'resnet9'; there are: resnet18, .*resnet18wN"),
    ("compare --network lenet300", "network lenet300 takes images of 28 x 28 x 1, but those of digits are 8 x 8 x 1"),
    ("compare --device tpu", "--device tpu: there is no such device here; allowed are cpu"),
    ("compare --device meta", "--device meta: there is no such device here"),
    ("compare --epochs -1", "epochs = -1: allowed is 0 or more"),
    ("compare --epochs 1 --checkpoint {here}/start.safetensors", "--epochs 1 trains a baseline, --checkpoint gives"),
    ("compare --results {here}/quick.toml/x", "quick.toml.*Not a directory"),
    ("compare --results {here}/quick.toml", "quick.toml is there and is no folder"),
    (QUICK + " --budget density", "'density' is not KEY=VALUE"),
    (QUICK + " --budget density=lots bits=8", "budget density = 'lots': needed is a number or a table"),
    (QUICK + " --budget density=1.5 bits=8", r"budget density = 1.5: allowed is a number in \(0, 1\]"),
    (QUICK + " --budget bits=8", "prune_then_quantize needs the budget field 'density'; it takes: density, bits"),
    (QUICK + " --budget density=0.5 bits=8 data_ratio=0.1", "cannot honour the budget field 'data_ratio'; it takes"),
    (QUICK + " --budget densities=0.5", "unknown key budget 'densities'; allowed are: density"),
    (QUICK + " --budget density={{conv9=1}} bits=8", "budget density"),
    (QUICK + " --set scop=local", "unknown key config 'scop'; allowed are: scope"),
    (QUICK + " --set retrain.epochs=3", "config retrain lacks the keys lr"),
    (QUICK + " --budget density=0.5 bits=8 --set scope=odd", "scope = 'odd': allowed are 'local', 'global'"),
    (QUICK + " --index-bits 99", "index_bits = 99: allowed is 1..16"),
    ("compress prune_then_quantize --checkpoint {here}/absent.pt", "there is no checkpoint file .*absent.pt"),
    ("compress prune_then_quantize --checkpoint {here}/quick.toml", "suffix '.toml'; allowed: .safetensors"),
    ("compress prune_then_quantize --network resnet18w4 --checkpoint {here}/start.safetensors", "does not fit ResNet"),
    ("train --task digits --network resnet18w2 --out {here}/a.pt", "a.pt: written are only .safetensors"),
    ("train --task digits --network nonsense --out {here}/a.safetensors", "unknown network 'nonsense'"),
    ("reproduce {here}/absent.toml", "cannot read the configuration .*absent.toml: No such file"),
    ("reproduce {here}/start.safetensors", "start.safetensors is not valid TOML"),
    ("reproduce {here}/quick.toml --row third", "quick.toml has no row 'third'; there are: 'first', 'second'"),
    ("reproduce {here}/quick.toml --network lenet300", "quick.toml has no row of 'lenet300'; there are: 'resnet18w2"),
    ("report nothing", "there are no rows .*nothing"),
    ("report --rows {here}/start.safetensors", "there are no rows .*start.safetensors: it is no folder"),
    ("report --rows {here}", "somewhere with .* holds no rows"),
    ("inspect {here}/absent.jc", "absent.jc.*no such file"),
    ("inspect {here}/quick.toml", "quick.toml: not a compressed model"),
    ("inspect {here}", "cannot be read: Is a directory"),
    ("decode {here}/start.safetensors {here}/out.safetensors", "not a compressed model"),
    ("decode {here}/start.safetensors {here}/out.pt", "out.pt: written are only .safetensors"),
    (QUICK + " --budget density=0.5 bits=8 --rows-name a/b", "--rows-name 'a/b': allowed are letters, digits"),
    (QUICK + " --budget density=0.5 bits=8 --name !!!", "name = '!!!': it needs a letter or digit"),
    ("train --task digits --network resnet18w2 --checkpoint {here}/start.safetensors", "train starts from nothing"),
    ("measure {here}/absent.jc --task digits --network resnet18w2", "absent.jc"),
]


@pytest.mark.parametrize("words, message", MISTAKES, ids=lambda value: re.sub(r"\W+", "-", value)[:60])
def test_mistakes_are_one_line(run, place, words, message):
    code, out, err = run(words.replace("{{", "{").replace("}}", "}"))
    assert code == 1 and out == ""
    progress = ("warning: the baseline is at chance level", "row 1 of ")
    lines = [line for line in err.splitlines() if not line.startswith(progress)]
    assert len(lines) == 1 and lines[0].startswith("error: ") and re.search(message, err), err
    assert "Traceback" not in err and "[Errno" not in err
    assert not (place / "results" / "rows").exists()


def test_unknown_words_are_refused_with_usage(run, capsys):
    for words in ("compress", "nonsense", "compare --seed -1", "compare --seed x", "compare --dev cpu", ""):
        with pytest.raises(SystemExit) as caught:
            main(words.split())
        assert caught.value.code == 2 and "usage: python -m benchmarks" in capsys.readouterr().err


def test_missing_data_say_where_they_were_looked_for(run, place, monkeypatch):
    def offline(*_):
        raise OSError("no route\nto host")

    monkeypatch.setattr(sources._torchvision, "download", offline)
    code, _, err = run("compare --task mnist --data-dir {here}")
    assert code == 1 and len(err.splitlines()) == 1 and "mnist.npz" in err and "no route to host" in err


@pytest.mark.parametrize("command", ["inspect {file}", "decode {file} {here}/out.safetensors",
                                     "measure {file} --task digits --network resnet18w2",
                                     "verify {file} --task digits --network resnet18w2"])
def test_damaged_files(run, place, made, command):
    data = made[0].read_bytes()
    middle = len(data) // 2
    damages = {"cut": data[:-1], "half": data[:middle], "empty": b"", "one": data[:1],
               "flipped": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1:], "longer": data + b"x"}
    for name, damaged in damages.items():
        path = place / f"{name}.jc"
        path.write_bytes(damaged)
        code, out, err = run(command.replace("{file}", f"{{here}}/{name}.jc"))
        assert code == 1 and out == "" and len(err.splitlines()) == 1 and err.startswith("error: "), (name, err)
        assert f"{name}.jc" in err
    assert not (place / "out.safetensors").exists()


def test_a_file_of_another_network(run, made):
    code, _, err = run(f"measure {{here}}/results/models/own/{made[0].name} "
                       "--task digits --network resnet18w4")
    assert code == 1 and len(err.splitlines()) == 1 and "belongs to another network" in err


# --- what it is for ----------------------------------------------------------------------------------------


def test_compress_inspect_measure_decode(run, place, made):
    file, _ = made
    (row,) = rows_of(place, "own")
    words = "{here}/" + str(file.relative_to(place))
    code, out, _ = run(f"inspect {words} --json")
    assert code == 0 and f'"bytes": {file.stat().st_size}' in out
    code, out, _ = run(f"measure {words} --task digits --network resnet18w2")
    assert code == 0 and f'"top1_integer": {row["top1_integer"]}' in out
    code, out, _ = run(f"verify {words} --task digits --network resnet18w2 --inputs 20 --reference 3")
    assert code == 0 and '"inputs": 20' in out and '"wrong": 0' in out and '"reference_wrong": 0' in out
    code, _, err = run(f"verify {words} --task digits --network resnet18w2 --inputs 0")
    assert code == 1 and "--inputs 0: at least 1 is needed" in err
    code, out, _ = run(f"decode {words} {{here}}/out.safetensors")
    assert code == 0 and str(place / "out.safetensors") in out.replace("\n", "")
    state = safetensors.torch.load_file(place / "out.safetensors")
    assert sum(int((state[name] != 0).sum()) for name in row["layers"] for name in [f"{name}.weight"]) == row["cost"][
        "kept_weights"]


def test_a_file_of_another_row_is_not_taken_for_finished(run, place, made):
    """Under one name the last row counts; with --resume the first is made again, since its place is taken."""
    file, folder = made
    words = QUICK + " --name one --budget density=0.5 bits="
    for bits in (8, 4, 8):
        assert run(f"{words}{bits} --resume")[0] == 0
    (row,) = [row for row in rows_of(place, "own") if row["name"] == "one"]
    path = place / "results" / "models" / row["file"]
    assert path.read_bytes() == file.read_bytes() and row["budget"]["bits"] == 8
    assert {read_row(one)["budget"]["bits"] for one in (folder / "superseded").iterdir()} == {8, 4}
    before = path.stat().st_mtime_ns
    assert run(f"{words}8 --resume")[0] == 0 and path.stat().st_mtime_ns == before


def test_training_does_not_replace_a_baseline_unasked(run, place):
    words = "train --task digits --network resnet18w2 --epochs 0 --results {here}/results"
    assert run(words)[0] == 0
    code, _, err = run(words)
    assert code == 1 and "digits_resnet18w2.safetensors is there already" in err and "--out" in err


def test_a_report_keeps_the_rows_of_earlier_commands(run, place):
    for seed in (0, 1):
        assert run(f"compare --task digits --seed {seed}" + START)[0] == 0
    text = (place / "results" / "reports" / "compare_digits.md").read_text(encoding="utf-8")
    assert text.count("| 4 bits |") == 1 and " ± " in text  # two seeds, one line


def test_compare_from_training_to_report(run, place):
    code, out, err = run("compare --task digits --network resnet18w2 --epochs 1")
    assert code == 0 and "Traceback" not in err
    assert "8 bits, ünï" in out and "float32 baseline" in out and "4 bits" in out
    made = rows_of(place, "compare_digits")
    assert [row["name"] for row in made] == ["8 bits, ünï", "4 bits"]
    assert made[0]["setup"] == {"batch_size": 64, "augment": "digits", "autocast": False}
    page = (place / "results" / "reports" / "table_compare_digits.html").read_text(encoding="utf-8")
    assert "python -m benchmarks compare --task digits --network resnet18w2 --epochs 1<" in page
    assert str(place) not in page and str(place) not in str(made)
    names = {path.name for path in (place / "results" / "reports").iterdir()}
    assert names == {"table_compare_digits.html", "style.css", "tables.js",
                     *(f"compare_digits.{end}" for end in ("md", "csv", "tex"))}
    assert run("report compare_digits")[0] == 0


def test_an_interrupted_compare_goes_on_where_it_was(run, place, monkeypatch):
    """The baseline and the first row are done when it breaks off: neither is made again."""
    whole, trainings = execute.measured, []
    monkeypatch.setattr(specs, "train_baseline",
                        lambda *given, _f=specs.train_baseline, **more: trainings.append(1) or _f(*given, **more))
    counted = []

    def breaking(*given):
        counted.append(1)
        if len(counted) == 2:
            raise KeyboardInterrupt
        return whole(*given)

    monkeypatch.setattr(execute, "measured", breaking)
    words = "compare --task digits --network resnet18w2 --epochs 1"
    code, _, err = run(words)
    assert code == 130 and err.splitlines()[-1] == "interrupted; the same command with --resume continues"
    (first,) = rows_of(place, "compare_digits")
    code, out, _ = run(words + " --resume")
    made = rows_of(place, "compare_digits")
    assert code == 0 and made[0] == first and len(made) == 2
    assert len(counted) == 3 and len(trainings) == 1 and "8 bits, ünï" in out
    assert run(words + " --resume")[0] == 0 and rows_of(place, "compare_digits") == made and len(counted) == 3


def test_a_shipped_baseline_is_taken_only_for_the_data_it_was_trained_on(run, place, monkeypatch):
    monkeypatch.setattr(baselines, "SHIPPED", place)
    shipped, words = place / "digits_resnet18w2.safetensors", "compare --task digits --network resnet18w2"
    state = build("resnet18w2", 10, 1).eval().state_dict()
    write_checkpoint(shipped, state, {"data": open_dataset("digits").digest})
    code, _, err = run(words)
    assert code == 0 and "train" not in err
    write_checkpoint(shipped, state, {"data": "other"})
    monkeypatch.setattr(specs, "shorter", lambda setup, epochs: shorter(setup, 1))
    code, _, err = run(words)
    assert code == 0 and "digits_resnet18w2.safetensors has seen other pictures" in err and "train resnet18w2" in err
    sources_of = [row["checkpoint"]["source"] for row in rows_of(place, "compare_digits")]
    assert len(sources_of) == 4 and sources_of.count(shipped.name) == 2


def test_reproduce_prints_ours_beside_the_paper(run, place):
    code, out, _ = run("reproduce {here}/quick.toml --checkpoint {here}/start.safetensors --row first")
    assert code == 0 and "error_float" in out and "1.5" in out and "cost.density" in out
    code, out, _ = run("reproduce {here}/quick.toml --checkpoint {here}/start.safetensors")
    names = [row["name"] for row in rows_of(place, "quick")]
    assert code == 0 and names == ["first", "second"]
    assert run("reproduce {here}/quick.toml --checkpoint {here}/start.safetensors --network resnet18w2 --row second "
               "--resume")[0] == 0
    code, out, _ = run("report quick")
    page = (place / "results" / "reports" / "table_quick.html").read_text(encoding="utf-8")
    assert code == 0 and "error_float" in out and "error, float arithmetic, %" in page


def test_docs_are_the_site_of_all_rows_and_fill_the_readme(run, place, made, monkeypatch):
    assert run("reproduce {here}/quick.toml --checkpoint {here}/start.safetensors --row first")[0] == 0
    text = "<!-- headline: compare_cifar10 -->\n<!-- end -->\n<!-- papers: all -->\n<!-- end -->\n"
    (place / "README.md").write_text(text)
    monkeypatch.setattr(commands, "ROOT", place)
    monkeypatch.setattr(commands, "HEADLINE", "own")
    code, out, err = run("docs --no-api --out {here}/site")
    assert code == 0, err
    assert "index.html" in out and (place / "README.md").read_text() == text  # not asked for
    assert {path.stem for path in (place / "site").glob("table_*.html")} == {"table_own", "table_quick"}
    assert "All methods, resnet18w2 on digits" in (place / "site" / "index.html").read_text(encoding="utf-8")
    code, _, err = run("docs --no-api --readme --out {here}/site")
    assert code == 1 and "a block asks for the rows of 'compare_cifar10'" in err
    (place / "README.md").write_text(text.replace("compare_cifar10", "own"))
    (place / "results" / "TABLES.md").write_text("all\n<!-- rows: own -->\n<!-- end -->\n")
    assert run("docs --no-api --readme --out {here}/site")[0] == 0
    for text in (place / "README.md", place / "results" / "TABLES.md"):
        assert "| prune_then_quantize density=0.5 bits=8 |" in text.read_text(encoding="utf-8")
    code, _, err = run("docs --no-api --out {here}/README.md")
    assert code == 1 and "README.md: this is a file; a folder is needed" in err


def test_train_writes_a_checkpoint_that_compress_takes(run, place):
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    code, out, _ = run("train --task digits --network resnet18w2 --epochs 1 --results {here}/results "
                       "--out {here}/new/net.safetensors")
    assert code == 0 and "held-out" in out and torch.equal(torch.random.get_rng_state(), before)
    assert run("compress prune_then_quantize --network resnet18w2 --checkpoint {here}/new/net.safetensors "
               "--budget density=0.5 bits=8 --seed 3")[0] == 0
    assert rows_of(place, "own")[0]["seed"] == 3
