"""What the commands of the harness do; the command line itself is in `__main__`."""

import dataclasses
import shlex
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch
from rich.console import Console

from methods.core.errors import ConfigError
from methods.core.storage import decode, inspect

from .baselines import (
    Baseline,
    find_setup,
    load_baseline,
    shipped_path,
    shorter,
    skeleton,
    test_top1,
    train_baseline,
)
from .data import Dataset, open_dataset, test_batches
from .jobs import Job, Place, all_tables, prepare, read_table, run_job
from .measure import measure
from .networks import find
from .report import against_paper, plots, table
from .report.page import page
from .rows import read_rows
from .runs import DiskRun, Screen, run_key
from .settings import from_assignments, plain

NETWORK_OF = {"digits": "resnet18w16", "mnist": "lenet5_caffe", "cifar10": "resnet18"}  # what compare runs by default


def place_of(options: Namespace, screen: Screen) -> Place:
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {options.device}: there is no such device here; allowed are cpu"
                          " and, with a GPU build of torch, cuda")
    return Place(options.results, options.results.parent / "runs", device, screen, options.resume)


def get_baseline(dataset: Dataset, network: str, options: Namespace, place: Place) -> Baseline:
    """--checkpoint if given, else the checkpoint the project ships, else one trained now."""
    if options.checkpoint is not None:
        return load_baseline(dataset, network, options.checkpoint)
    shipped = shipped_path(dataset.name, network)
    if shipped.exists():
        return load_baseline(dataset, network, shipped)
    return trained(dataset, network, options, place, place.states / "baselines" / shipped.name)


def trained(dataset: Dataset, network: str, options: Namespace, place: Place, out: Path) -> Baseline:
    """A baseline trained in this run, by paper_configs/baselines.toml."""
    setup = shorter(find_setup(dataset.name, network), options.epochs)
    facts = {"setup": plain(setup), "data": dataset.digest, "network": network, "seed": options.seed}
    run = DiskRun(place.states / run_key(facts), f"train {network}", place.screen, resume=place.resume)
    baseline = train_baseline(dataset, network, setup, options.seed, place.device, out, run)
    run.forget()
    return baseline


def train(options: Namespace, console: Console) -> None:
    dataset = open_dataset(options.task, options.data_dir)
    out = options.out if options.out is not None else shipped_path(options.task, options.network)
    with Screen() as screen:
        baseline = trained(dataset, options.network, options, place_of(options, screen), out)
    facts = baseline.provenance
    console.print(f"{out}: held-out {facts['held_out_top1']:.2f} %, test {facts['test_top1']:.2f} %, "
                  f"digest {baseline.digest}", soft_wrap=True)


def compare(options: Namespace, console: Console) -> None:
    dataset = open_dataset(options.task, options.data_dir)
    network = options.network if options.network is not None else NETWORK_OF.get(dataset.name)
    if network is None:
        raise ConfigError(f"--network is needed for the task {options.task!r}")
    jobs = comparison(options, dataset.name, network)
    for job in jobs:
        prepare(job)  # a mistake in the last job should not wait for the first
    with Screen() as screen:
        place = place_of(options, screen)
        baseline = get_baseline(dataset, network, options, place)
        top = test_top1(baseline.model, dataset, network, place.device)
        rows = [run_job(job, dataset, baseline, top, place, f"compare_{_plain_name(dataset.name)}") for job in jobs]
    title = f"{network} on {dataset.name}: float32 baseline {top:.2f} %"
    console.print(table.terminal([table.baseline_row(rows[0]), *rows], title))
    path = write_reports(rows, f"compare_{_plain_name(dataset.name)}", title, options)
    console.print(f"report: {path}", soft_wrap=True)


def comparison(options: Namespace, task: str, network: str) -> list[Job]:
    """The [[compare]] entries of all methods for a task, seeds and network as asked for."""
    known = [table.method for table in all_tables()]
    unknown = [name for name in options.methods if name not in known]
    if unknown:
        raise ConfigError(f"unknown method {unknown[0]!r}; there are: {', '.join(known)}")
    jobs = [dataclasses.replace(job, network=network, task=task, seed=options.seed)
            for entry in all_tables() for job in entry.compare
            if job.task == (task if task in NETWORK_OF else "folder")
            if not options.methods or entry.method in options.methods]
    if not jobs:
        raise ConfigError(f"no paper_configs file has a [[compare]] entry for the task {task!r}")
    return jobs


