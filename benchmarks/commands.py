"""What the commands of the harness do; the command line itself is in `__main__`."""

import dataclasses
import functools
import os
import re
import shlex
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from methods.core.errors import CompressError, ConfigError
from methods.core.file import container

from .baselines import (
    Baseline,
    find_setup,
    load_baseline,
    shipped_path,
    shorter,
    test_top1,
    train_baseline,
)
from .checkpoints import read_provenance
from .data import Dataset, open_dataset
from .jobs import Job, Place, all_tables, file_name, prepare, read_table, run_job, slug
from .networks import network_names
from .report import against_paper, plots, readme, scores, table
from .report.page import page, searches
from .rows import RESULTS, ROOT, read_rows
from .runs import DiskRun, Screen, run_key
from .settings import from_assignments, plain

NETWORK_OF = {"digits": "resnet18w16", "mnist": "lenet5_caffe", "cifar10": "resnet18"}  # what compare runs by default
PLACES = ("--data-dir", "--results")


def place_of(options: Namespace, screen: Screen) -> Place:
    device = _device(options.device)
    options.results.mkdir(parents=True, exist_ok=True)
    if not os.access(options.results, os.W_OK):
        raise ConfigError(f"--results {options.results}: this folder cannot be written")
    return Place(options.results, options.results / "runs", device, screen, options.resume)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        if device.type in ("cpu", "cuda"):
            torch.zeros((), device=device)
            return device
    except (RuntimeError, AssertionError):  # no such name; no such device; not compiled with CUDA
        pass
    raise ConfigError(f"--device {name}: there is no such device here; allowed are cpu and, with a GPU build of "
                      "torch and a GPU, cuda")


def get_baseline(dataset: Dataset, network: str, options: Namespace, place: Place) -> Baseline:
    """--checkpoint if given, else (without --epochs) the checkpoint the project ships, else one trained now.

    What was trained by an earlier command from the same recipe, data and seed is taken instead of training again.
    """
    if options.checkpoint is not None:
        if options.epochs is not None:
            raise ConfigError(f"--epochs {options.epochs} trains a baseline, --checkpoint gives one: choose")
        return load_baseline(dataset, network, options.checkpoint)
    shipped = shipped_path(dataset.name, network)
    if shipped.exists() and options.epochs is None:
        if read_provenance(shipped).get("data") == dataset.digest:
            return load_baseline(dataset, network, shipped)
        place.screen.say(f"baseline: {shipped.name} has seen other pictures than these splits hold: training one")
    return trained(dataset, network, options, place)


def trained(dataset: Dataset, network: str, options: Namespace, place: Place, out: Path | None = None) -> Baseline:
    """A baseline trained in this run, by paper_configs/baselines.toml; without `out`, kept for later commands."""
    setup = shorter(find_setup(dataset.name, network), options.epochs)
    seed = 0 if options.seed is None else options.seed
    facts = {"setup": plain(setup), "data": dataset.digest, "network": network, "seed": seed}
    key = run_key(facts)
    if out is None:
        out = place.states / "baselines" / f"{slug(dataset.name)}_{network}_{key}.safetensors"
        if out.exists():
            place.screen.say(f"baseline: {out}, trained by an earlier command")
            return load_baseline(dataset, network, out)
    run = DiskRun(place.states / key, f"train {network}", place.screen, resume=place.resume)
    baseline = train_baseline(dataset, network, setup, seed, place.device, out, run)
    run.forget()
    return baseline


def train(options: Namespace, console: Console) -> None:
    dataset = open_dataset(options.task, options.data_dir)
    if options.checkpoint is not None:
        raise ConfigError(f"--checkpoint {options.checkpoint}: train starts from nothing; leave it out")
    shipped = options.results / "baselines" / shipped_path(dataset.name, options.network).name
    if options.out is None and shipped.exists():
        raise ConfigError(f"{shipped} is there already, and rows start from it: to replace it, give it as --out")
    out = options.out if options.out is not None else shipped
    if out.suffix != ".safetensors":
        raise ConfigError(f"--out {out}: written are only .safetensors")
    out.parent.mkdir(parents=True, exist_ok=True)  # a mistake should show before hours of training
    with Screen() as screen:
        baseline = trained(dataset, options.network, options, place_of(options, screen), out)
    facts = baseline.provenance
    console.print(f"{out}: held-out {facts['held_out_top1']:.2f} %, test {facts['test_top1']:.2f} %, "
                  f"digest {baseline.digest}", soft_wrap=True)


