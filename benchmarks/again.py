"""Rows measured again from the files they name: what the harness learned to measure later comes into old rows, too.

Nothing is compressed. A row says as before which commit made its file; `measured_by` says which one measured it. A row
that comes out the same stays as it is.
"""

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from methods.core.errors import CompressError, ConfigError

from .baselines import shipped_path, skeleton
from .commands import chosen, prepared, say, spec_of
from .data import Dataset
from .execute import Place, Start, described, is_of, measured, name_of, setup_of
from .jobs import Job, prepare, read_table
from .locks import locked
from .networks import label
from .provenance import origin, surroundings
from .report import against_paper
from .rows import DIGITS, Row, read_row, stem, write_row
from .runs import Screen
from .settings import plain, same_settings
from .specs import Session, Spec

MADE = ("shrink", "sixteen_bit")  # done to the file or not, whatever the job would do today


def remeasure(options: Namespace, console: Console) -> None:
    """Every row of the configurations that is there with its file; why one is left out is said."""
    jobs = [(entry, order, job) for entry in map(read_table, options.configs) for order, job in chosen(entry, options)]
    rows: dict[str, list[Row]] = {}
    with Screen() as screen:
        session = prepared(options, screen)
        for entry, order, job in jobs:
            spec = spec_of(job, entry.name, order, options)
            try:
                check_there(spec, session)
                row = measured_again(spec.job, session.dataset(spec), session.start(spec), session.place(spec),
                                     entry.name, order)
                rows.setdefault(entry.name, []).append(row)
            except CompressError as error:
                say(f"left as it is: {entry.name}, {job.name}: {error}")
    if not rows:
        raise ConfigError("none of these rows is there with its file")
    for name, found in rows.items():
        console.print(against_paper.terminal(found, name))


def check_there(spec: Spec, session: Session) -> None:
    """CompressError where the row is not there, or where what it starts from would have to be trained."""
    job, folder = spec.job, Path(spec.results) / "rows" / spec.table
    begin = stem(job.name, label(job.network), job.seed, "")
    if not any(folder.glob(f"{begin}-{'?' * DIGITS}.json")):
        raise ConfigError(f"no row in {folder}")
    dataset = session.dataset(spec)
    if spec.checkpoint is None and not shipped_path(dataset.name, job.network).exists():
        raise ConfigError(f"no baseline of {label(job.network)} on {dataset.name} is shipped: give it as --checkpoint")


def measured_again(job: Job, dataset: Dataset, start: Start, place: Place, table: str, order: int) -> Row:
    """The row of a job with all that is measured of its file new, written in its place; CompressError where there is no
    such row, or it is of other settings, or its file is not there."""
    name = name_of(job, start.baseline)
    folder, setup = place.results / "rows" / table, setup_of(job, dataset)
    row = read_row(folder / f"{name}.json")
    own = described(job, setup, dataset, start.baseline)
    fault = unlike(job, row, own)
    if fault is not None:
        raise ConfigError(f"its row is of another {fault} than the configuration")
    path = place.results / "models" / row["file"]
    if not is_of(path, row):
        raise ConfigError(f"{path} is not the file that it was measured from" if path.exists() else f"no file {path}")
    place.screen.say(f"{job.name}: measuring its file on {len(dataset.test):,} test inputs")
    new = measured(path, job, skeleton(dataset, job.network), dataset, setup, start,
                   place.scores.setdefault((dataset.digest, job.network), {}))
    said = {"paper": own["paper"], "note": job.note, "order": order}
    kept = {key: row.get(key, False) for key in MADE}
    if all(key in row and row[key] == value for key, value in {**new, **said, **kept}.items()):
        place.screen.say(f"{job.name}: everything is as its row says")
        return row
    here = surroundings()
    there = row.get("made_with", {key: row[key] for key in here if key in row})
    fresh = Row({**row, **new, **said, **kept, **{key: own[key] for key in ("densities", "float_policy")}, **here,
                 "measured_by": list(origin()), **({} if there == here else {"made_with": there})})
    with locked(place.states / f"{table}-{name}.lock"):
        write_row(folder, fresh)
    return fresh


def unlike(job: Job, row: Mapping[str, Any], own: Mapping[str, Any]) -> str | None:
    """What of a job its row says otherwise; None where it is the job's. What the row lacks is younger than it."""
    _, budget, config = prepare(job)
    asked = plain(budget)
    setup = {key: row["setup"].get(key, value) for key, value in own["setup"].items()}
    pairs = {"method": (own["method"], row["method"]), "seed": (own["seed"], row["seed"]),
             "data": (own["data"], row["data"]), "setup": (own["setup"], setup),
             "checkpoint": (own["checkpoint"]["digest"], row["checkpoint"]["digest"]),
             "budget": (asked, {**dict.fromkeys(asked), **row["budget"]}),
             "densities": (own["densities"], row.get("densities", "uniform")),
             "config": (True, same_settings(config, row["config"]))}
    return next((key for key, (asked, found) in pairs.items() if asked != found), None)
