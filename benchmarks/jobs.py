"""A job is one row: a method with a budget and a configuration, on a task and network. Running it makes the
file, reads it back, measures that, and appends the row."""

import ast
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from methods import data_of, find_method
from methods.core.artifact import CompressedModel
from methods.core.budget import Budget
from methods.core.errors import ConfigError
from methods.core.file.blocks import INDEX_BITS
from methods.core.file.storage import encode, load
from methods.core.graph.build import weight_layers
from methods.core.train.task import Task

from .baselines import Baseline, Setup, find_setup, skeleton
from .checkpoints import digest_of
from .data import Dataset, test_batches
from .measure import measure, reestimate_batchnorm, score, with_ranges
from .networks import find
from .rows import ROOT, append_row, provenance, read_rows
from .runs import DiskRun, Screen, run_key
from .settings import build, count_knobs, merge, plain, read_toml

CONFIGS = ROOT / "paper_configs"
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
    setup: Mapping[str, Any] = field(default_factory=dict)
    paper: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A paper_configs file: a method, where its numbers come from, and its rows."""

    name: str
    method: str
    title: str
    rows: tuple[Job, ...]
    compare: tuple[Job, ...]
    smoke: Mapping[str, Any]


def read_table(path: Path) -> Table:
    """A paper_configs file; ConfigError names a key or value that is not allowed."""
    content = read_toml(path)
    unknown = sorted(set(content) - {"method", "title", "row", "compare", "smoke"})
    if unknown or "method" not in content:
        fault = f"unknown key {unknown[0]!r}" if unknown else "no method"
        raise ConfigError(f"{path.name}: {fault}; allowed are: method, title, smoke, [[compare]], [[row]]")
    texts = [key for key in ("method", "title") if not isinstance(content.get(key, ""), str)]
    if texts or not isinstance(content.get("smoke", {}), Mapping):
        raise ConfigError(f"{path.name}: {(texts or ['smoke'])[0]} must be a {'text' if texts else 'table'}")
    return Table(path.stem, content["method"], content.get("title", path.stem), _jobs(path, content, "row"),
                 _jobs(path, content, "compare"), content.get("smoke", {}))


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
    """ConfigError unless `paper` holds numbers, in tables of any depth."""
    for key, value in paper.items():
        if key == "layers" and not (isinstance(value, Mapping) and all(isinstance(v, Mapping) for v in value.values())):
            raise ConfigError(f"{where}: layers = {value!r}: needed is {{layer: {{metric: number}}}}")
        if isinstance(value, Mapping):
            check_printed(value, f"{where}, {key}")
        elif isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ConfigError(f"{where}, {key} = {value!r}: a number is needed")


def all_tables() -> list[Table]:
    """Every method's paper_configs file."""
    return [read_table(path) for path in sorted(CONFIGS.glob("*.toml")) if path.name != "baselines.toml"]


def prepare(job: Job) -> tuple[Any, Budget, Any]:
    """The method's module, its budget and its config; ConfigError or BudgetError if the job is not well-formed."""
    for width in job.index_bits.values() if isinstance(job.index_bits, Mapping) else [job.index_bits]:
        automatic = width == "auto" and not isinstance(job.index_bits, Mapping)
        if not automatic and (type(width) is not int or width not in INDEX_BITS):
            raise ConfigError(f"index_bits = {width!r}: allowed is {INDEX_BITS[0]}..{INDEX_BITS[-1]}, or 'auto'")
    if job.bn_reestimation < 0 or not 0 <= job.seed < 2**63:
        raise ConfigError(f"{job.name!r}: bn_reestimation = {job.bn_reestimation}, seed = {job.seed}: both are whole "
                          "numbers from 0, a seed below 2^63")
    if not slug(job.name) or len(file_name(job)) > LONGEST_NAME:
        raise ConfigError(f"name = {job.name!r}: it needs a letter or digit, and at most {LONGEST_NAME} of them")
    if job.network:  # `compress` finds it later, from the data
        find(job.network)
    method = find_method(job.method)
    return method, build(Budget, job.budget, "budget "), build(method.Config, job.config, "config ")


def task_for(method: Any, config: Any, setup: Setup, dataset: Dataset, network: str, device: torch.device
             ) -> Task | None:
    """What the method is allowed to see: by its DATA, or as its configuration needs."""
    views = {"train": lambda task: task, "none": lambda task: None,
             "calibration": lambda task: replace(task, train=None)}
    data = data_of(method, config)
    if data not in views:
        raise ConfigError(f"{method.__name__}.DATA = {data!r}: allowed are {', '.join(views)}")
    return views[data](setup.task(dataset, network, device))


@dataclass(frozen=True)
class Place:
    """Where jobs run and where their results go."""

    results: Path
    states: Path
    device: torch.device
    screen: Screen
    resume: bool = False
    scores: dict[tuple, dict[str, float]] = field(default_factory=dict)  # of networks measured before: see `measure`


