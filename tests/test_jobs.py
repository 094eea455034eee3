"""Jobs: what a paper_configs file may say, what a method gets to see, and rows that are not made twice."""

import dataclasses
import types
from pathlib import Path

import pytest
import torch

from benchmarks import execute, jobs, measure
from benchmarks.baselines import Baseline, Setup, find_setup
from benchmarks.chance import unpack
from benchmarks.data import open_dataset
from benchmarks.execute import Place, Start, module_lines, run_job
from benchmarks.jobs import CONFIGS, Job, all_tables, file_name, prepare, read_table
from benchmarks.metrics import OF_A_LAYER, OF_A_ROW
from benchmarks.networks import build
from benchmarks.report import against_paper
from benchmarks.rows import read_rows, slug
from benchmarks.settings import build as build_settings
from methods import find_method, method_names
from methods.core.budget import Budget
from methods.core.errors import BudgetError, ConfigError, GraphError
from methods.core.file.storage import decode, encode
from methods.core.graph.build import weight_layers
from methods.core.train.finetune import Recipe

CPU = torch.device("cpu")
HEAD = 'method = "prune_then_quantize"\ntitle = "A title"\n'
ROW = '[[row]]\nname = "a"\ntask = "digits"\nnetwork = "resnet18w2"\nbudget = { density = 0.5, bits = 8 }\n'


@pytest.fixture
def written(tmp_path):
    def write(text):
        path = tmp_path / "table.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


# --- tables ------------------------------------------------------------------------------------------------


def test_a_table(written):
    table = read_table(written(HEAD + '[smoke]\nbudget = { bits = 4 }\n' + ROW + 'seed = 3\n[row.paper]\n'
                               'error_float = 1.58\ncost.density = 0.08\n[row.paper.layers]\n'
                               'conv1 = { density = 0.5 }\n'))
    job = Job("a", "prune_then_quantize", "digits", "resnet18w2", {"density": 0.5, "bits": 8}, seed=3, paper={
        "error_float": 1.58, "cost": {"density": 0.08}, "layers": {"conv1": {"density": 0.5}}})
    assert table.rows == (job,) and table.compare == () and table.smoke == {"budget": {"bits": 4}}
    assert (table.name, table.method, table.title) == ("table", "prune_then_quantize", "A title")