def compare(options: Namespace, console: Console) -> None:
    dataset = open_dataset(options.task, options.data_dir)
    network = network_for(dataset, options)
    jobs = comparison(options, dataset.name, network)
    for job in jobs:
        prepare(job)  # a mistake in the last job should not wait for the first
    with Screen() as screen:
        place = place_of(options, screen)
        baseline = get_baseline(dataset, network, options, place)
        top = test_top1(baseline.model, dataset, network, place.device)
        rows = [run_job(job, dataset, baseline, top, place, f"compare_{slug(dataset.name)}") for job in jobs]
    title = f"{network} on {dataset.name}: float32 baseline {top:.2f} %"
    console.print(table.terminal(table.listed(rows), title, console.width))
    name = f"compare_{slug(dataset.name)}"
    rows = table.latest(read_rows(place.results / "rows" / f"{name}.jsonl"))  # of earlier commands, too
    console.print(f"report: {write_reports(rows, name, title_of(rows), options)}", soft_wrap=True)


def network_for(dataset: Dataset, options: Namespace) -> str:
    """--network, else the usual one of the task."""
    if options.network is None and dataset.name not in NETWORK_OF:
        raise ConfigError(f"--network is needed for the task {options.task!r}; there are: {', '.join(network_names())}")
    return options.network if options.network is not None else NETWORK_OF[dataset.name]


def comparison(options: Namespace, task: str, network: str) -> list[Job]:
    """The [[compare]] entries of all methods for a task, seeds and network as asked for."""
    known = list(dict.fromkeys(entry.method for entry in all_tables()))
    unknown = [name for name in options.methods if name not in known]
    if unknown:
        raise ConfigError(f"unknown method {unknown[0]!r}; there are: {', '.join(known)}")
    jobs = [dataclasses.replace(job, network=network, task=task, seed=_seed(job, options))
            for entry in all_tables() for job in entry.compare
            if job.task == (task if task in NETWORK_OF else "folder")
            if not options.methods or entry.method in options.methods]
    if not jobs:
        raise ConfigError(f"no paper_configs file has a [[compare]] entry for the task {task!r}"
                          + (f" and {', '.join(options.methods)}" if options.methods else ""))
    files = [file_name(job) for job in jobs]
    twice = [job.name for job, file in zip(jobs, files, strict=True) if files.count(file) > 1]
    if twice:
        raise ConfigError(f"two [[compare]] entries for the task {task!r} are called {twice[0]!r}")
    return jobs


def reproduce(options: Namespace, console: Console) -> None:
    entry = read_table(options.config)
    jobs = [job for job in entry.rows if not options.row or job.name in options.row]
    unknown = sorted(set(options.row) - {job.name for job in entry.rows})
    if unknown or not jobs:
        raise ConfigError(f"{options.config.name} has no row {(unknown or ['at all'])[0]!r}; "
                          f"there are: {', '.join(job.name for job in entry.rows)}")
    for job in jobs:
        prepare(job)
    data = functools.cache(lambda task: open_dataset(task, options.data_dir))
    with Screen() as screen:
        place = place_of(options, screen)

        @functools.cache
        def start(task: str, network: str) -> tuple[Baseline, float]:
            baseline = get_baseline(data(task), network, options, place)
            return baseline, test_top1(baseline.model, data(task), network, place.device)

        rows = [run_job(dataclasses.replace(job, seed=_seed(job, options)), data(job.task),
                        *start(job.task, job.network), place, entry.name) for job in jobs]
    console.print(against_paper.terminal(rows, entry.title))
    console.print(f"rows: {place.results / 'rows' / (entry.name + '.jsonl')}", soft_wrap=True)


