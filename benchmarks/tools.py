"""The commands that look at one file, and the measurement of speed. None of them writes a row."""

import dataclasses
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from rich.console import Console

from methods.core.errors import ConfigError
from methods.core.file import container
from methods.core.file.layouts import INDEX_BITS
from methods.core.file.storage import decode
from methods.engine.fast import FastNetwork
from methods.engine.verify import verify

from . import foreign
from .baselines import skeleton
from .checkpoints import digest_of
from .citations import bibtex
from .data import open_dataset, test_batches
from .dead import as_text, network_of, networks_of, shrink_file
from .measure import measure
from .networks import find
from .report import claims as claimed
from .rows import Row, read_rows, tables
from .speed import as_table, check_positive, measure_speed
from .speed_training import measure_training, training_table


def measure_file(options: Namespace, console: Console) -> None:
    dataset = open_dataset(options.task, options.data_dir, options.image_size)
    height, width, channels = dataset.image_shape
    test = test_batches(dataset, batch_size=250, device="cpu", scaling=find(options.network).scaling)
    row = row_of(options.file, options.results) if options.index_bits == ["row"] else {}
    policy = options.float_policy if options.float_policy else row.get("float_policy", [])
    found = measure(options.file, skeleton(dataset, options.network), test.epoch(None), (channels, height, width),
                    index_bits=index_bits_of(options.index_bits, row), float_policy=tuple(policy))
    console.print_json(data={key: value for key, value in found.items() if key != "right"})


def row_of(file: Path, results: Path) -> Row:
    """The row that was measured from a file; ConfigError if there is none."""
    digest = digest_of(file)
    rows = (row for folder in tables(results) for row in read_rows(folder, lambda line: None))
    found = next((row for row in rows if row.get("file_digest") == digest), None)
    if found is None:
        raise ConfigError(f"--index-bits row: no row under {results / 'rows'} was measured from {file}")
    return found


def index_bits_of(words: list[str], row: Mapping[str, Any]) -> int | str | dict[str, int]:
    """--index-bits: a number, auto, LAYER=BITS for each layer, or those of a row; ConfigError for anything else."""
    if words == ["row"]:
        return {name: layer["index_bits"] for name, layer in row["layers"].items() if "index_bits" in layer}
    given = words[0] if len(words) == 1 and "=" not in words[0] else dict(word.partition("=")[::2] for word in words)
    for width in given.values() if isinstance(given, dict) else [given]:
        if width != "auto" and not (width.isdecimal() and len(width) < 3 and int(width) in INDEX_BITS):
            raise ConfigError(f"--index-bits {' '.join(words)}: allowed is {INDEX_BITS[0]}..{INDEX_BITS[-1]}, one or "
                              "LAYER=BITS for each layer, auto, or row")
    if isinstance(given, dict):
        return {name: int(width) for name, width in given.items()}
    return given if given == "auto" else int(given)


def verify_file(options: Namespace, console: Console) -> None:
    check_positive({"inputs": options.inputs})
    dataset, compressed = open_dataset(options.task, options.data_dir, options.image_size), decode(options.file)
    network = FastNetwork(compressed, skeleton(dataset, options.network), tuple(options.float_policy))
    test = test_batches(dataset, batch_size=100, device="cpu", scaling=find(options.network).scaling)
    console.print(f"kernels: {network.backend}", soft_wrap=True)
    found = verify(network, test.epoch(None), options.inputs, options.reference)
    console.print_json(data=dataclasses.asdict(found))


def try_networks(options: Namespace, console: Console) -> None:
    networks = options.networks if options.networks else list(foreign.NETWORKS)
    methods = options.methods if options.methods else list(foreign.SETTINGS)
    said = Console(stderr=True, markup=False, emoji=False)
    table = foreign.run_networks(options.out, networks, methods, said.print)
    console.print(foreign.as_markdown(table), end="", soft_wrap=True, highlight=False)


def cite(options: Namespace, console: Console) -> None:
    console.print(bibtex(options.methods), end="", soft_wrap=True, highlight=False)


def shrink_files(options: Namespace, console: Console) -> None:
    known = networks_of(options.results)
    paths = options.files if options.files else [options.results / "models" / file for file, (task, _) in known.items()
                                                 if task == "mnist" and (options.results / "models" / file).exists()]
    chosen = [(path, *network_of(path, known, options.task, options.network)) for path in paths]
    found = []
    for path, task, network in chosen:
        dataset = open_dataset(task, options.data_dir, options.image_size)
        found.append(shrink_file(path, dataset, network, skeleton(dataset, network)))
    if options.json:
        console.print_json(data=[dataclasses.asdict(one) for one in found])
    else:
        console.print("\n".join(map(as_text, found)), soft_wrap=True)


def decode_file(options: Namespace, console: Console) -> None:
    if options.out.suffix != ".safetensors":
        raise ConfigError(f"{options.out}: written are only .safetensors")
    state = decode(options.file).state_dict()
    container.write_file(options.out, safetensors.torch.save({name: t.contiguous() for name, t in state.items()}))
    console.print(f"{options.out}: {len(state)} tensors", soft_wrap=True)


def speed(options: Namespace, console: Console) -> None:
    if options.part != "training":
        _speed_of_kernels(options, console)
    if options.part != "kernels":
        _speed_of_training(options, console)


def _speed_of_training(options: Namespace, console: Console) -> None:
    found = measure_training(options.network, options.train_batch, options.rounds, options.threads)
    console.print(training_table(found))
    console.print(f"{options.network}, {found.weights:,} weights, {options.threads} threads. Apart from the steps, in "
                  "seconds: " + "; ".join(f"{what} {spent:.2f}" for what, spent in found.projections.items()),
                  soft_wrap=True)


def _speed_of_kernels(options: Namespace, console: Console) -> None:
    found = measure_speed(options.network, options.files, options.batch, options.rounds, options.threads)
    console.print(as_table(found.timings, found.batch))
    console.print(f"{options.network}, {options.threads} threads; CPU: {found.cpu}", soft_wrap=True)
    for name, profile in found.profiles.items():
        console.print(f"{name}: {profile.line()}", soft_wrap=True)


def claims(options: Namespace, console: Console) -> None:
    """Every claim with its answer, and the pairs of rows it was put to."""
    if not (options.results / "rows").is_dir():
        raise ConfigError(f"--results {options.results}: no folder with rows")
    rows_of = {folder.name: read_rows(folder, lambda line: None) for folder in tables(options.results)}
    for one in claimed.in_words(rows_of):
        pairs = f" ({one['pairs']})" if one["pairs"] else ""
        console.print(f"{one['text']}: {one['verdict']}{pairs}", style="bold", soft_wrap=True)
        for line in one["lines"]:
            found = (f": {line['change']} ({line['interval']}), {line['network']}, bytes {line['bytes']}, "
                     f"{line['seeds']}" if line["interval"] else "")
            console.print(f"    {line['verdict']}: {line['better']} against {line['than']}{found}", soft_wrap=True)
