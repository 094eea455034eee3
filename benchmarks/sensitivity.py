"""Which layer can be pruned, or rounded, how far: a file of curves, a picture of them, and rates for a budget.

One layer at a time is changed and nothing is trained; errors are of held-out data. The files, in results/sensitivity:

    NAME.json        curves {layer: {level: error}}, sizes, and all that they depend on
    NAME.svg, .png   the picture
"""

import json
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn

from methods.core.errors import ConfigError
from methods.core.file.container import write_file
from methods.core.fit.layer_rates import LEVELS, WIDTHS
from methods.core.fit.quantize import find_scheme
from methods.core.train.task import Task
from methods.pipeline import Sensitivity, pruning_curves, quantization_curves
from methods.pipeline.curves import check_granularity, check_levels

from .baselines import changed, find_setup
from .commands import given_setup, network_for, prepared, spec_of
from .data import open_dataset
from .docs.figures import as_png, as_svg
from .docs.words import COLOURS, MARKERS
from .jobs import Job
from .locks import locked
from .networks import label
from .provenance import provenance
from .rows import slug
from .runs import DiskRun, Screen, run_key
from .settings import from_assignments, plain
from .specs import device_of, get_baseline

STYLES = ("-", "--", ":", "-.")
AXES = {"density": "kept share", "bits": "bits"}


def sensitivity(options: Namespace, console: Console) -> None:
    """Curves, found or made; their files; a table of them, with the rates that fit --budget."""
    what, budget = asked(options), budget_of(options)
    setup, dataset = given_setup(options), open_dataset(options.task, options.data_dir, options.image_size)
    network = network_for(dataset, options)
    spec = spec_of(Job("sensitivity", "pipeline", dataset.name, network), "sensitivity", 0, options, options.task)
    with Screen() as screen:
        baseline = get_baseline(dataset, spec, prepared(options, screen).place(spec))
        found_setup = changed(find_setup(dataset.name, network), setup)
        task = found_setup.task(dataset, network, device_of(options.device))
        facts = {**what, "seed": spec.job.seed, "task": dataset.name, "network": network, "data": dataset.digest,
                 "baseline": baseline.digest, "setup": plain(found_setup)}
        out, found = curves_of(baseline.model, task, facts, options.results, screen, options.resume)
    chosen = {} if budget is None else found.choose(budget)
    for suffix, data in ((".svg", as_svg(picture(found, f"{network} on {dataset.name}"), alt(found)).encode()),
                         (".png", as_png(picture(found, f"{network} on {dataset.name}")))):
        write_file(out.with_suffix(suffix), data)
    console.print(table(found, chosen))
    console.print(f"curves: {out}, picture: {out.with_suffix('.svg')}", soft_wrap=True)


def asked(options: Namespace) -> dict[str, Any]:
    """What is measured; ConfigError where --bits goes with what only pruning has, or the other way round."""
    if options.bits is None:
        if options.scheme != "symmetric":
            raise ConfigError(f"--scheme {options.scheme} is a grid of --bits: give --bits, or leave it out")
        check_granularity(options.criterion, options.granularity)
        levels = LEVELS if options.rates is None else options.rates
        check_levels("density", levels)
        return {"level": "density", "levels": levels, "criterion": options.criterion,
                "granularity": options.granularity}
    for name, value, usual in (("--rates", options.rates, None), ("--criterion", options.criterion, "level"),
                               ("--granularity", options.granularity, "weight")):
        if value != usual:
            raise ConfigError(f"{name} prunes and --bits rounds: choose")
    levels = options.bits if options.bits else WIDTHS
    check_levels("bits", levels)
    find_scheme(options.scheme, levels)
    return {"level": "bits", "levels": levels, "scheme": options.scheme}


def budget_of(options: Namespace) -> float | None:
    """--budget density=D or bits=B, as fits the curves."""
    key = "density" if options.bits is None else "bits"
    given = from_assignments(options.budget)
    value = given.get(key)
    if given and (list(given) != [key] or not isinstance(value, (int, float)) or not value > 0):
        raise ConfigError(f"--budget {' '.join(options.budget)}: allowed here is {key}=NUMBER, the mean over all "
                          "weights")
    return value


