"""Settings: TOML and KEY=VALUE into frozen dataclasses; every mistake names the key, the value, what is allowed."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Optional

import pytest

from benchmarks.settings import build, count_knobs, from_assignments, merge, plain, read_toml
from methods.core.budget import Budget
from methods.core.errors import BudgetError, ConfigError
from methods.core.train.finetune import Recipe


@dataclass(frozen=True)
class Inner:
    epochs: int
    lr: float = 0.5


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner = Inner(8, 0.1)
    extra: Inner | None = None
    rate: float | None = None
    old: Optional[float] = None  # noqa: UP045 - both spellings are in use
    deep: bool = False
    shifts: tuple[int, ...] = (1,)
    pair: tuple[int, str] = (1, "a")
    layers: Mapping[str, Any] = field(default_factory=dict)


def test_values_are_taken_as_typed():
    made = build(Outer, {"name": "a", "rate": 3, "deep": True, "shifts": [4, 2], "pair": [2, "b"],
                         "layers": {"conv1": 8}, "extra": {"epochs": 2}})
    assert made == Outer("a", Inner(8, 0.1), Inner(2, 0.5), 3.0, None, True, (4, 2), (2, "b"), {"conv1": 8})
    assert type(made.rate) is float and type(made.shifts) is tuple


def test_a_nested_table_leaves_the_rest_of_its_default():
    assert build(Outer, {"name": "a", "inner": {"epochs": 3}}).inner == Inner(3, 0.1)
    assert build(Outer, {"name": "a", "extra": {"epochs": 3}}).extra == Inner(3, 0.5)  # the default is None: its own


@pytest.mark.parametrize("text", ["none", None])
def test_none(text):
    assert build(Outer, {"name": "none", "rate": text, "old": text, "extra": text}) == Outer("none")
    assert build(Outer, {"name": "none"}).name == "none"  # a text that may not be None


@pytest.mark.parametrize("values, message", [
    ({"name": "a", "epoch": 3}, r"unknown key config 'epoch'; allowed are: name, inner, extra"),
    ({"name": "a", "inner": {"momentum": 3}}, r"unknown key config inner\.'momentum'; allowed are: epochs, lr"),
    ({}, r"config lacks the keys name"),
    ({"name": "a", "extra": {"lr": 1}}, r"config extra lacks the keys epochs"),
    ({"name": 3}, r"config name = 3: needed is a text"),
    ({"name": "a", "rate": "high"}, r'config rate = \'high\': needed is a number or "none"'),
    ({"name": "a", "rate": True}, r"config rate = True: needed is a number"),
    ({"name": "a", "deep": 1}, r"config deep = 1: needed is true or false"),
    ({"name": "a", "inner": {"epochs": 2.5}}, r"config inner\.epochs = 2\.5: needed is a whole number"),
    ({"name": "a", "inner": 3}, r"config inner = 3"),
    ({"name": "a", "shifts": 3}, r"config shifts = 3: needed is a list"),
    ({"name": "a", "shifts": [1, "2"]}, r"config shifts\[1\] = '2': needed is a whole number"),
    ({"name": "a", "pair": [1]}, r"config pair = \[1\]: needed are 2 values"),
    ({"name": "a", "layers": 3}, r"config layers = 3: needed is a table"),
])
def test_mistakes(values, message):
    with pytest.raises(ConfigError, match=message) as caught:
        build(Outer, values, "config ")
    assert "\n" not in str(caught.value)


def test_errors_of_the_dataclass_itself_pass_through():
    with pytest.raises(ConfigError, match="schedule"):
        build(Recipe, {"epochs": 1, "lr": 0.1, "schedule": "steep"})


def test_budgets_are_numbers_or_tables():
    assert build(Budget, {"density": {"conv1": 0.5}, "bits": 4}) == Budget(density={"conv1": 0.5}, bits=4.0)
    with pytest.raises(ConfigError, match="budget density = 'half': needed is a number or a table"):
        build(Budget, {"density": "half"}, "budget ")


def test_plain_is_json():
    given = Outer("a", rate=float("nan"), layers={1: (float("inf"), Inner(1))})
    assert json.loads(json.dumps(plain(given), allow_nan=False)) == {
        "name": "a", "inner": {"epochs": 8, "lr": 0.1}, "extra": None, "rate": "nan", "old": None, "deep": False,
        "shifts": [1], "pair": [1, "a"], "layers": {"1": ["inf", {"epochs": 1, "lr": 0.5}]}}


def test_plain_and_build_are_inverse():
    for made in (Recipe(3, 0.1, schedule="step"), Outer("a", extra=Inner(2), shifts=())):
        assert build(type(made), plain(made)) == made


def test_knobs():
    assert count_knobs(Inner(1)) == 2
    assert count_knobs(Outer("a")) == 1 + 2 + 1 + 1 + 1 + 1 + 1 + 1 + 1
    assert count_knobs(Outer("a", extra=Inner(1), layers={"x": 1, "y": 2, "z": 3})) == 1 + 2 + 2 + 5 + 3
    assert count_knobs({}) == count_knobs(None) == count_knobs(0.5) == 1


def test_merge():
    base = {"a": 1, "t": {"x": 1, "y": 2}}
    assert merge(base, {"t": {"y": 3}, "b": 2}) == {"a": 1, "t": {"x": 1, "y": 3}, "b": 2}
    assert merge(base, {"t": 5, "a": {"z": 1}}) == {"a": {"z": 1}, "t": 5}
    assert base == {"a": 1, "t": {"x": 1, "y": 2}}


def test_assignments():
    assert from_assignments(["density=0.1", "bits=4", "scope=global", "retrain.epochs=3", "retrain.lr=1e-3",
                             "aware=none", "per_channel=false", "text='a = b'", "half=.5", "layers={conv1=2}"]) == {
        "density": 0.1, "bits": 4, "scope": "global", "retrain": {"epochs": 3, "lr": 0.001}, "aware": "none",
        "per_channel": False, "text": "a = b", "half": 0.5, "layers": {"conv1": 2}}
    assert from_assignments([]) == {} and from_assignments(["a=x=y"]) == {"a": "x=y"}


@pytest.mark.parametrize("pair", ["density", "=3", "", "density:0.1"])
def test_malformed_assignments(pair):
    with pytest.raises(ConfigError, match="is not KEY=VALUE"):
        from_assignments(["bits=4", pair])


@pytest.mark.parametrize("pairs, fault", [
    (["bits=4", "density=0.1", "bits=8"], "bits is given twice"), (["a.b=1", "a.b=1"], "a.b is given twice"),
    (["a={b=1}", "a.b=1"], "a.b is given twice"), (["a=1", "a.b=1"], "a.b is given twice"),
    (["a.b=1", "a=1"], "a is given twice"), (["n=" + "9" * 5000], "n = '999.*so many digits"),
    (["n=" + "[" * 50_000], r"n = '\[\[.*so deep")])
def test_assignments_that_contradict_or_overflow(pairs, fault):
    with pytest.raises(ConfigError, match=fault) as caught:
        from_assignments(pairs)
    assert len(str(caught.value)) < 200
    assert from_assignments(["a.b=1", "a.c=2"]) == {"a": {"b": 1, "c": 2}}


@pytest.mark.parametrize("values, fault", [
    ({"name": "a\ud800"}, "name = 'a.ud800': needed is a text"),
    ({"name": "a", "rate": 10**400}, "rate = a number beyond"),
    ({"name": "a", "inner": {"epochs": 10**30}}, "inner.epochs = a number beyond 2.63: needed is a whole number")])
def test_what_no_file_can_hold(values, fault):
    with pytest.raises(ConfigError, match=fault):
        build(Outer, values)


@pytest.mark.parametrize("content", [b"a = " + b"9" * 5000, b"a = " + b"[" * 50_000,
                                     b"a = ", b"a = 1\na = 2\n", b"\xff\xfe", b"[t\n"])
def test_broken_toml(tmp_path, content):
    path = tmp_path / "bröken.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="bröken.toml is not valid TOML") as caught:
        read_toml(path)
    assert "\n" not in str(caught.value)


def test_missing_toml(tmp_path):
    for path in (tmp_path / "absent.toml", tmp_path, "/dev/zero"):
        with pytest.raises(ConfigError, match="cannot read the configuration"):
            read_toml(path)


def test_a_layer_left_alone_is_spelled_none():
    budget = build(Budget, {"bits": {"conv1": 4, "fc": "none"}, "density": {"*": 0.1, "fc": "none"}})
    assert budget.bits == {"conv1": 4, "fc": None} and budget.density == {"*": 0.1, "fc": None}
    with pytest.raises(BudgetError, match="density"):
        build(Budget, {"density": {"fc": "all"}})
