"""A job is one row: a method with a budget and a configuration, on a task and network; where jobs are written down."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from methods import find_method
from methods.core.budget import Budget
from methods.core.errors import ConfigError
from methods.core.file.layouts import INDEX_BITS

from .metrics import OF_A_LAYER, OF_A_ROW, number_of, unknown_metric
from .networks import find
from .rows import LARGEST, ROOT, shortened, slug, stem
from .settings import build, read_toml

CONFIGS = ROOT / "paper_configs"
NO_TABLES = ("baselines.toml", "claims.toml")
DENSITIES = ("uniform", "global")
LONGEST_NAME = 200  # of a file, without suffix


@dataclass(frozen=True)
class Job:
    """One row of a paper_configs file.

    name          of the row; method, budget, config: what is called
    task, network where it runs;  seed of the method's generator
    index_bits    relative-index width of paper mode and of the papers' accountings: one, {layer: width}, or "auto"
    float_policy  layers that the integer kernels leave in float (a paper's policy)
    bn_reestimation  training inputs, augmented as in training, for an extra, labelled score after re-estimating batch
                  norm (0: none)
    shrink        dead units are removed before the file is written (the row also has the bytes without that)
    sixteen_bit   what stays float, scales and shared values are rounded to 16 bits before the file is written
    densities     of layers, where the budget's density is one number: "uniform", or "global": the shares that one
                  ranking of |w| over all layers keeps
    setup         overrides of the baseline's batches ({batch_size, augment})
    paper         the printed numbers of this row, and [{layer, ...}] per layer
    """

    name: str
    method: str
    task: str
    network: str
    budget: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    index_bits: int | str | Mapping[str, int] = 5
    float_policy: tuple[str, ...] = ()
    bn_reestimation: int = 0
    shrink: bool = True
    sixteen_bit: bool = False
    densities: str = "uniform"
    setup: Mapping[str, Any] = field(default_factory=dict)
    paper: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A paper_configs file: a method, where its numbers come from, and its rows.

    others  names of rows whose printed numbers are another method's (what the paper compares itself with): reports show
            them and do not count them for the method
    first   names of rows that stand for the paper on the front page, beside what it prints for them
    """

    name: str
    method: str
    title: str
    rows: tuple[Job, ...]
    compare: tuple[Job, ...]
    smoke: Mapping[str, Any]
    path: Path
    others: tuple[str, ...] = ()
    first: tuple[str, ...] = ()


def read_table(path: Path) -> Table:
    """A paper_configs file; ConfigError names a key or value that is not allowed."""
    content = read_toml(path)
    unknown = sorted(set(content) - {"method", "title", "others", "first", "row", "compare", "smoke"})
    if unknown or "method" not in content:
        fault = f"unknown key {unknown[0]!r}" if unknown else "no method"
        raise ConfigError(f"{path.name}: {fault}; allowed are: method, title, others, first, smoke, [[compare]], "
                          "[[row]]")
    texts = [key for key in ("method", "title") if not isinstance(content.get(key, ""), str)]
    if texts or not isinstance(content.get("smoke", {}), Mapping):
        raise ConfigError(f"{path.name}: {(texts or ['smoke'])[0]} must be a {'text' if texts else 'table'}")
    rows = _jobs(path, content, "row")
    return Table(path.stem, content["method"], content.get("title", path.stem), rows,
                 _jobs(path, content, "compare"), content.get("smoke", {}), path,
                 *(_names(path, content, key, rows) for key in ("others", "first")))


def _names(path: Path, content: Mapping[str, Any], key: str, rows: Sequence[Job]) -> tuple[str, ...]:
    """The names of rows that `key` lists."""
    names = content.get(key, [])
    strange = [name for name in names if name not in [job.name for job in rows]] if isinstance(names, list) else []
    if not isinstance(names, list) or strange:
        raise ConfigError(f"{path.name}: {key} = {shortened(names)}: needed are names of its rows"
                          + (f", and {strange[0]!r} is none" if strange else ""))
    return tuple(names)


def _jobs(path: Path, content: Mapping[str, Any], key: str) -> tuple[Job, ...]:
    entries = content.get(key, [])
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise ConfigError(f"{path.name}: {key} must be tables under [[{key}]]")
    jobs = tuple(build(Job, {"method": content["method"], **entry}, f"{path.name} {key} {i}: ")
                 for i, entry in enumerate(entries, 1))
    names = [(job.network if key == "row" else job.task, slug(job.name)) for job in jobs]  # of files, too
    twice = [job.name for job, name in zip(jobs, names, strict=True) if names.count(name) > 1 or not name[1]]
    for job in jobs:
        check_printed(job.paper, f"{path.name}: paper of {job.name!r}")
    if twice:
        raise ConfigError(f"{path.name}: the names under [[{key}]] must differ in letters or digits, "
                          f"but there is {twice[0]!r}")
    return jobs


def check_printed(paper: Mapping[str, Any], where: str) -> None:
    """ConfigError unless `paper` holds known metrics, each a number, the text of one that is printed with a last 0
    ("0.060"), or [number, deviation], in tables of any depth."""
    layers = paper.get("layers", {})
    if not (isinstance(layers, Mapping) and all(isinstance(value, Mapping) for value in layers.values())):
        raise ConfigError(f"{where}: layers = {shortened(layers)}: needed is {{layer: {{metric: number}}}}")
    _check_numbers({key: value for key, value in paper.items() if key != "layers"}, where, "", OF_A_ROW)
    for layer, numbers in layers.items():
        _check_numbers(numbers, f"{where}, layer {layer}", "", OF_A_LAYER)


def _check_numbers(table: Mapping[str, Any], where: str, path: str, known: tuple[str, ...]) -> None:
    for key, value in table.items():
        if isinstance(value, Mapping):
            _check_numbers(value, where, f"{path}{key}.", known)
            continue
        numbers = value if isinstance(value, list) and len(value) == 2 else [number_of(value)]
        if not all(isinstance(n, (int, float)) and not isinstance(n, bool) and abs(n) < LARGEST for n in numbers):
            raise ConfigError(f"{where}, {path}{key} = {shortened(value)}: a number is needed, or [number, deviation]")
        fault = unknown_metric(f"{path}{key}", known)
        if fault is not None:
            raise ConfigError(f"{where}: {fault}")


def all_tables() -> list[Table]:
    """Every method's paper_configs file."""
    return [read_table(path) for path in sorted(CONFIGS.glob("*.toml")) if path.name not in NO_TABLES]


def prepare(job: Job) -> tuple[Any, Budget, Any]:
    """The method's module, its budget and its config; ConfigError or BudgetError if the job is not well-formed."""
    for width in job.index_bits.values() if isinstance(job.index_bits, Mapping) else [job.index_bits]:
        automatic = width == "auto" and not isinstance(job.index_bits, Mapping)
        if not automatic and (type(width) is not int or width not in INDEX_BITS):
            raise ConfigError(f"index_bits = {width!r}: allowed is {INDEX_BITS[0]}..{INDEX_BITS[-1]}, or 'auto'")
    if job.bn_reestimation < 0 or not 0 <= job.seed < 2**63:
        raise ConfigError(f"{job.name!r}: bn_reestimation = {job.bn_reestimation}, seed = {job.seed}: both are whole "
                          "numbers from 0, a seed below 2^63")
    if job.densities not in DENSITIES:
        raise ConfigError(f"{job.name!r}: densities = {job.densities!r}: allowed are {', '.join(DENSITIES)}")
    if not job.name.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in job.name):
        raise ConfigError(f"name = {job.name!r}: needed is a text of whole letters")
    if not slug(job.name) or len(file_name(job)) > LONGEST_NAME:
        raise ConfigError(f"name = {job.name!r}: it needs a letter or digit, and at most {LONGEST_NAME} of them")
    if job.network:  # `compress` finds it later, from the data
        find(job.network)
    method = find_method(job.method)
    return method, build(Budget, job.budget, "budget "), build(method.Config, job.config, "config ")


def file_name(job: Job) -> str:
    """Of the files of a row, but for the checkpoint it starts from (see `rows.stem`)."""
    return stem(job.name, job.network, job.seed, "")
