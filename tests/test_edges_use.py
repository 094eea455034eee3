"""How methods are called: a network in training mode, without gradients, with inputs or settings that do not fit."""

import dataclasses
import re
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.utils.data import DataLoader

from methods import clip_q, deep_compression, find_method, method_names, rptq, sparq, width_search
from methods import prune_then_quantize as ptq
from methods.core.budget import Budget
from methods.core.errors import CompressError, ConfigError
from methods.core.file.storage import to_bytes
from methods.core.train.finetune import train
from methods.core.train.recipe import Distill, Recipe
from methods.core.train.task import Task
from methods.core.typed import check_types
from tests.edge_networks import seeded


def normed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.5),
                         nn.Linear(32, 4))


def test_a_width_search_takes_a_network_in_training_mode():
    batch = torch.randn(32, 3, 8, 8, generator=seeded()), torch.arange(32) % 4
    task, files = Task.from_loader([batch], [batch]), []
    config = width_search.Config(evaluations=3, population=3, recipe=None, bn_inputs=16)
    for model in (normed().train(), normed().eval()):
        before = torch.get_rng_state()
        made = width_search.compress(model, task, Budget(mac_ratio=0.6, bits=8), config, seeded())
        assert torch.equal(torch.get_rng_state(), before)
        files.append(to_bytes(made)[0])
    assert files[0] == files[1]


def lone(norm=nn.BatchNorm1d, shape=(24,), **options):
    """A network with a norm behind [N, 24], and a loader of 33 samples in batches of 8."""
    net = nn.Sequential(nn.Linear(16, 24), nn.Unflatten(1, shape), norm(shape[0]), nn.ReLU(), nn.Flatten(),
                        nn.Linear(24, 4))
    samples = [(torch.rand(16, generator=seeded(i)), i % 4) for i in range(33)]
    return net, DataLoader(samples, batch_size=8, **options)


def test_a_last_batch_of_one_example_is_said_before_the_first_step():
    net, loader = lone()
    before = net[0].weight.clone()
    with pytest.raises(ConfigError, match="^a batch of 1 example: batch norm needs 2 or more; allowed is drop_last"):
        train(net, Task.from_loader(loader, loader), Recipe(epochs=1, lr=0.1), seeded())
    assert torch.equal(net[0].weight, before)
    with pytest.raises(ConfigError, match="^a batch of 1 example"):
        deep_compression.compress(net, Task.from_loader(loader, loader), Budget(density=0.3, bits=4),
                                  deep_compression.Config(), seeded())


def test_a_batch_of_one_example_among_others_is_said_where_it_comes():
    batches = list(lone()[1])
    with pytest.raises(ConfigError, match="^a batch of 1 example"):
        train(lone()[0], Task.from_loader(batches, batches), Recipe(epochs=1, lr=0.1), seeded())


@pytest.mark.parametrize("given", [lone(drop_last=True), lone(nn.BatchNorm2d, (6, 2, 2)), lone(nn.LayerNorm)],
                         ids=["dropped", "maps", "layer norm"])
def test_a_last_batch_of_one_example_is_taken_where_it_can_be(given):
    net, loader = given
    assert len(train(net, Task.from_loader(loader, loader), Recipe(epochs=1, lr=0.1), seeded())) == 1
    assert not any(module._forward_pre_hooks for module in net.modules())


TUNED = deep_compression.Config(rounds=1, retrain=Recipe(epochs=1, lr=0.1), tune=Recipe(epochs=1, lr=0.1))