def curves_of(model: nn.Module, task: Task, facts: Mapping[str, Any], results: Path, screen: Screen, resume: bool
              ) -> tuple[Path, Sensitivity]:
    """(NAME.json, the curves); with `resume`, what an earlier command finished is taken, layer by layer."""
    how = [str(facts[key]) for key in ("criterion", "granularity", "scheme") if key in facts]
    key = run_key(plain(facts))
    out = results / "sensitivity" / f"{slug('-'.join([facts['task'], label(facts['network']), *how]))}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked(results / "runs" / f"{key}.lock"):
        if resume and out.exists() and (known := _read(out, key)) is not None:
            screen.say(f"curves: {out}, of an earlier command")
            return out, known
        run = DiskRun(results / "runs" / key, "sensitivity", screen, resume=resume)
        found = measured(model, task, facts, run)
        written = {**plain(facts), "key": key, "measure": found.measure, "percent": found.percent,
                   "sizes": found.sizes, "curves": found.curves, **provenance()}
        write_file(out, json.dumps(written, indent=1, allow_nan=False).encode())
        run.forget()
    return out, found


def measured(model: nn.Module, task: Task, facts: Mapping[str, Any], run: DiskRun) -> Sensitivity:
    if facts["level"] == "bits":
        return quantization_curves(model, task, facts["levels"], scheme=facts["scheme"], run=run)
    return pruning_curves(model, task, torch.Generator().manual_seed(facts["seed"]), facts["levels"],
                          criterion=facts["criterion"], granularity=facts["granularity"], run=run)


def _read(path: Path, key: str) -> Sensitivity | None:
    """The curves in a file, if they are those of `key`."""
    try:
        there = json.loads(path.read_bytes())
        if there["key"] != key:
            return None
        number = {"density": float, "bits": int}[there["level"]]
        curves = {name: {number(level): error for level, error in curve.items()}
                  for name, curve in there["curves"].items()}
        return Sensitivity(there["level"], there["measure"], there["percent"], curves, there["sizes"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return None  # a file of somebody else: the curves are measured


def drops(found: Sensitivity) -> dict[str, dict[float, float]]:
    """{layer: {level: what is lost}}, from the whole network on; of a percentage in points."""
    unit = 100 if found.percent else 1
    return {name: {level: unit * (error - curve[max(curve)]) for level, error in curve.items() if level <= 16}
            for name, curve in found.curves.items()}


def unit_of(found: Sensitivity) -> str:
    return f"points of {found.measure} lost" if found.percent else f"{found.measure}, change"


def table(found: Sensitivity, chosen: Mapping[str, float]) -> Table:
    """A row a layer: what is lost at each level, and the chosen level."""
    lost = drops(found)
    levels = sorted({level for curve in lost.values() for level in curve}, reverse=True)
    made = Table(box=SIMPLE_HEAD, title=f"{unit_of(found)} (held-out), one layer at a time", title_justify="left")
    made.add_column("layer", overflow="fold")
    for head in ("weights", *(["chosen"] if chosen else []), *(f"{level:g}" for level in levels)):
        made.add_column(head, justify="right")
    for name, curve in lost.items():
        own = [f"{chosen[name]:.3g}"] if chosen else []
        made.add_row(name, f"{found.sizes[name]:,}", *own, *(f"{curve[level]:.2f}" for level in levels))
    return made


def alt(found: Sensitivity) -> str:
    """The picture in words."""
    worst = {name: max(curve.values()) for name, curve in drops(found).items()}
    name = max(worst, key=lambda layer: worst[layer])
    return (f"Sensitivity of {len(worst)} layers to {AXES[found.level]}; most is lost by {name}: {worst[name]:.2f} "
            f"{unit_of(found)}")


def picture(found: Sensitivity, title: str) -> Figure:
    """A line a layer: what is lost against the level, less kept to the right. Colours, markers and dashes differ."""
    figure = Figure(figsize=(8.0, 4.8), layout="constrained")
    panel = figure.add_subplot()
    for i, (name, curve) in enumerate(drops(found).items()):
        levels = sorted(curve, reverse=True)
        panel.plot(levels, [curve[level] for level in levels], color=COLOURS[i % len(COLOURS)], lw=1.2, ms=4,
                   marker=MARKERS[i % len(MARKERS)], ls=STYLES[i // len(COLOURS) % len(STYLES)], label=name)
    panel.axhline(0, color="0.4", lw=1, ls="--")
    panel.invert_xaxis()
    panel.set(xlabel=f"{AXES[found.level]} of the one layer", ylabel=f"{unit_of(found)}, held-out", title=title)
    panel.grid(alpha=0.25)
    figure.legend(loc="outside right upper", fontsize=7, frameon=False, ncols=1 + (len(found.curves) - 1) // 30)
    return figure