@pytest.mark.parametrize("text, message", [
    ("", "table.toml: no method; allowed are: method, title, smoke"),
    ('method = "x"\nrows = 3', "table.toml: unknown key 'rows'"),
    ("method = 3", "table.toml: method must be a text"),
    (HEAD + "smoke = 3", "table.toml: smoke must be a table"),
    (HEAD + "row = 3", r"table.toml: row must be tables under \[\[row\]\]"),
    (HEAD + "[row]\nname = 'a'", r"table.toml: row must be tables under \[\[row\]\]"),
    (HEAD + "[[row]]\nname = 'a'\ntask = 'digits'", "table.toml row 1 lacks the keys network"),
    (HEAD + ROW + ROW.replace('"a"', '"b"') + "lr = 3", "unknown key table.toml row 2: 'lr'; allowed are: name"),
    (HEAD + ROW + "seed = 'x'", "table.toml row 1: seed = 'x': needed is a whole number"),
    (HEAD + ROW + ROW, r"table.toml: the names under \[\[row\]\] must differ in letters or digits, but there is 'a'"),
    (HEAD + ROW + ROW.replace('"a"', '"A?"'), "must differ in letters or digits"),
    (HEAD + ROW.replace('"a"', '"!"'), "must differ in letters or digits, but there is '!'"),
    (HEAD + ROW + "[row.paper]\ntop1 = nan", "table.toml: paper of 'a', top1 = nan: a number is needed"),
    (HEAD + ROW + "[row.paper]\ntop1 = '57.2'", "table.toml: paper of 'a', top1 = '57.2': a number is needed"),
    (HEAD + ROW + "[row.paper]\ntop1_flaot = 57.2", "there is no metric 'top1_flaot'; near: top1_float"),
    (HEAD + ROW + "[row.paper]\ncost.densty = 0.1", "there is no metric 'cost.densty'; near: cost.density"),
    (HEAD + ROW + "[row.paper]\nlayers.conv1.dens = 0.1", "layer conv1: there is no metric 'dens'; near: density"),
    (HEAD + ROW + "[row.paper]\nbytes = [1, 2, 3]", r"bytes = \[1, 2, 3\]: a number is needed, or \[number, dev"),
    (HEAD + ROW + "[row.paper]\nlayers = { conv1 = 3 }", "paper of 'a': layers"),
    (HEAD + "= 3", "is not valid TOML"),
])
def test_mistakes_in_tables(written, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read_table(written(text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_configs_are_well_formed(path):
    if path.name == "baselines.toml":
        setups = [(task, network) for task, networks in jobs.read_toml(path).items() if task != "default"
                  for network in networks]
        assert setups and all(isinstance(find_setup(*setup), Setup) for setup in setups)
        return
    table = read_table(path)
    assert table.method in method_names() and (table.rows or table.compare)
    for job in (*table.rows, *table.compare):
        method, budget, config = prepare(job)
        assert isinstance(budget, Budget) and isinstance(config, method.Config)
    if table.smoke:
        build_settings(find_method(table.method).Config, table.smoke.get("config", {}))


def test_all_tables_reads_every_file(monkeypatch, tmp_path):
    assert {table.name for table in all_tables()} == {path.stem for path in CONFIGS.glob("*.toml")} - {"baselines"}
    (tmp_path / "one.toml").write_text(HEAD + ROW)
    (tmp_path / "two.toml").write_text("broken")
    monkeypatch.setattr(jobs, "CONFIGS", tmp_path)
    with pytest.raises(ConfigError, match="two.toml"):
        all_tables()


@pytest.mark.parametrize("changes, error, message", [
    ({"method": "prune_then_quantise"}, ConfigError, "unknown method 'prune_then_quantise'; there are: .*deep_comp"),
    ({"budget": {"densty": 0.5}}, ConfigError, "unknown key budget 'densty'; allowed are: density"),
    ({"budget": {"density": 1.5}}, BudgetError, r"budget density = 1.5: allowed is a number in \(0, 1\]"),
    ({"config": {"scope": 3}}, ConfigError, "config scope = 3: needed is a text"),
    ({"config": {"retrain": {"epochs": 1}}}, ConfigError, "config retrain lacks the keys lr"),
    ({"index_bits": 0}, ConfigError, "index_bits = 0: allowed is 1..16, or .auto."),
    ({"index_bits": {"conv1": 3, "fc": 17}}, ConfigError, "index_bits = 17: allowed is 1..16, or .auto."),
    ({"index_bits": {"conv1": 3.0}}, ConfigError, "index_bits = 3.0: allowed is 1..16, or .auto."),
    ({"network": "resnet9"}, ConfigError, "unknown network 'resnet9'"),
    ({"seed": 2**63}, ConfigError, "seed = 9223372036854775808"),
    ({"bn_reestimation": -5}, ConfigError, "bn_reestimation = -5"),
    ({"name": "x" * 300}, ConfigError, "at most 200"),
])
def test_mistakes_in_jobs(changes, error, message):
    with pytest.raises(error, match=message):
        plain = {"name": "a", "method": "prune_then_quantize", "task": "digits", "network": "resnet18w2"}
        prepare(Job(**plain | changes))


def test_names_of_files():
    assert slug("4-bit, 10 % [Ünïcode]") == "4-bit-10-ünïcode" and slug("../../etc") == "etc"
    job = Job("faithful", "m", "mnist", "lenet300")
    names = {file_name(dataclasses.replace(job, **change)) for change in ({}, {"seed": 1}, {"network": "lenet5_bb"})}
    assert len(names) == 3 and "faithful-lenet300" in names


# --- what a method sees ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    return open_dataset("digits")


@pytest.mark.parametrize("kind", ["train", "calibration", "none", "test"])
def test_a_method_sees_what_its_data_says(digits, kind):
    method = types.SimpleNamespace(DATA=kind, __name__="method")
    setup = Setup(Recipe(epochs=1, lr=0.1), augment="digits")
    if kind == "test":
        with pytest.raises(ConfigError, match="method.DATA = 'test': allowed are train, none, calibration"):
            execute.task_for(method, None, setup, digits, "resnet18w2", CPU)
        return
    task = execute.task_for(method, None, setup, digits, "resnet18w2", CPU)
    assert (task is None) == (kind == "none")
    if task is not None:
        assert (task.train is None) == (kind == "calibration")
        assert len(task.calibration_inputs(10)) == 10
        seen = {name for name, part in vars(task).items() if hasattr(part, "epoch")}
        assert seen == {"held_out", "calibration"} | ({"train"} if kind == "train" else set())
        images = {bytes(image) for part in seen for image in getattr(task, part).images.flatten(1).numpy()}
        assert not images & {bytes(image) for image in digits.test.images.flatten(1).numpy()}


SAMPLE = '''"""A module
of two lines."""

import os  # counted


# not counted
class Thing:
    """Doc."""

    size = 3

    def method(self):
        """Doc
        over lines.
        """
        return """not
a docstring"""


def function(): return os
'''


def test_lines_of_code(tmp_path, monkeypatch):
    (tmp_path / "sample_of_lines.py").write_text(SAMPLE)
    monkeypatch.syspath_prepend(tmp_path)
    import sample_of_lines

    assert module_lines(sample_of_lines) == 7


def test_knobs_of_a_budget():
    assert execute.knobs_of(Budget()) == 0
    assert execute.knobs_of(Budget(density={"a": 0.5, "b": 0.1}, bits=4)) == 3


# --- a row -------------------------------------------------------------------------------------------------


class Screen:
    """Keeps what it is told."""

    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)

    def update(self, label, step, total, metrics):
        pass


def job(**changes):
    return Job(**{"name": "a ü", "method": "prune_then_quantize", "task": "digits", "network": "resnet18w2",
                  "budget": {"density": 0.5, "bits": 8}, "paper": {"error_float": 1.0}} | changes)


@pytest.fixture
def run(digits, tmp_path):
    """run(job, resume) -> (row, lines said); with rows and models under tmp_path."""
    scores = {}

    def run(one, resume=False, seed=0, provenance=None):
        screen = Screen()
        name = f"{seed}" * 16
        baseline = Baseline(build("resnet18w2", 10, 1, seed=seed).eval(), name, "source", provenance or {})
        place = Place(tmp_path, CPU, screen, resume, scores)
        return run_job(one, digits, Start(baseline, torch.arange(360) % 2 == 0, 50.0), place, "own"), screen.lines

    return run


def rows_in(folder):
    return read_rows(folder / "rows" / "own", print)


def test_a_row_knows_chance(run):
    """Standard error, held-out top-1, and the pairs of the baseline, which has every second picture right."""
    row, _ = run(job())
    for kind in ("float", "integer"):
        right, pairs, share = unpack(row["right"][kind], 360), row["against_baseline"][kind], row[f"top1_{kind}"] / 100
        assert int(right.sum()) == round(3.6 * row[f"top1_{kind}"])
        assert row["standard_error"][kind] == pytest.approx(100 * (share * (1 - share) / 360) ** 0.5)
        assert pairs["change"] == pytest.approx(row[f"top1_{kind}"] - 50) and pairs["low"] < pairs["high"]
        assert (pairs["lost"], pairs["gained"]) == (int((~right[::2]).sum()), int(right[1::2].sum()))
    assert row["baseline_top1"] == 50 and row["n_test"] == 360 and 0 <= row["held_out_top1"] <= 100


def test_a_row_describes_its_file(run, tmp_path):
    row, _ = run(job())
    path = tmp_path / "models" / row["file"]
    assert row["bytes"] == path.stat().st_size == sum(row["bytes_split"].values())
    kept = sum(tensor.kept for tensor in decode(path).weights.values())
    assert row["cost"]["kept_weights"] == kept and row["cost"]["density"] == kept / row["dense_weights"]
    assert row["dense_macs"] == row["cost"]["macs"] and row["ranges_by"] == "method"
    assert rows_in(tmp_path) == [row] and row["file_digest"] == execute.digest_of(path)
    assert row["config"]["scope"] == "local" and row["budget"]["bits"] == 8
    assert not list((tmp_path / "runs").rglob("*.pt"))


def test_every_metric_that_a_paper_may_print_is_in_a_row(run):
    row, _ = run(job())
    lacking = [metric for metric in OF_A_ROW if against_paper.lookup(row, metric) is None]
    assert lacking == ["top1_float_bn_reestimated"]  # a row has it where it is asked for
    assert set(OF_A_LAYER) == set(row["layers"]["conv1"])


def test_the_same_weights_are_scored_once(run, monkeypatch):
    counted, whole = [], measure.right_of
    monkeypatch.setattr(measure, "right_of", lambda networks, _: counted.append(len(networks)) or whole(networks, _))
    rows = [run(job(config={"activation_bits": bits}))[0] for bits in (8, 4)]
    rows.append(run(job(budget={"density": 0.4, "bits": 8}))[0])
    assert counted[::2] == [2, 1, 2] and counted[1::2] == [1, 1, 1]  # test, then held out
    assert rows[0]["top1_float"] == rows[1]["top1_float"]


def test_widths_of_the_index_by_layer(run):
    layers = weight_layers(build("resnet18w2", 10, 1))
    widths = {name: 2 + i % 4 for i, name in enumerate(layers)}
    row, _ = run(job(index_bits=widths))
    assert {name: facts["index_bits"] for name, facts in row["layers"].items()} == widths


def test_resume_does_not_repeat_a_finished_job(run, tmp_path):
    first, _ = run(job())
    again, lines = run(job(paper={"error_float": 2.0}, note="other"), resume=True)
    assert first.changed(paper={"error_float": 2.0}, note="other") == again and "in" in lines[0]
    assert rows_in(tmp_path) == [first]
    other, _ = run(job(budget={"density": 0.4, "bits": 8}), resume=True)
    seeded, _ = run(job(seed=1), resume=True)
    assert rows_in(tmp_path) == [other, seeded]  # one of another budget takes the place of the first
    assert len(list((tmp_path / "rows" / "own" / "superseded").iterdir())) == 1
    path = tmp_path / "models" / seeded["file"]
    path.write_bytes(b"other bytes")
    assert run(job(seed=1), resume=True)[0]["file_digest"] == seeded["file_digest"] == execute.digest_of(path)


def test_another_baseline_is_another_row(run, tmp_path):
    """Its file, too: two commands at once cannot measure each other's."""
    one, two = run(job())[0], run(job(), seed=1)[0]
    assert len(rows_in(tmp_path)) == 2 and one["file"] != two["file"] and one["file_digest"] != two["file_digest"]
    assert all(execute.is_of(tmp_path / "models" / row["file"], row) for row in (one, two))


def test_what_is_measured_is_what_this_run_wrote(run, tmp_path, monkeypatch):
    """Another process writes the same row while this one measures: each row has its own bytes until the end."""
    whole, inner = execute.measure, []

    def meanwhile(path, *given, **more):
        monkeypatch.setattr(execute, "measure", whole)
        inner.append(run(job(budget={"density": 0.1, "bits": 8}))[0])
        return whole(path, *given, **more)

    monkeypatch.setattr(execute, "measure", meanwhile)
    outer = run(job())[0]
    assert outer["file"] == inner[0]["file"] and outer["file_digest"] != inner[0]["file_digest"]
    assert outer["cost"]["density"] > 0.4 and inner[0]["cost"]["density"] < 0.2
    assert rows_in(tmp_path) == [outer] and execute.is_of(tmp_path / "models" / outer["file"], outer)


def test_a_row_goes_on_from_the_states_of_another_commit(run, monkeypatch):
    config = {"retrain": {"epochs": 1, "lr": 0.01}, "aware": {"epochs": 1, "lr": 0.01}}
    method, whole = jobs.find_method("prune_then_quantize"), jobs.find_method("prune_then_quantize").compress

    def cut(model, task, budget, config, generator, *, run=None):
        whole(model, task, budget, config, generator, run=run)
        raise KeyboardInterrupt

    monkeypatch.setattr("benchmarks.runs.origin", lambda: ("first", True))
    monkeypatch.setattr(method, "compress", cut)
    with pytest.raises(KeyboardInterrupt):
        run(job(config=config))
    monkeypatch.setattr(method, "compress", whole)
    for module in ("runs", "execute"):
        monkeypatch.setattr(f"benchmarks.{module}.origin", lambda: ("second", False))
    row, _ = run(job(config=config), resume=True)
    assert (row["commit"], row["dirty"], row["mixed"]) == ("second", True, True) and not row.clean
    assert row["made_by"] == [["first", True], ["second", False]]
    assert run(job(config=config))[0].clean
    assert not run(job(config=config), provenance={"commit": "x", "dirty": True})[0].clean


def test_an_unknown_float_layer_is_refused_before_any_work(run, tmp_path):
    with pytest.raises((ConfigError, GraphError), match="float_policy names 'conv9'; resnet18w2 has: conv1, layer1"):
        run(job(float_policy=("conv9",)))
    with pytest.raises(ConfigError, match="index_bits names conv1; resnet18w2 has: conv1, layer1"):
        run(job(index_bits={"conv1": 3}))
    assert not (tmp_path / "models").exists()


def test_a_failing_method_leaves_no_row(run, tmp_path):
    with pytest.raises(BudgetError, match="cannot honour the budget field 'data_ratio'; it takes: density, bits"):
        run(job(budget={"density": 0.5, "bits": 8, "data_ratio": 0.1}))
    assert not Path(tmp_path / "rows").exists()


def test_a_damaged_file_is_never_measured(run, monkeypatch, tmp_path):
    def damaging(compressed, path, **options):
        encode(compressed, path, **options)
        path.write_bytes(path.read_bytes()[:-1])

    monkeypatch.setattr(execute, "encode", damaging)
    with pytest.raises(ValueError, match="checksum"):
        run(job())
    assert not (tmp_path / "rows").exists() and not [path for path in tmp_path.rglob("*") if path.is_file()]
