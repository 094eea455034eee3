"""Many rows at once: `executor.map(run_one, specs)` on any `concurrent.futures` executor; Dask's is the shipped one.

On one machine, a process for each of N workers:

    python -m benchmarks sweep paper_configs/annc_lenet.toml paper_configs/admm_lenet.toml --seeds 3 --workers 4

On a cluster, workers run in a clone on a disk that all see, and take rows from a scheduler's address:

    dask scheduler                                       # says tcp://HOST:8786
    dask worker tcp://HOST:8786 --nthreads 1             # in the clone, as often as there are machines
    python -m benchmarks sweep CONFIG... --cluster tcp://HOST:8786

With Slurm, `dask-jobqueue` starts the workers; each asks the queue for one job:

    from dask_jobqueue import SLURMCluster
    cluster = SLURMCluster(cores=4, processes=1, memory="16GB", walltime="08:00:00")
    cluster.scale(jobs=20)
    print(cluster.scheduler_address)                     # for --cluster, while this process lives

A row whose worker dies is tried again by another one, from its saved state; a finished row is not run again, so the
same command continues a sweep that was cut off. Rows are those of the plain loop (--workers 0), but for the seconds.
"""

import contextlib
import functools
import os
from argparse import Namespace
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from rich.console import Console

from methods.core.errors import CompressError, ConfigError

from .commands import chosen, prepared, say, spec_of
from .jobs import prepare, read_table
from .report import against_paper
from .rows import Row
from .runs import Screen
from .settings import plain
from .specs import Session, Spec, run_one

RETRIES = 10  # times that a row may lose its worker
PATIENCE = 30.0  # seconds for a scheduler to answer


@dataclass(frozen=True)
class Outcome:
    """A row, or why there is none; neither where a file is made and not measured."""

    row: Row | None
    fault: str = ""


class Here(Executor):
    """Runs each call at once, in this process."""

    def submit(self, call, /, *given, **more):
        future: Future = Future()
        future.set_result(call(*given, **more))
        return future


def attempt(spec: dict[str, Any]) -> Outcome:
    """`run_one`, where a mistake in one row does not stop the others."""
    try:
        return Outcome(run_one(spec, _session()))
    except CompressError as error:
        return Outcome(None, " ".join(str(error).split()))


@functools.cache
def _session() -> Session:
    """Of this process: data sets and baselines are opened once for all its rows."""
    return Session(Screen(bars=False))


@contextlib.contextmanager
def executor_for(workers: int, cluster: str | None = None) -> Iterator[Executor]:
    """An executor: this process, `workers` processes of a local Dask cluster, or the Dask cluster at an address."""
    if cluster is None and workers == 0:
        yield Here()
        return
    import dask  # takes a second, and only sweeps need it
    from distributed import Client, LocalCluster

    # Dask's own environment for workers makes the allocator give memory back after every batch.
    with dask.config.set({"distributed.nanny.pre-spawn-environ": {}, "distributed.scheduler.allowed-failures": RETRIES,
                          "distributed.comm.timeouts.connect": "60s"}), contextlib.ExitStack() as stack:
        if cluster is None:
            page = ":0" if find_spec("bokeh") is not None else None
            cluster = stack.enter_context(LocalCluster(n_workers=workers, threads_per_worker=1, memory_limit=None,
                                                       dashboard_address=page, silence_logs=50))
        try:
            client = stack.enter_context(Client(cluster, timeout=PATIENCE))
        except (OSError, ValueError) as error:
            raise ConfigError(f"--cluster {cluster}: no Dask scheduler answers there ({error})") from None
        if find_spec("bokeh") is not None:
            say(f"progress: {client.dashboard_link}")
        yield client.get_executor(pure=False)


def specs_of(options: Namespace) -> list[Spec]:
    """The rows of all CONFIGs, each with its seeds, well-formed."""
    if options.seeds < 1 or options.workers < 0 or options.threads is not None and options.threads < 1:
        raise ConfigError(f"--seeds {options.seeds} --workers {options.workers} --threads {options.threads}: allowed "
                          "are 1 or more seeds and threads, and 0 or more workers")
    threads = options.threads
    if threads is None and options.workers > 0:
        threads = max((os.cpu_count() or 1) // options.workers, 1)
    specs = []
    for path in options.configs:
        entry = read_table(path)
        for order, job in chosen(entry, options):
            prepare(job)
            first = spec_of(job, entry.name, order, options)
            specs += [replace(first, job=replace(job, seed=first.job.seed + i), resume=True, threads=threads)
                      for i in range(options.seeds)]
    return specs


def sweep(options: Namespace, console: Console) -> None:
    specs = specs_of(options)
    with Screen() as screen:
        prepared(options, screen)
    with executor_for(options.workers, options.cluster) as executor:
        outcomes = list(executor.map(attempt, [plain(spec) for spec in specs]))
    show(specs, outcomes, console)


def show(specs: Sequence[Spec], outcomes: Sequence[Outcome], console: Console) -> None:
    """The rows beside the paper, table by table; CompressError with what could not be made."""
    for name in dict.fromkeys(spec.table for spec in specs):
        rows = [outcome.row for spec, outcome in zip(specs, outcomes, strict=True)
                if spec.table == name and outcome.row is not None]
        if rows:
            console.print(against_paper.terminal(rows, name))
    faults = [f"{spec.table}, {spec.job.name}, seed {spec.job.seed}: {outcome.fault}"
              for spec, outcome in zip(specs, outcomes, strict=True) if outcome.fault]
    for fault in faults:
        say(fault)
    if faults:
        raise CompressError(f"{len(faults)} of {len(specs)} rows could not be made; the others are there")