def report(options: Namespace, console: Console) -> None:
    """Tables, plots and page from rows that are already there; of equal ones the last row counts."""
    folder = options.results / "rows"
    path = options.rows if options.rows is not None else folder / f"{options.name}.jsonl"
    paths = sorted(folder.glob("*.jsonl")) if options.all else [path]
    rows_of = {path.stem: table.latest(read_rows(path)) for path in paths}
    empty = [path for path in paths if not rows_of[path.stem]]
    if empty or not paths:
        raise ConfigError(f"{(empty or [folder])[0]} holds no rows")
    for path in paths:
        try:
            _report(rows_of[path.stem], path.stem, options, console)
        except CompressError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CompressError(f"{path}: a row holds values that no report can show ({error!r})") from error
    if options.all and options.results.resolve() == RESULTS:
        trained = [read_provenance(path) for path in sorted((RESULTS / "baselines").glob("*.safetensors"))]
        readme.refresh(ROOT / "README.md", rows_of | {"shipped": trained})


def _report(rows: Sequence[dict], name: str, options: Namespace, console: Console) -> None:
    title = title_of(rows)
    console.print(table.terminal(table.listed(rows), title, console.width))
    if any(row["paper"] for row in rows):
        console.print(against_paper.terminal(rows, "beside the paper"))
    console.print(f"report: {write_reports(rows, name, title, options)}", soft_wrap=True)


def title_of(rows: Sequence[dict]) -> str:
    return " and ".join(dict.fromkeys(f"{row['network']} on {row['task']}" for row in rows))


def write_reports(rows: Sequence[dict], name: str, title: str, options: Namespace) -> Path:
    """NAME.html, .md, .csv and the plots as .png under results/reports; returns the page's path."""
    folder = options.results / "reports"
    folder.mkdir(parents=True, exist_ok=True)
    listed = table.listed(rows)
    text = table.markdown(listed)
    if any(row["paper"] for row in rows):
        text += "\n" + scores.markdown(rows) + "\n" + against_paper.markdown(rows)
    files = {".md": f"# {title}\n\n{text}".encode(), ".csv": table.comma_separated(listed).encode(),
             **{f"_{axis}.png": plots.as_png(plots.pareto_plot(rows, axis)) for axis in plots.AXES},
             **{f"_search_{network}.png": plots.as_png(figure) for network, figure in searches(rows)},
             ".html": page(rows, title, _again(options.words)).encode()}
    for end, data in files.items():
        container.write_file(folder / f"{name}{end}", data)
    return folder / f"{name}.html"


def _again(words: Sequence[str]) -> str:
    """The command line, without where this machine keeps data and results."""
    kept, skip = [], False
    for word in words:
        option, equals, _ = word.partition("=")
        if not skip and option not in PLACES:
            kept.append(word)
        skip = option in PLACES and not equals
    return shlex.join(["python", "-m", "benchmarks", *kept])


def compress(options: Namespace, console: Console) -> None:
    """One method on one network: the file, its measurements, and a row."""
    if not re.fullmatch(r"\w[\w.-]*", options.rows_name):
        raise ConfigError(f"--rows-name {options.rows_name!r}: allowed are letters, digits, _, - and .")
    name = options.name if options.name is not None else " ".join([options.method, *options.budget, *options.set])
    job = Job(name, options.method, options.task, "", from_assignments(options.budget), from_assignments(options.set),
              0 if options.seed is None else options.seed, options.index_bits)
    prepare(job)
    dataset = open_dataset(options.task, options.data_dir)
    job = dataclasses.replace(job, task=dataset.name, network=network_for(dataset, options))
    with Screen() as screen:
        place = place_of(options, screen)
        baseline = get_baseline(dataset, job.network, options, place)
        top = test_top1(baseline.model, dataset, job.network, place.device)
        row = run_job(job, dataset, baseline, top, place, options.rows_name)
    console.print(table.terminal(table.listed([row]), f"{job.network} on {dataset.name}", console.width))
    console.print(f"file: {place.results / 'models' / row['file']}", soft_wrap=True)


def _seed(job: Job, options: Namespace) -> int:
    return job.seed if options.seed is None else options.seed
