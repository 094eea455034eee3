"""A row as plain data, and `run_one`, which makes it: in this process, in another, or on another machine."""

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from methods.core.errors import ConfigError

from .baselines import (
    Baseline,
    Setup,
    changed,
    find_setup,
    load_baseline,
    shipped_path,
    shorter,
    train_baseline,
)
from .chance import at_chance
from .checkpoints import read_provenance
from .data import Dataset, open_dataset, test_batches
from .execute import Place, Start, run_job
from .jobs import Job
from .locks import locked
from .measure import right_of
from .networks import find, label, source_digest
from .rows import Row, slug
from .runs import DiskRun, Screen, run_key
from .settings import build, plain


@dataclass(frozen=True)
class Spec:
    """All that determines a row and where it goes; `settings.plain` makes plain data of it.

    table, order  the folder under results/rows, and the row's position in it
    data          what `open_dataset` takes
    checkpoint    a file to start from;  epochs  train a baseline of so many: else the shipped one, or one trained now
    image_size    of pictures from files;  setup  changes of the baseline's, {batch_size, augment, recipe}
    resume        take the row if it is there, and go on from saved states
    threads       of torch; None leaves them as they are
    measure       False: stop where the file is made
    """

    job: Job
    table: str
    order: int
    data: str
    results: str
    data_dir: str | None = None
    device: str = "cpu"
    checkpoint: str | None = None
    epochs: int | None = None
    resume: bool = False
    threads: int | None = None
    image_size: int | None = None
    setup: Mapping[str, Any] = field(default_factory=dict)
    measure: bool = True


class Session:
    """What the rows of one process share: data sets, baselines with their scores, and the screen."""

    def __init__(self, screen: Screen):
        self.screen = screen
        self.scores: dict[tuple, dict[str, torch.Tensor]] = {}
        self._datasets: dict[tuple, Dataset] = {}
        self._starts: dict[tuple, Start] = {}

    def dataset(self, spec: Spec) -> Dataset:
        key = (spec.data, spec.data_dir, spec.image_size)
        if key not in self._datasets:
            self._datasets[key] = open_dataset(*key)
        return self._datasets[key]

    def place(self, spec: Spec) -> Place:
        return Place(Path(spec.results), device_of(spec.device), self.screen, spec.resume, self.scores, spec.measure)

    def start(self, spec: Spec) -> Start:
        """The network that the row starts from, scored once."""
        key = (spec.data, spec.data_dir, spec.image_size, spec.job.network, spec.checkpoint, spec.epochs,
               repr(spec.setup), spec.device, spec.results)
        if key not in self._starts:
            dataset, place = self.dataset(spec), self.place(spec)
            start = scored(get_baseline(dataset, spec, place), dataset, spec.job.network, place.device)
            warn_at_chance(start.top1, dataset, self.screen)
            self._starts[key] = start
        return self._starts[key]


def run_one(spec: Mapping[str, Any], session: Session | None = None) -> Row | None:
    """The row of a plain `Spec`, made or, where it says resume, found; everything it needs is opened here.

    None where the spec leaves measuring out.

    Raises CompressError for a mistake in the spec. Equal specs give equal rows wherever they run, but for the seconds.
    """
    found = build(Spec, spec)
    if found.threads is not None:
        torch.set_num_threads(found.threads)
    with contextlib.ExitStack() as stack:
        if session is None:
            session = Session(stack.enter_context(Screen()))
        dataset = session.dataset(found)
        return run_job(found.job, dataset, session.start(found), session.place(found), found.table, found.order)


def device_of(name: str) -> torch.device:
    try:
        device = torch.device(name)
        if device.type in ("cpu", "cuda"):
            torch.zeros((), device=device)
            return device
    except (RuntimeError, AssertionError):  # no such name; no such device; not compiled with CUDA
        pass
    raise ConfigError(f"--device {name}: there is no such device here; allowed are cpu and, with a GPU build of "
                      "torch and a GPU, cuda")


def check_results(results: Path) -> None:
    """ConfigError unless results can be written there."""
    for folder in (results, *(results / part for part in ("rows", "models", "reports", "runs", "baselines"))):
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"--results {results}: {folder} is there and is no folder")
    results.mkdir(parents=True, exist_ok=True)
    if not os.access(results, os.W_OK):
        raise ConfigError(f"--results {results}: this folder cannot be written")


