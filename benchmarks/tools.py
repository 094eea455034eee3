"""The commands that look at one file, and the measurement of speed. None of them writes a row."""

import dataclasses
from argparse import Namespace

import safetensors.torch
from rich.console import Console

from methods.core.errors import ConfigError
from methods.core.file import container
from methods.core.file.storage import decode
from methods.engine.fast import FastNetwork
from methods.engine.verify import verify

from . import foreign
from .baselines import skeleton
from .citations import bibtex
from .data import open_dataset, test_batches
from .dead import as_text, network_of, networks_of, shrink_file
from .measure import measure
from .networks import find
from .speed import as_table, check_positive, measure_speed
from .speed_training import measure_training, training_table


def measure_file(options: Namespace, console: Console) -> None:
    dataset = open_dataset(options.task, options.data_dir)
    height, width, channels = dataset.image_shape
    test = test_batches(dataset, batch_size=250, device="cpu", scaling=find(options.network).scaling)
    console.print_json(data=measure(options.file, skeleton(dataset, options.network), test.epoch(None),
                                    (channels, height, width), index_bits=options.index_bits,
                                    float_policy=tuple(options.float_policy)))


def verify_file(options: Namespace, console: Console) -> None:
    check_positive({"inputs": options.inputs})
    dataset, compressed = open_dataset(options.task, options.data_dir), decode(options.file)
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
        dataset = open_dataset(task, options.data_dir)
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
