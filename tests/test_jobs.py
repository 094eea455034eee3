"""Jobs: what a paper_configs file may say, what a method gets to see, and rows that are not made twice."""

import dataclasses
import types

import pytest
import torch

from benchmarks import execute, jobs
from benchmarks.baselines import Setup, find_setup
from benchmarks.data import open_dataset
from benchmarks.execute import module_lines
from benchmarks.jobs import CONFIGS, Job, all_tables, file_name, prepare, read_table
from benchmarks.rows import slug
from benchmarks.settings import build as build_settings
from methods import find_method, method_names
from methods.core.budget import Budget
from methods.core.errors import BudgetError, ConfigError
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
    ("", "table.toml: no method; allowed are: method, title, others, first, smoke"),
    ('method = "x"\nrows = 3', "table.toml: unknown key 'rows'"),
    ("method = 3", "table.toml: method must be a text"),
    (HEAD + "smoke = 3", "table.toml: smoke must be a table"),
    (HEAD + "row = 3", r"table.toml: row must be tables under \[\[row\]\]"),
    (HEAD + "[row]\nname = 'a'", r"table.toml: row must be tables under \[\[row\]\]"),
    (HEAD + "[[row]]\nname = 'a'\ntask = 'digits'", "table.toml row 1 lacks the keys network"),
    (HEAD + ROW + ROW.replace('"a"', '"b"') + "lr = 3", "unknown key table.toml row 2: 'lr'; allowed are: name"),
    (HEAD + ROW + "seed = 'x'", "table.toml row 1: seed = 'x': needed is a whole number"),
    ("others = 3\n" + HEAD + ROW, "table.toml: others = 3: needed are names of its rows"),
    ("first = ['b']\n" + HEAD + ROW, r"table.toml: first = \['b'\]: needed are names of its rows, and 'b' is none"),
    ("others = ['b']\n" + HEAD + ROW, r"table.toml: others = \['b'\]: needed are names of its rows, and 'b' is none"),
    (HEAD + ROW + ROW, r"table.toml: the names under \[\[row\]\] must differ in letters or digits, but there is 'a'"),
    (HEAD + ROW + ROW.replace('"a"', '"A?"'), "must differ in letters or digits"),
    (HEAD + ROW.replace('"a"', '"!"'), "must differ in letters or digits, but there is '!'"),
    (HEAD + ROW + "[row.paper]\ntop1 = nan", "table.toml: paper of 'a', top1 = nan: a number is needed"),
    (HEAD + ROW + "[row.paper]\nbytes = '0x10'", "bytes = '0x10': a number is needed"),
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


@pytest.mark.parametrize("path", sorted(set(CONFIGS.glob("*.toml")) - {CONFIGS / "claims.toml"}),
                         ids=lambda path: path.stem)
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
    assert {table.name for table in all_tables()} == {path.stem for path in CONFIGS.glob("*.toml")} - {
        "baselines", "claims"}
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


@pytest.mark.parametrize("kind", ["train", "held_out", "calibration", "none", "test"])
def test_a_method_sees_what_its_data_says(digits, kind):
    method = types.SimpleNamespace(DATA=kind, __name__="method")
    setup = Setup(Recipe(epochs=1, lr=0.1), augment="digits")
    if kind == "test":
        with pytest.raises(ConfigError, match="method: data = 'test': allowed are train, held_out, calibration, none"):
            execute.task_for(method, None, setup, digits, "resnet18w2", CPU)
        return
    task = execute.task_for(method, None, setup, digits, "resnet18w2", CPU)
    assert (task is None) == (kind == "none")
    if task is not None:
        assert (task.train is None) == (kind != "train")
        targets = next(iter(task.held_out.epoch(None)))[1]
        assert (targets is None) == (kind == "calibration") and len(task.held_out) > 0
        task = dataclasses.replace(task, held_out=getattr(task.held_out, "batches", task.held_out))
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