def scored(baseline: Baseline, dataset: Dataset, network: str, device: torch.device) -> Start:
    """A baseline with its answers on the test set and its held-out top-1, both in float32."""
    model, known = baseline.model.to(device), baseline.provenance
    test = test_batches(dataset, batch_size=250, device=device, scaling=find(network).scaling)
    right = right_of([model], test.epoch(None))[0]
    if known.get("data") == dataset.digest and "held_out_top1" in known:
        return Start(baseline, right, known["held_out_top1"])
    return Start(baseline, right, find_setup(dataset.name, network).task(dataset, network, device).score(model))


def check_start(checkpoint: Any, epochs: int | None, setup: Mapping[str, Any]) -> None:
    """ConfigError where a baseline is given and also to be trained."""
    asked = f"--epochs {epochs}" if epochs is not None else "--setup recipe..." if "recipe" in setup else None
    if checkpoint is not None and asked is not None:
        raise ConfigError(f"{asked} trains a baseline, --checkpoint gives one: choose")


def warn_at_chance(top1: float, dataset: Dataset, screen: Screen) -> None:
    """A line where a network has learned nothing that its test accuracy could show."""
    labels = dataset.test.labels
    if at_chance(top1, labels):
        guess = 100 * int(labels.bincount().max()) / len(labels)
        screen.say(f"warning: the baseline is at chance level: {top1:.2f} % of {len(labels)} test pictures of "
                   f"{dataset.name}, where guessing gives {guess:.2f} %; see --image-size and --setup "
                   "(recipe.lr, recipe.epochs, batch_size)")


def get_baseline(dataset: Dataset, spec: Spec, place: Place) -> Baseline:
    """`checkpoint` if given; else, without `epochs` or a recipe, the one that the project ships; else one trained now.

    What was trained by an earlier command from the same recipe, data and seed is taken instead of training again.
    """
    network = spec.job.network
    if spec.checkpoint is not None:
        check_start(spec.checkpoint, spec.epochs, spec.setup)
        return load_baseline(dataset, network, Path(spec.checkpoint))
    shipped = shipped_path(dataset.name, network)
    if shipped.exists() and spec.epochs is None and "recipe" not in spec.setup:
        if read_provenance(shipped).get("data") == dataset.digest:
            return load_baseline(dataset, network, shipped)
        place.screen.say(f"baseline: {shipped.name} has seen other pictures than these splits hold: training one")
    setup = changed(find_setup(dataset.name, network), spec.setup)
    return trained(dataset, network, shorter(setup, spec.epochs), 0, place)


def trained(dataset: Dataset, network: str, setup: Setup, seed: int, place: Place, out: Path | None = None) -> Baseline:
    """A baseline trained in this run; without `out`, kept for later commands.

    Where `out` holds the result of this very training and `place.resume` is set, it is taken.
    """
    facts = {"setup": plain(setup), "data": dataset.digest, "network": network, "seed": seed}
    key, own = run_key({**facts, "source": source_digest(network)} if source_digest(network) else facts), out is None
    if own:
        out = place.states / "baselines" / f"{slug(dataset.name)}_{slug(label(network))}_{key}.safetensors"
    waiting = f"train {network}: another process is at work on it: waiting for its checkpoint"
    with locked(place.states / f"{key}.lock", lambda: place.screen.say(waiting)) as waited:
        if out.exists() and (own or place.resume or waited) and is_trained(out, facts):
            place.screen.say(f"baseline: {out}, trained by an earlier command")
            return load_baseline(dataset, network, out)
        run = DiskRun(place.states / key, f"train {network}", place.screen, resume=place.resume or waited)
        baseline = train_baseline(dataset, network, setup, seed, place.device, out, run)
        run.forget()
        return baseline


def is_trained(path: Path, facts: Mapping[str, Any]) -> bool:
    """Whether the checkpoint at `path` says that it was trained from `facts`."""
    found = read_provenance(path)
    return {key: found.get(key) for key in facts} == dict(facts)