def call(name):
    """A method on a small network; returns the bytes of the file."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.rand(32, 3, 4, 4, generator=seeded())
    if name == "rptq":
        made = rptq.compress(net, Task.from_inputs(x), Budget(size_ratio=0.3), rptq.Config(), seeded())
    else:
        task = Task.from_loader([(x, torch.arange(32) % 4)], [])
        made = deep_compression.compress(net, task, Budget(density=0.3, bits=4), TUNED, seeded())
    return to_bytes(made)[0]


@pytest.mark.parametrize("name", ["rptq", "deep_compression"])
def test_a_call_without_gradients_gives_the_same_file_or_one_true_line(name):
    wanted = call(name)
    with torch.no_grad():
        assert call(name) == wanted and not torch.is_grad_enabled()
    with torch.inference_mode(), pytest.raises(ConfigError, match=r"^called inside torch\.inference_mode\(\): "):
        call(name)


IMAGES = torch.rand(32, 3, 8, 8, generator=seeded())
CANNOT_TAKE = {"whole numbers": IMAGES.mul(60).byte(), "one image": IMAGES[0], "channels last": IMAGES.transpose(1, 3)}


def pictures() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))


@pytest.mark.parametrize("kind", CANNOT_TAKE)
@pytest.mark.parametrize("method, budget", [(rptq, Budget(size_ratio=0.3)), (sparq, Budget())], ids=["rptq", "sparq"])
def test_inputs_that_the_network_cannot_take_are_named(method, budget, kind):
    with pytest.raises(ConfigError, match=r"^Sequential cannot take the calibration inputs, \w+ \[") as said:
        method.compress(pictures(), Task.from_inputs(CANNOT_TAKE[kind]), budget, method.Config(), seeded())
    assert "\n" not in str(said.value)


def test_held_out_inputs_that_the_network_cannot_take_are_named():
    task = Task.from_inputs(IMAGES, held_out=IMAGES.transpose(1, 3))
    with pytest.raises(ConfigError, match="^Sequential cannot take the held-out inputs"):
        rptq.compress(pictures(), task, Budget(), rptq.Config(), seeded())


def test_an_array_of_inputs_is_taken_like_a_tensor():
    assert torch.equal(Task.from_inputs(IMAGES.double().numpy()).calibration_inputs(30), IMAGES[:30])
    with pytest.raises(ConfigError, match="^a batch of inputs must be a tensor"):
        Task.from_inputs(np.array([None, None])).calibration_inputs(1)


def test_inputs_are_unpacked():
    loader = [{"image": IMAGES[:16]}, {"image": IMAGES[16:]}]
    for unpack in (lambda batch: batch["image"], lambda batch: (batch["image"], None)):
        assert torch.equal(Task.from_inputs(loader, unpack=unpack).calibration_inputs(32), IMAGES)
    with pytest.raises(ConfigError, match="^unpack cannot read a dict of image: 'label'$"):
        Task.from_inputs(loader, unpack=lambda batch: batch["label"]).calibration_inputs(1)
    with pytest.raises(ConfigError, match="^unpack must return a tensor, or a tuple whose first part is one, not"):
        Task.from_inputs(loader, unpack=str).calibration_inputs(1)


class Keeping(nn.Module):
    """Leaves in attributes what its last forward pass computed."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.seen, self.log = nn.Linear(48, 16), nn.Linear(16, 4), None, {}

    def forward(self, x):
        self.seen = torch.relu(self.first(x.flatten(1)))
        self.log["all"] = [self.seen, (self.seen[:1],)]
        return self.last(self.seen)


KEPT = {
    "prune_then_quantize": (ptq, Budget(density=0.5, bits=4), ptq.Config(
        retrain=Recipe(epochs=1, lr=0.1), aware=Recipe(epochs=1, lr=0.1), calibration_inputs=24)),
    "rptq": (rptq, Budget(size_ratio=0.3), rptq.Config()),
    "deep_compression": (deep_compression, Budget(density=0.3, bits=4), TUNED),
    "clip_q": (clip_q, Budget(), clip_q.Config(evaluations=2, initial=1, probe=1, finetune=Recipe(epochs=1, lr=0.1))),
    "width_search": (width_search, Budget(mac_ratio=0.6, bits=8), width_search.Config(
        evaluations=3, population=3, recipe=Recipe(epochs=1, lr=0.1), criterion="taylor")),
}


@pytest.mark.parametrize("name", KEPT)
def test_a_network_that_keeps_its_activations_gives_the_same_file(name):
    method, budget, config = KEPT[name]
    batch = torch.rand(32, 3, 4, 4, generator=seeded()), torch.arange(32) % 4
    task, files = Task.from_loader([batch], [batch]), []
    for used in (False, True):
        torch.manual_seed(0)
        net = Keeping()
        if used:
            net(batch[0])
        files.append(to_bytes(method.compress(net, task, budget, config, seeded()))[0])
        assert net.seen is None or net.seen.grad_fn is not None
    assert files[0] == files[1]


def test_a_teacher_that_keeps_its_activations_is_copied():
    torch.manual_seed(0)
    teacher, batch = Keeping(), (torch.rand(32, 3, 4, 4), torch.arange(32) % 4)
    teacher(batch[0])
    task = Task.from_loader([batch], [], teacher=teacher)
    train(Keeping(), task, Recipe(epochs=1, lr=0.1, distill=Distill()), seeded())


