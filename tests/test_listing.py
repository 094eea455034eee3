"""Commands that list: methods and their settings, what two rows differ in, completion scripts."""

import dataclasses
import json

import pytest

from benchmarks.__main__ import parser
from benchmarks.listing import completion, differences, spelled
from methods import find_method, method_names


def test_every_method_is_listed_with_its_data(run):
    code, out, _ = run("methods")
    assert code == 0 and all(name in out.replace("\n", "") for name in method_names()) and "no data" in out


def test_settings_of_a_method_with_their_defaults(run):
    code, out, _ = run("methods", "clip_q")
    assert code == 0 and "evaluations" in out and "finetune.epochs" in out
    code, _, err = run("methods", "clipq")
    assert code == 1 and "unknown method 'clipq'" in err


@pytest.mark.parametrize("name", method_names())
def test_what_is_listed_can_be_set(name):
    """Every setting that is listed is a field of the Config, or of a nested one."""
    config = find_method(name).Config
    for listed, _, _ in spelled(config):
        holder = config
        *path, last = listed.split(".")
        for part in path:
            field = next(f for f in dataclasses.fields(holder) if f.name == part)
            made = field.default if field.default is not dataclasses.MISSING else field.default_factory()
            holder = type(made)
        assert last in {field.name for field in dataclasses.fields(holder)}


def test_differences_by_dotted_keys():
    one, other = {"a": 1, "b": {"c": 2, "d": [1]}, "gone": None}, {"a": 1, "b": {"c": 3, "d": [1]}, "new": "x" * 99}
    found = dict((name, (a, b)) for name, a, b in differences(one, other))
    assert found["b.c"] == ("2", "3") and found["gone"] == ("null", "—") and set(found) == {"b.c", "gone", "new"}
    assert len(found["new"][1]) == 60
    assert differences(one, json.loads(json.dumps(one))) == []


def test_two_files_of_different_kinds_are_refused(run, tmp_path):
    code, _, err = run("diff", tmp_path / "a.json", tmp_path / "b.jc")
    assert code == 1 and "two rows (.json) or two compressed files (.jc)" in err and len(err.splitlines()) == 1


def test_completion_knows_the_commands():
    assert "reproduce" in completion(parser(), "bash") and "compdef" in completion(parser(), "zsh")


def test_unknown_data_cannot_be_fetched(run):
    code, _, err = run("fetch", "imagenet")
    assert code == 1 and "unknown data set 'imagenet'; there are: cifar10, mnist" in err
