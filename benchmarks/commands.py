"""What the commands of the harness do; the command line itself is in `__main__`."""

import dataclasses
import re
import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from methods.core.errors import CompressError, ConfigError
from methods.core.train.recipe import Recipe

from . import foreign
from .baselines import Setup, changed, find_setup, shipped_path, shorter
from .checkpoints import read_provenance
from .data import Dataset, open_dataset
from .docs import readme
from .docs.site import build_site, table_page, title_of
from .execute import Place
from .jobs import Job, Table, all_tables, file_name, prepare, read_table
from .networks import network_names
from .report import against_paper, table
from .rows import RESULTS, ROOT, Row, read_rows, slug, tables
from .runs import Screen, clean_up, jobs_done
from .settings import from_assignments, merge, plain
from .specs import (
    Session,
    Spec,
    check_results,
    check_start,
    device_of,
    is_trained,
    run_one,
    trained,
    warn_at_chance,
)

NETWORK_OF = {"digits": "resnet18w16", "mnist": "lenet5_caffe", "cifar10": "resnet18"}  # what compare runs by default
HEADLINE = "equal_bytes_resnet18"  # the table that README and the index of the site show
PLACES = ("--data-dir", "--results")


def prepared(options: Namespace, screen: Screen) -> Session:
    """A session whose results folder can be written and holds no leftovers."""
    device_of(options.device)
    check_results(options.results)
    clean_up(options.results, jobs_done(options.results), screen)
    return Session(screen)


def spec_of(job: Job, table: str, order: int, options: Namespace, data: str | None = None) -> Spec:
    """The row of a job under the options of the command line."""
    seed, setup = job.seed if options.seed is None else options.seed, given_setup(options)
    own = merge(job.setup, {key: value for key, value in setup.items() if key != "recipe"})
    return Spec(dataclasses.replace(job, seed=seed, setup=own), table, order, job.task if data is None else data,
                str(options.results), _text(options.data_dir), options.device, _text(options.checkpoint),
                options.epochs, options.resume, image_size=options.image_size, setup=setup,
                measure=not getattr(options, "no_measure", False))


def given_setup(options: Namespace) -> dict[str, Any]:
    """What --setup changes; ConfigError for values that no baseline can have."""
    setup = from_assignments(options.setup)
    changed(Setup(Recipe(epochs=1, lr=0.1)), setup)
    check_start(options.checkpoint, options.epochs, setup)
    return setup


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def train(options: Namespace, console: Console) -> None:
    if options.checkpoint is not None:
        raise ConfigError(f"--checkpoint {options.checkpoint}: train starts from nothing; leave it out")
    given = given_setup(options)
    dataset = open_dataset(options.task, options.data_dir, options.image_size)
    network, seed = options.network, 0 if options.seed is None else options.seed
    setup = shorter(changed(find_setup(dataset.name, network), given), options.epochs)
    shipped = options.results / "baselines" / shipped_path(dataset.name, network).name
    if options.out is None and shipped.exists() and not options.resume:
        raise ConfigError(f"{shipped} is there already, and rows start from it: to replace it, give it as --out")
    out = options.out if options.out is not None else shipped
    if out.suffix != ".safetensors" or out.is_dir():
        raise ConfigError(f"--out {out}: written are only .safetensors" + " files" * out.is_dir())
    facts = {"network": network, "seed": seed, "setup": plain(setup)}
    if options.resume and out.exists() and not is_trained(out, facts):
        raise ConfigError(f"{out} is there already, from another training: to replace it, leave out --resume")
    out.parent.mkdir(parents=True, exist_ok=True)  # a mistake should show before hours of training
    with Screen() as screen:
        prepared(options, screen)
        place = Place(options.results, device_of(options.device), screen, options.resume)
        baseline = trained(dataset, network, setup, seed, place, out)
        warn_at_chance(baseline.provenance["test_top1"], dataset, screen)
    facts = baseline.provenance
    console.print(f"{out}: held-out {facts['held_out_top1']:.2f} %, test {facts['test_top1']:.2f} %, "
                  f"digest {baseline.digest}", soft_wrap=True)


def compare(options: Namespace, console: Console) -> None:
    given_setup(options)
    dataset = open_dataset(options.task, options.data_dir, options.image_size)
    network = network_for(dataset, options)
    name = f"compare_{slug(dataset.name)}"
    specs = [spec_of(job, name, order, options, options.task)
             for order, job in comparison(options, dataset.name, network)]
    rows = run_all(specs, options)
    title = f"{network} on {dataset.name}: float32 baseline {rows[0]['baseline_top1']:.2f} %"
    console.print(table.terminal(table.listed(rows), title, console.width))
    rows = read_rows(options.results / "rows" / name, say)  # of earlier commands, too
    console.print(f"report: {write_report(rows, name, options)}", soft_wrap=True)


def run_all(specs: Sequence[Spec], options: Namespace) -> list[Row]:
    """The rows, one after the other; a mistake in the last one should not wait for the first."""
    for spec in specs:
        prepare(spec.job)
    with Screen() as screen:
        session = prepared(options, screen)
        rows = []
        for i, spec in enumerate(specs):
            if len(specs) > 1:
                screen.say(f"row {i + 1} of {len(specs)}: {spec.job.name}, {spec.job.network}")
            rows.append(run_one(plain(spec), session))
        return rows