COMPUTED = {
    "the weight of 1": lambda net: prune.l1_unstructured(net[1], "weight", 0.5),
    "the bias of 1": lambda net: prune.l1_unstructured(net[1], "bias", 0.5),
    "the weight of 3": lambda net: weight_norm(net[3]),
    "the weight of 1 ": lambda net: parametrizations.weight_norm(net[1]),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("what", COMPUTED)
def test_a_tensor_that_hooks_compute_is_named(what):
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 4))
    COMPUTED[what](net)
    with pytest.raises(CompressError, match=f"^{what.strip()} is computed from other tensors .*: make it permanent"):
        rptq.compress(net, Task.from_inputs(torch.rand(8, 48)), Budget(size_ratio=0.3), rptq.Config(), seeded())


WRONG = {
    "epochs = 1.5: allowed is a whole number": lambda: Recipe(epochs=1.5, lr=0.01),
    "epochs = '2': allowed is a whole number": lambda: Recipe(epochs="2", lr=0.1),
    "lr = None: allowed is a number": lambda: Recipe(epochs=1, lr=None),
    "distill = True: allowed is a Distill or None": lambda: Recipe(epochs=1, lr=0.1, distill=True),
    "links = 'conv1': allowed is a tuple of a Link": lambda: Distill(links="conv1"),
    "calibration_inputs = '512': allowed is a whole number": lambda: rptq.Config(calibration_inputs="512"),
    "excluded_bits = 4.0: allowed is a whole number or None": lambda: sparq.Config(excluded_bits=4.0),
    "bits = 4: allowed is a tuple of a whole number": lambda: width_search.Config(bits=4),
}


@pytest.mark.parametrize("said", WRONG)
def test_a_setting_of_a_wrong_type_is_refused(said):
    with pytest.raises(ConfigError) as refused:
        WRONG[said]()
    assert str(refused.value) == said


@pytest.mark.parametrize("said, method, config", [
    ("retrain = None: allowed is a Recipe", deep_compression, {"retrain": None}),
    ("rounds = 1.5: allowed is a whole number", deep_compression, {"rounds": 1.5}),
    ("per_channel = 'no': allowed is True or False", ptq, {"per_channel": "no"}),
], ids=["recipe", "rounds", "switch"])
def test_a_setting_of_a_wrong_type_is_refused_by_the_call(said, method, config):
    with pytest.raises(ConfigError) as refused:
        method.compress(nn.Linear(2, 2), None, Budget(density=0.5, bits=4), method.Config(**config), seeded())
    assert str(refused.value) == said


def test_settings_of_related_types_are_taken():
    recipe = Recipe(epochs=np.int64(2), lr=np.float32(0.1), weight_decay=0)
    check_types(deep_compression.Config(rounds=np.int32(2), retrain=recipe))
    check_types(width_search.Config(bits=range(3, 5)))

    @dataclass
    class Config:
        way: Literal["a", "b"] = "a"
        rates: dict[str, float] = field(default_factory=dict)
        shape: tuple[int, float] = (1, 1)
        inner: Any = None
        other: torch.dtype = torch.float32

    check_types(Config(rates=MappingProxyType({"a": 1}), shape=[2, 3], inner=recipe))
    for wrong, said in ((Config(way="c"), "way = 'c': allowed is one of 'a', 'b'"),
                        (Config(rates=1.0), "rates = 1.0: allowed is a dict"),
                        (Config(inner=Config(shape=(1.5, 1))),
                         "inner.shape = (1.5, 1): allowed is a tuple of a whole number, a number")):
        with pytest.raises(ConfigError) as refused:
            check_types(wrong)
        assert str(refused.value) == said


@pytest.mark.parametrize("name", method_names())
def test_every_setting_of_another_type_is_one_line_from_every_method(name):
    """A text for a number, a number for a text: when the settings are made, whatever else they are checked for."""
    config = find_method(name).Config()
    wrong = {int: "3", float: "0.1", bool: "yes", str: 3.5}
    tried = 0
    for one in dataclasses.fields(config):
        value = wrong.get(type(getattr(config, one.name)))
        if value is None:
            continue
        with pytest.raises(ConfigError, match=rf"^{one.name} = {re.escape(repr(value))}: allowed is") as caught:
            dataclasses.replace(config, **{one.name: value})
        assert "\n" not in str(caught.value)
        tried += 1
    assert tried > 0