def run_job(job: Job, dataset: Dataset, baseline: Baseline, baseline_top1: float, place: Place, rows_file: str) -> dict:
    """Compress, encode, decode, measure, append; returns the row.

    Where `place.resume` is set and the rows file has the row of this very job already, that row is returned.
    """
    method, budget, config = prepare(job)
    network = skeleton(dataset, job.network)
    check_layers(job, list(weight_layers(network)))
    setup = find_setup(dataset.name, job.network)
    setup = build(Setup, merge(plain(setup), job.setup), "setup ")
    task = task_for(method, config, setup, dataset, job.network, place.device)
    batches = {key: value for key, value in plain(setup).items() if key != "recipe"}  # that one is the baseline's
    facts = {"job": plain(replace(job, paper={}, note="")), "setup": batches, "checkpoint": baseline.digest,
             "data": dataset.digest}
    rows_path = place.results / "rows" / f"{rows_file}.jsonl"
    done = finished(rows_path, run_key(facts)) if place.resume else None
    if done is not None and is_of(place.results / "models" / done["file"], done):
        place.screen.say(f"{job.name}: its row is in {rows_path} already, from commit {done.get('commit')}")
        return {**done, "paper": plain(job.paper), "note": job.note}
    run = DiskRun(place.states / run_key(facts), job.name, place.screen, resume=place.resume)
    generator = torch.Generator().manual_seed(job.seed)
    compressed = method.compress(baseline.model, task, budget, config, generator, run=run)
    seconds = run.clock.seconds()
    path = place.results / "models" / rows_file / f"{file_name(job)}.jc"
    scores = place.scores.setdefault((dataset.digest, job.network), {})
    row = store_and_measure(compressed, path, job, network, dataset, setup, scores)
    row |= {"name": job.name, "method": job.method, "task": job.task, "network": job.network, "seed": job.seed,
            "budget": plain(budget), "config": plain(config), "setup": batches, "note": job.note,
            "paper": plain(job.paper), "notes": plain(compressed.notes), "baseline_top1": baseline_top1,
            "difficulty": {"data": data_of(method, config), "knobs": count_knobs(config) + knobs_of(budget),
                           "lines": module_lines(method), "seconds": seconds},
            "checkpoint": {"digest": baseline.digest, "source": baseline.source}, "data": dataset.digest,
            "job": run_key(facts), "device": place.device.type, **provenance()}
    append_row(rows_path, row)
    run.forget()
    return row


def check_layers(job: Job, layers: list[str]) -> None:
    """ConfigError where the job names a layer that its network lacks, or leaves one out that needs an index width."""
    unknown = sorted(set(job.float_policy) - set(layers))
    if unknown:
        raise ConfigError(f"float_policy names {unknown[0]!r}; {job.network} has: {', '.join(layers)}")
    if isinstance(job.index_bits, Mapping) and set(job.index_bits) != set(layers):
        raise ConfigError(f"index_bits names {', '.join(job.index_bits)}; {job.network} has: {', '.join(layers)}")


def is_of(path: Path, row: Mapping[str, Any]) -> bool:
    """Whether the file at `path` is the one that `row` was measured from."""
    return path.is_file() and digest_of(path) == row["file_digest"]


def finished(rows_path: Path, key: str) -> dict | None:
    """The last row of the job with this key in a rows file, if there is one."""
    rows = read_rows(rows_path) if rows_path.exists() else []
    return next((row for row in reversed(rows) if row.get("job") == key), None)


def store_and_measure(compressed: CompressedModel, path: Path, job: Job, network: nn.Module, dataset: Dataset,
                      setup: Setup, scores: dict[str, float]) -> dict:
    """Write the file (with the harness's activation ranges where the method has none), then measure the file."""
    scaling = find(job.network).scaling
    calibration = setup.task(dataset, job.network, torch.device("cpu"))
    path.parent.mkdir(parents=True, exist_ok=True)
    encode(with_ranges(compressed, network, calibration), path, mode="best")
    height, width, channels = dataset.image_shape
    test = test_batches(dataset, batch_size=250, device=torch.device("cpu"), scaling=scaling)
    row = measure(path, network, test.epoch(None), (channels, height, width), index_bits=job.index_bits,
                  float_policy=job.float_policy, scores=scores)
    if job.bn_reestimation:
        inputs = calibration.training_inputs(job.bn_reestimation, torch.Generator().manual_seed(job.seed))
        model = reestimate_batchnorm(load(path, network), inputs)
        row |= {"bn_reestimation": job.bn_reestimation,
                "top1_float_bn_reestimated": score([model], test.epoch(None))[0]}
    return {**row, "file": f"{path.parent.name}/{path.name}", "file_digest": digest_of(path)}


def knobs_of(budget: Budget) -> int:
    """Budget fields that are set; a {layer: value} counts each layer."""
    return sum(count_knobs(value) for value in vars(budget).values() if value is not None)


def module_lines(method: Any) -> int:
    """Lines of code that only this method uses: of its module, or of all in its package."""
    path = Path(method.__file__)
    return sum(lines_of_code(file.read_text()) for file in
               (sorted(path.parent.glob("*.py")) if path.name == "__init__.py" else [path]))


def lines_of_code(source: str) -> int:
    """Lines of a Python source that are neither blank, nor comment, nor docstring."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docs = [node.body[0] for node in ast.walk(ast.parse(source)) if isinstance(node, documented)
            and ast.get_docstring(node) is not None]
    inside = {line for doc in docs for line in range(doc.lineno, doc.end_lineno + 1)}
    return sum(1 for number, line in enumerate(source.splitlines(), 1)
               if number not in inside and line.strip() and not line.strip().startswith("#"))


def file_name(job: Job) -> str:
    """Of the compressed file, without suffix: row, network, and a seed other than 0."""
    return "-".join([slug(job.name), slug(job.network), *([f"seed{job.seed}"] if job.seed else [])])


def slug(name: str) -> str:
    """`name` in lower case, its words of letters and digits joined by dashes."""
    return "-".join("".join(letter if letter.isalnum() else " " for letter in name.lower()).split())
