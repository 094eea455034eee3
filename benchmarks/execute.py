"""Running a job: the method, the file, and everything a row says about that very file."""

import ast
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from methods import compress_to_size, data_of
from methods.core.artifact import CompressedModel
from methods.core.budget import Budget
from methods.core.errors import ConfigError
from methods.core.file.storage import encode, inspect, load, to_bytes
from methods.core.fit.prune import global_densities
from methods.core.fit.sixteen_bit import sixteen_bit
from methods.core.graph.build import weight_layers
from methods.core.graph.shrink import shrink
from methods.core.train.task import Task

from . import made
from .baselines import Baseline, Setup, find_setup, skeleton
from .chance import paired, standard_error, unpack
from .checkpoints import digest_of
from .data import Dataset, test_batches
from .jobs import Job, prepare
from .locks import locked
from .measure import measure, reestimate_batchnorm, right_of, top1_of, with_ranges
from .networks import find, label, source_digest
from .provenance import joined, origin, surroundings
from .rows import SCHEMA, Row, finished, stem, write_row
from .runs import DiskRun, Screen, run_key, state_name
from .settings import build, count_knobs, merge, plain, same_settings


@dataclass(frozen=True)
class Place:
    """Where jobs run and where their results go.

    scores   {digest of decoded tensors: which test inputs are right}, of networks measured before
    measure  False: files are made, and measured by a later run that resumes
    """

    results: Path
    device: torch.device
    screen: Screen
    resume: bool = False
    scores: dict[tuple, dict[str, Tensor]] = field(default_factory=dict)
    measure: bool = True

    @property
    def states(self) -> Path:
        return self.results / "runs"


@dataclass(frozen=True)
class Start:
    """The network a job starts from, which test inputs it has right (bool [n]), and its held-out top-1."""

    baseline: Baseline
    right: Tensor
    held_out_top1: float

    @property
    def top1(self) -> float:
        return top1_of(self.right)


def run_job(job: Job, dataset: Dataset, start: Start, place: Place, table: str, order: int = 0) -> Row | None:
    """Compress, encode, decode, measure, write the row and return it; None where `place.measure` leaves it out.

    Where `place.resume` is set and the row of this very job is there already with its file, that row is returned; and
    so it is where another process was at work on this job, and has finished it. A file that waits is measured, and what
    was cut off goes on. A row or a state of other settings, from before a default changed, is none of this job.
    """
    method, _, config = prepare(job)
    network = skeleton(dataset, job.network)
    check_layers(job, list(weight_layers(network)))
    setup = setup_of(job, dataset)
    key, folder = job_key(job, dataset, setup, start.baseline), place.results / "rows" / table

    def waiting() -> None:
        place.screen.say(f"{job.name}: another process is at work on it: waiting for its row")

    with locked(place.states / f"{key}.lock", waiting) as waited:
        resume = place.resume or waited
        run = DiskRun(place.states / state_name(key, config), job.name, place.screen, resume=resume)
        done = None if run.folder.exists() else finished(folder, name_of(job, start.baseline), key)
        if (done is not None and resume and same_settings(config, done["config"])
                and is_of(place.results / "models" / done["file"], done)):
            place.screen.say(f"{job.name}: its row is in {folder} already, from commit {done.get('commit')}")
            return done.changed(paper=plain(job.paper), note=job.note, order=order)
        found = made.find(run.folder)
        if found is None:
            found = make(job, network, dataset, setup, start.baseline, place, run)
        if not place.measure:
            place.screen.say(f"{job.name}: its file is made; the same command with --resume measures it")
            return None
        given = {**found.facts, **described(job, setup, dataset, start.baseline), "table": table, "order": order,
                 "job": key, "difficulty": {**found.facts["difficulty"], "lines": module_lines(method)}}
        row = store(found, given, job, network, dataset, setup, start, place)
        run.forget()
        return row


def name_of(job: Job, baseline: Baseline) -> str:
    """Of the files of its row."""
    return stem(job.name, label(job.network), job.seed, baseline.digest)


def make(job: Job, network: nn.Module, dataset: Dataset, setup: Setup, baseline: Baseline, place: Place, run: DiskRun
         ) -> made.Made:
    """The file of a job, in the folder of its run, with what its row says of how it was made."""
    method, budget, config = prepare(job)
    calibration = setup.task(dataset, job.network, torch.device("cpu"))
    spread = spread_of(job, baseline.model)
    asked = budget if spread is None or budget.density is None else replace(budget, density=spread(budget.density))
    task = task_for(method, config, setup, dataset, job.network, place.device)
    compressed = compress_to_size(method, baseline.model, task, asked, config, torch.Generator().manual_seed(job.seed),
                                  run=run, spread=spread,
                                  finish=lambda found: as_stored(found, job, network, calibration))
    cpu, wall = run.clock.seconds()
    small = as_stored(compressed, job, network, calibration)
    run.folder.mkdir(parents=True, exist_ok=True)
    path = run.folder / made.FILE
    encode(small, path, mode="best")
    inspect(path)  # raises where it is damaged: it does not count as made
    whole = replace(sixteen_bit(compressed) if job.sixteen_bit else compressed, activations=small.activations,
                    ranges_by=small.ranges_by)
    facts = {"budget": plain(budget), "config": plain(config), "notes": plain(compressed.notes),
             "device": place.device.type, "precision": "float32" if task is None else task.precision_name,
             "bytes_unshrunk": len(to_bytes(whole)[0]) if job.shrink else path.stat().st_size,
             "difficulty": {"data": data_of(method, config), "knobs": count_knobs(config) + knobs_of(budget),
                            "cpu_seconds": cpu, "wall_seconds": wall}}
    return made.keep(run.folder, facts, run.origins, surroundings())


