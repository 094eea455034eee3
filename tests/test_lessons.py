"""Every lesson runs, shows what it says (each asserts it), and is listed."""

import importlib
import pkgutil

import pytest

from benchmarks import lessons

NAMES = sorted(info.name for info in pkgutil.iter_modules(lessons.__path__) if info.name != "common")


@pytest.mark.parametrize("name", NAMES)
def test_lesson(name, capsys):
    module = importlib.import_module(f"benchmarks.lessons.{name}")
    module.main()
    out = capsys.readouterr().out
    assert 2 <= len(out.splitlines()) <= 12 and "What to see" in module.__doc__


def test_all_are_listed():
    listed = [line.split()[0] for line in lessons.__doc__.splitlines() if line.startswith("    ")]
    assert sorted(listed) == NAMES
