"""The trained networks that every method starts from: recipes, training, and finding the right checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from methods.core.errors import ConfigError
from methods.core.train.finetune import Recipe, train
from methods.core.train.task import Task, top1
from methods.engine.onednn import cpu_flags

from .augment import find_policy
from .checkpoints import digest_of, load_into, read_checkpoint, read_provenance, rounded, write_checkpoint
from .data import Dataset, make_task, test_batches
from .networks import build, check_fits, find, label, named
from .provenance import joined, provenance
from .recipes import RECIPES, setup_table
from .rows import RESULTS, ROOT
from .runs import DiskRun
from .settings import build as build_settings
from .settings import merge, plain

SHIPPED = RESULTS / "baselines"


def multiplies_bf16(device: torch.device) -> bool:
    """Whether bf16 is faster than float32 there: a CPU without the instructions emulates it, slowly.

    On x86 oneDNN says that it supports bf16 where it emulates it with AVX512.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = cpu_flags()
    native = [flags[name] for name in ("avx512_bf16", "amx_bf16") if name in flags]
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and (not native or any(native))


@dataclass(frozen=True)
class Setup:
    """How a network is trained on a task; methods fine-tune with the same batches and augmentation.

    autocast  train under bf16 autocast where the device has it
    """

    recipe: Recipe
    batch_size: int = 128
    augment: str = "none"
    autocast: bool = False

    def task(self, dataset: Dataset, network: str, device: torch.device) -> Task:
        """Training and held-out data for this network, in its input scaling."""
        return make_task(dataset, batch_size=self.batch_size, device=device, augment=self.augment,
                         autocast=torch.bfloat16 if self.autocast and multiplies_bf16(device) else None,
                         scaling=find(network).scaling)


@dataclass(frozen=True)
class Baseline:
    """A trained network and where it came from."""

    model: nn.Module
    digest: str
    source: str
    provenance: Mapping[str, Any]

    def described(self) -> dict[str, Any]:
        """As a row says it: a foreign checkpoint has no commit."""
        return {"digest": self.digest, "source": self.source,
                **{key: self.provenance[key] for key in ("commit", "dirty", "mixed") if key in self.provenance}}


def find_setup(task: str, network: str, recipes: Path = RECIPES) -> Setup:
    """The setup of paper_configs/baselines.toml for a task and network (see `recipes`)."""
    return build_settings(Setup, setup_table(task, network, recipes), f"{task}.{network}.")


def changed(setup: Setup, changes: Mapping[str, Any]) -> Setup:
    """The setup with the values of --setup; ConfigError for an unknown key, value or augmentation."""
    found = build_settings(Setup, merge(plain(setup), changes), "--setup ")
    find_policy(found.augment)
    if found.batch_size < 1:
        raise ConfigError(f"--setup batch_size = {found.batch_size}: allowed is 1 or more")
    return found


def shipped_path(task: str, network: str) -> Path:
    """Where the project ships the checkpoint of a task and network, if it does."""
    return SHIPPED / f"{task}_{label(network)}.safetensors".replace(":", "-")


def skeleton(dataset: Dataset, network: str) -> nn.Module:
    """The untrained network for a data set; ConfigError if the two do not fit."""
    check_fits(network, dataset)
    return build(network, dataset.classes, dataset.image_shape[2])


def load_baseline(dataset: Dataset, network: str, checkpoint: Path) -> Baseline:
    """Anyone's checkpoint as the baseline."""
    model = skeleton(dataset, network)
    load_into(model, named(find(network), read_checkpoint(checkpoint)))
    where = checkpoint.resolve()
    source = str(where.relative_to(ROOT)) if where.is_relative_to(ROOT) else where.name
    return Baseline(model.eval(), digest_of(checkpoint), source, read_provenance(checkpoint))


def train_baseline(dataset: Dataset, network: str, setup: Setup, seed: int, device: torch.device, out: Path,
                   run: DiskRun, *, half: bool = True, log_test: bool = True) -> Baseline:
    """Train from scratch, write `out` (float16 weights if `half`) and return what the file holds.

    The scores in the provenance are those of the stored, rounded network: held-out, and test, read once, after
    the last epoch.
    """
    generator = torch.Generator().manual_seed(seed)
    check_fits(network, dataset)
    model = build(network, dataset.classes, dataset.image_shape[2], seed)
    task = setup.task(dataset, network, device)
    history = train(model, task, setup.recipe, generator, run=run)
    state = rounded(model.state_dict(), half)
    model.load_state_dict(state)
    facts: dict[str, Any] = {"task": dataset.name, "network": network, "setup": plain(setup), "seed": seed,
                             "data": dataset.digest, "log": history, **provenance(), **joined(run.origins)}
    facts["held_out_top1"] = task.score(task.placed(model))
    if log_test:
        facts["test_top1"] = test_top1(model, dataset, network, device)
    write_checkpoint(out, state, facts, half=half)
    return load_baseline(dataset, network, out)


def test_top1(model: nn.Module, dataset: Dataset, network: str, device: torch.device) -> float:
    """Top-1 on the test set, in percent, in float32."""
    batches = test_batches(dataset, batch_size=250, device=device, scaling=find(network).scaling)
    return top1(model.to(device), batches.epoch(None))


def shorter(setup: Setup, epochs: int | None) -> Setup:
    """The setup with another number of epochs, if one is given."""
    return setup if epochs is None else replace(setup, recipe=replace(setup.recipe, epochs=epochs))