def setup_of(job: Job, dataset: Dataset) -> Setup:
    """The baseline's setup with the job's changes."""
    setup = find_setup(dataset.name, job.network)
    return build(Setup, merge(plain(setup), job.setup), "setup ")


def job_key(job: Job, dataset: Dataset, setup: Setup, baseline: Baseline) -> str:
    """Of all that determines the file: not what is printed beside it."""
    own = source_digest(job.network)
    given = plain(replace(job, paper={}, note="", network=label(job.network)))
    if job.densities == "uniform":  # keys are older than this setting
        del given["densities"]
    return run_key({"job": given,
                    **({} if own is None else {"network_source": own}), "setup": _batches(setup),
                    "checkpoint": baseline.digest, "data": dataset.digest})


def _batches(setup: Setup) -> dict[str, Any]:
    return {key: value for key, value in plain(setup).items() if key != "recipe"}  # that one is the baseline's


def described(job: Job, setup: Setup, dataset: Dataset, baseline: Baseline) -> dict[str, Any]:
    """What went in, as a row says it."""
    return {"schema": SCHEMA, "name": job.name, "method": job.method, "task": job.task, "network": label(job.network),
            "float_policy": list(job.float_policy), "densities": job.densities,
            "seed": job.seed, "setup": _batches(setup), "note": job.note, "paper": plain(job.paper),
            "data": dataset.digest, "checkpoint": baseline.described()}


def store(found: made.Made, given: Mapping[str, Any], job: Job, network: nn.Module, dataset: Dataset, setup: Setup,
          start: Start, place: Place) -> Row:
    """Measure a file that is made, and only then give file and row their names, together."""
    name = name_of(job, start.baseline)
    path = place.results / "models" / given["table"] / f"{name}.jc"
    path.parent.mkdir(parents=True, exist_ok=True)
    place.screen.say(f"{job.name}: measuring its file on {len(dataset.test):,} test inputs")
    scores = place.scores.setdefault((dataset.digest, job.network), {})
    here = surroundings()
    elsewhere = {} if found.surroundings == here else {"made_with": found.surroundings}
    row = Row({**measured(found.path, job, network, dataset, setup, start, scores), **given,
               "file": f"{path.parent.name}/{path.name}", **joined([*found.origins, origin()]), **here, **elsewhere})
    with locked(place.states / f"{given['table']}-{name}.lock"):
        os.replace(found.path, path)
        write_row(place.results / "rows" / given["table"], row)
    return row


def as_stored(compressed: CompressedModel, job: Job, network: nn.Module, calibration: Task) -> CompressedModel:
    """What the file holds of a result: without dead units or in 16 bits as the job says, with ranges."""
    small = shrink(compressed, network) if job.shrink else compressed
    return with_ranges(sixteen_bit(small) if job.sixteen_bit else small, network, calibration)


def measured(path: Path, job: Job, network: nn.Module, dataset: Dataset, setup: Setup, start: Start,
             scores: dict[str, Tensor]) -> dict:
    """What the file at `path` says and scores."""
    scaling = find(job.network).scaling
    calibration = setup.task(dataset, job.network, torch.device("cpu"))
    height, width, channels = dataset.image_shape
    test = test_batches(dataset, batch_size=250, device=torch.device("cpu"), scaling=scaling)
    row = measure(path, network, test.epoch(None), (channels, height, width), index_bits=job.index_bits,
                  float_policy=job.float_policy, scores=scores, held_out=calibration.held_out.epoch(None))
    if job.bn_reestimation:
        inputs = calibration.training_inputs(job.bn_reestimation, torch.Generator().manual_seed(job.seed))
        model = reestimate_batchnorm(load(path, network), inputs)
        row |= {"bn_reestimation": job.bn_reestimation,
                "top1_float_bn_reestimated": top1_of(right_of([model], test.epoch(None))[0])}
    return {**row, **beside(start, row["right"]), "file_digest": digest_of(path), "shrink": job.shrink,
            "sixteen_bit": job.sixteen_bit}


def beside(start: Start, right: Mapping[str, str]) -> dict[str, Any]:
    """What chance and the baseline say of the packed answers {arithmetic: text}."""
    n = len(start.right)
    answers = {kind: unpack(text, n) for kind, text in right.items()}
    return {"baseline_top1": start.top1, "baseline_held_out_top1": start.held_out_top1, "n_test": n,
            "standard_error": {kind: standard_error(top1_of(found), n) for kind, found in answers.items()},
            "against_baseline": {kind: asdict(paired(start.right, found)) for kind, found in answers.items()}}


def spread_of(job: Job, model: nn.Module) -> Callable[[float], dict[str, float]] | None:
    """From the density of all weights to those of the layers, or None where all are the same."""
    if job.densities == "uniform":
        return None
    weights = {name: layer.weight for name, layer in weight_layers(model).items()}
    return lambda density: global_densities(weights, density)


def task_for(method: Any, config: Any, setup: Setup, dataset: Dataset, network: str, device: torch.device
             ) -> Task | None:
    """What the method is allowed to see: by its DATA, or as its configuration needs."""
    try:
        return setup.task(dataset, network, device).seen_as(data_of(method, config))
    except ConfigError as error:
        raise ConfigError(f"{method.__name__}: {error}") from None


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