def network_for(dataset: Dataset, options: Namespace) -> str:
    """--network, else the usual one of the task."""
    if options.network is None and dataset.name not in NETWORK_OF:
        raise ConfigError(f"--network is needed for the task {options.task!r}; there are: {', '.join(network_names())}")
    return options.network if options.network is not None else NETWORK_OF[dataset.name]


def comparison(options: Namespace, task: str, network: str) -> list[tuple[int, Job]]:
    """The [[compare]] entries of all methods for a task, with their positions; network as asked for."""
    known = list(dict.fromkeys(entry.method for entry in all_tables()))
    unknown = [name for name in options.methods if name not in known]
    if unknown:
        raise ConfigError(f"unknown method {unknown[0]!r}; there are: {', '.join(known)}")
    every = [dataclasses.replace(job, network=network, task=task) for entry in all_tables() for job in entry.compare
             if job.task == (task if task in NETWORK_OF else "folder")]
    jobs = [(order, job) for order, job in enumerate(every) if not options.methods or job.method in options.methods]
    if not jobs:
        raise ConfigError(f"no paper_configs file has a [[compare]] entry for the task {task!r}"
                          + (f" and {', '.join(options.methods)}" if options.methods else ""))
    files = [file_name(job) for _, job in jobs]
    twice = [job.name for (_, job), file in zip(jobs, files, strict=True) if files.count(file) > 1]
    if twice:
        raise ConfigError(f"two [[compare]] entries for the task {task!r} are called {twice[0]!r}")
    return jobs


def reproduce(options: Namespace, console: Console) -> None:
    entry = read_table(options.config)
    rows = run_all([spec_of(job, entry.name, order, options) for order, job in chosen(entry, options)], options)
    if options.no_measure:
        console.print(f"files to be measured: {options.results / 'runs'}", soft_wrap=True)
        return
    console.print(against_paper.terminal(rows, entry.title))
    console.print(f"rows: {options.results / 'rows' / entry.name}", soft_wrap=True)


def chosen(entry: Table, options: Namespace) -> list[tuple[int, Job]]:
    """The rows that --row and --network ask for, with their positions."""
    for option, values, there in (("--row", options.row, {job.name for job in entry.rows}),
                                  ("--network", options.network, {job.network for job in entry.rows})):
        unknown = sorted(set(values) - there)
        if unknown:
            raise ConfigError(f"{option}: {entry.name}.toml has no row {'of ' * (option != '--row')}{unknown[0]!r}; "
                              f"there are: {', '.join(map(repr, sorted(there)))}")
    jobs = [(order, job) for order, job in enumerate(entry.rows) if not options.row or job.name in options.row
            if not options.network or job.network in options.network]
    if not jobs:
        raise ConfigError(f"{entry.name}.toml has no such row; there are: "
                          + ", ".join(f"{job.name!r} ({job.network})" for job in entry.rows))
    return jobs


def report(options: Namespace, console: Console) -> None:
    """The table of rows that are already there, and its page."""
    folder = options.rows if options.rows is not None else options.results / "rows" / options.name
    rows = read_rows(folder, say)
    if not rows:
        raise ConfigError(f"{folder} holds no rows")
    title = title_of(rows)
    console.print(table.terminal(table.listed(rows), title, console.width))
    if any(row["paper"] for row in rows):
        console.print(against_paper.terminal(rows, "beside the paper"))
    console.print(f"report: {write_report(rows, folder.name, options)}", soft_wrap=True)


def docs(options: Namespace, console: Console) -> None:
    """The site of all tables; --readme also refreshes README, its picture, and results/TABLES.md."""
    rows_of = {folder.name: read_rows(folder, say) for folder in tables(options.results)}
    rows_of = {name: rows for name, rows in rows_of.items() if rows}
    if not rows_of:
        raise ConfigError(f"{options.results / 'rows'} holds no rows")
    tried = foreign.read_table(options.results / "networks.json")
    summaries = build_site(rows_of, options.out, headline=HEADLINE, api=not options.no_api, say=say,
                           networks=foreign.in_words(tried) if tried else None)
    if options.readme:
        trained = [read_provenance(path) for path in sorted((RESULTS / "baselines").glob("*.safetensors"))]
        for text in filter(Path.is_file, (ROOT / "README.md", ROOT / "results" / "TABLES.md")):
            readme.refresh(text, rows_of, summaries, trained)
    console.print(f"{options.out / 'index.html'}", soft_wrap=True)


def say(line: str) -> None:
    """A line on stderr."""
    sys.stderr.write(line + "\n")


def write_report(rows: Sequence[Row], name: str, options: Namespace) -> Path:
    """The page of a table under results/reports, with the table as CSV, Markdown and LaTeX; returns its path."""
    try:
        return table_page(rows, name, title_of(rows), _again(options.words), options.results / "reports")
    except CompressError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CompressError(f"{name}: a row holds values that no report can show ({error!r})") from error


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
              index_bits=options.index_bits, shrink=not options.no_shrink)
    prepare(job)
    given_setup(options)
    dataset = open_dataset(options.task, options.data_dir, options.image_size)
    job = dataclasses.replace(job, task=dataset.name, network=network_for(dataset, options))
    (row,) = run_all([spec_of(job, options.rows_name, 0, options, options.task)], options)
    console.print(table.terminal(table.listed([row]), f"{job.network} on {dataset.name}", console.width))
    console.print(f"file: {options.results / 'models' / row['file']}", soft_wrap=True)