def reproduce(options: Namespace, console: Console) -> None:
    entry = read_table(options.config)
    jobs = [job for job in entry.rows if not options.row or job.name in options.row]
    unknown = sorted(set(options.row) - {job.name for job in entry.rows})
    if unknown or not jobs:
        raise ConfigError(f"{options.config.name} has no row {(unknown or ['at all'])[0]!r}; "
                          f"there are: {', '.join(job.name for job in entry.rows)}")
    rows = []
    with Screen() as screen:
        place = place_of(options, screen)
        for job in jobs:
            prepare(job)
            dataset = open_dataset(job.task, options.data_dir)
            baseline = get_baseline(dataset, job.network, options, place)
            top = test_top1(baseline.model, dataset, job.network, place.device)
            rows.append(run_job(job, dataset, baseline, top, place, entry.name))
    console.print(against_paper.terminal(rows, entry.title))
    console.print(f"rows: {place.results / 'rows' / (entry.name + '.jsonl')}", soft_wrap=True)


def report(options: Namespace, console: Console) -> None:
    """Tables, plots and page from rows that are already there; of equal names the last row counts."""
    path = options.rows if options.rows is not None else options.results / "rows" / f"{options.name}.jsonl"
    rows = list({row["name"]: row for row in read_rows(path)}.values())
    if not rows:
        raise ConfigError(f"{path} holds no rows")
    title = f"{rows[0]['network']} on {rows[0]['task']}"
    console.print(table.terminal([table.baseline_row(rows[0]), *rows], title))
    if any(row["paper"] for row in rows):
        console.print(against_paper.terminal(rows, "beside the paper"))
    console.print(f"report: {write_reports(rows, path.stem, title, options)}", soft_wrap=True)


def write_reports(rows: Sequence[dict], name: str, title: str, options: Namespace) -> Path:
    """NAME.html, .md, .csv and the plots as .png under results/reports; returns the page's path."""
    folder = options.results / "reports"
    folder.mkdir(parents=True, exist_ok=True)
    listed = [table.baseline_row(rows[0]), *rows]
    text = table.markdown(listed)
    if any(row["paper"] for row in rows):
        text += "\n" + against_paper.markdown(rows)
    (folder / f"{name}.md").write_text(f"# {title}\n\n{text}")
    (folder / f"{name}.csv").write_text(table.comma_separated(listed))
    for axis in plots.AXES:
        plots.pareto_plot(rows, axis, baseline=rows[0]["baseline_top1"]).savefig(folder / f"{name}_{axis}.png", dpi=150)
    out = folder / f"{name}.html"
    out.write_text(page(rows, title, shlex.join(["python", "-m", "benchmarks", *options.words])))
    return out


def compress(options: Namespace, console: Console) -> None:
    """One method on one network: the file, its measurements, and a row."""
    name = options.name if options.name is not None else options.method
    job = Job(name, options.method, options.task, options.network,
              from_assignments(options.budget), from_assignments(options.set), options.seed, options.index_bits)
    prepare(job)
    dataset = open_dataset(options.task, options.data_dir)
    with Screen() as screen:
        place = place_of(options, screen)
        baseline = get_baseline(dataset, options.network, options, place)
        top = test_top1(baseline.model, dataset, options.network, place.device)
        row = run_job(job, dataset, baseline, top, place, options.rows_name)
    console.print(table.terminal([table.baseline_row(row), row], f"{options.network} on {dataset.name}"))
    console.print(f"file: {place.results / 'models' / row['file']}", soft_wrap=True)


def measure_file(options: Namespace, console: Console) -> None:
    dataset = open_dataset(options.task, options.data_dir)
    height, width, channels = dataset.image_shape
    test = test_batches(dataset, batch_size=250, device="cpu", scaling=find(options.network).scaling)
    console.print_json(data=measure(options.file, skeleton(dataset, options.network), test.epoch(None),
                                    (channels, height, width), index_bits=options.index_bits))


def inspect_file(options: Namespace, console: Console) -> None:
    console.print_json(data=inspect(options.file))


def decode_file(options: Namespace, console: Console) -> None:
    state = decode(options.file).state_dict()
    try:
        safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in state.items()}, options.out)
    except (OSError, safetensors.SafetensorError) as error:
        raise ConfigError(f"cannot write {options.out}: {error}") from None
    console.print(f"{options.out}: {len(state)} tensors", soft_wrap=True)


def _plain_name(task: str) -> str:
    return task.partition(":")[0]

