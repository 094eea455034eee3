"""The wheel: built and installed without a network, it holds the methods, their types and a console script."""

import shutil
import subprocess
import sys
import tomllib
import types
import venv
import zipfile
from configparser import ConfigParser
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import methods
from methods import _command as command
from methods import find_method, method_names
from methods.core.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent


def run(*words, cwd=None):
    return subprocess.run([str(word) for word in words], cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """(names in the wheel, python, console script) of a fresh environment that borrows only this one's packages."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a build leaves folders behind, and old ones get into a wheel
    shutil.copytree(ROOT / "methods", source / "methods", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    built = run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir",
                folder, source)
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("jointcompress-*.whl")
    home = folder / "environment"
    venv.create(home, with_pip=False)
    site = next((home / "lib").glob("python*")) / "site-packages"
    done = run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", site, wheel)
    assert done.returncode == 0, done.stderr
    (site / "borrowed.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    return zipfile.ZipFile(wheel).namelist(), home / "bin" / "python", site / "bin" / "jointcompress"


def test_what_the_wheel_holds(installed):
    names, _, script = installed
    assert {"jointcompress/methods/py.typed", "jointcompress/methods/engine/opened.py"} <= set(names)
    assert {name.split("/")[0] for name in names} == {"jointcompress", f"jointcompress-{methods.__version__}.dist-info"}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "methods").rglob("*.py")}
    assert modules == {name.removeprefix("jointcompress/") for name in names if name.endswith(".py")}
    assert script.is_file()


def test_the_installed_package_runs(installed, tmp_path):
    _, python, _ = installed
    code = ("import jointcompress.methods as m; from jointcompress.methods._command import main; "
            "print(m.__file__, m.__version__); main(['methods'])")
    done = run(python, "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, *names = done.stdout.splitlines()
    assert str(installed[1].parent.parent) in first and methods.__version__ in first and "deep_compression" in names


def test_the_console_script(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        command.main(["--version"])
    assert caught.value.code == 0 and methods.__version__ in capsys.readouterr().out
    (tmp_path / "a.jc").write_bytes(b"x")
    assert command.main(["inspect", str(tmp_path / "a.jc")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    some = next((ROOT / "results" / "models").rglob("*.jc"))
    assert command.main(["decode", str(some), str(tmp_path / "a.safetensors")]) == 0
    assert (tmp_path / "a.safetensors").stat().st_size > 1000


def test_every_range_has_an_upper_bound_and_its_pin():
    """Of what setup.cfg admits, constraints.txt names one version: what the tests ran with."""
    found = ConfigParser()
    found.read(ROOT / "setup.cfg")
    wanted = found["options"]["install_requires"] + "".join(found["options.extras_require"].values())
    ranges = [line for line in wanted.split("\n") if line.strip() and not line.startswith("jointcompress[")]
    pins = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1] != "#"}
    for line in ranges:
        name = line.split(">=")[0]
        assert "<" in line and name in pins, line
    assert "constraints.txt" in (ROOT / "Makefile").read_text()
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["build-backend"]


# --- methods of other distributions ------------------------------------------------------------------------


@pytest.fixture
def theirs(monkeypatch):
    """A distribution that brings `theirs` (whole), `broken` (not importable) and `partial` (without compress)."""
    module = types.ModuleType("their_module")
    module.DATA, module.Config, module.compress = "none", object, lambda *given, **more: None
    partial = types.ModuleType("their_partial")
    partial.DATA = "none"
    monkeypatch.setitem(sys.modules, "their_module", module)
    monkeypatch.setitem(sys.modules, "their_partial", partial)
    points = [EntryPoint(name, value, methods.GROUP) for name, value in (
        ("theirs", "their_module"), ("broken", "no.such.module"), ("partial", "their_partial"),
        ("dfq", "their_module"))]
    monkeypatch.setattr(methods.importlib.metadata, "entry_points",
                        lambda group: points if group == methods.GROUP else [])
    return module


def test_methods_come_by_entry_points(theirs):
    assert {"theirs", "dfq", "deep_compression"} <= set(method_names()) and len(method_names()) == len(
        set(method_names()))
    assert find_method("theirs") is theirs and find_method("dfq").__name__ == "methods.dfq"
    with pytest.raises(ConfigError, match="method 'broken' .no.such.module. cannot be imported: No module named"):
        find_method("broken")
    with pytest.raises(ConfigError, match="method 'partial' .their_partial. lacks Config, compress"):
        find_method("partial")
    with pytest.raises(ConfigError, match="unknown method 'none'; there are: .*theirs"):
        find_method("none")


def test_pins_lie_in_the_ranges_of_the_library():
    """What `make` installs has to be installable: pip refuses a pin outside a range only in a new environment."""
    root = Path(__file__).parent.parent
    config = ConfigParser()
    config.read(root / "setup.cfg", encoding="utf-8")
    groups = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    wanted = [Requirement(line) for group in groups for line in group.splitlines() if line and "[" not in line]
    lines = (root / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    pinned = {pin.name: next(iter(pin.specifier)).version.replace(".*", ".0") for pin in pins}
    unpinned = [one.name for one in wanted if one.name not in pinned]
    outside = [str(one) for one in wanted if not one.specifier.contains(pinned[one.name], prereleases=True)]
    assert unpinned == [] and outside == []
