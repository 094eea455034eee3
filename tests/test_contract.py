"""What every method promises, on a tiny network with its smoke row; a new method joins by its paper_configs file.

The smoke row of a method is the [smoke] table (budget and config) of the first file that names it. No method is
excepted, and none is treated apart by its name.
"""

import math
import re
from dataclasses import fields, is_dataclass, replace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.jobs import all_tables
from benchmarks.measure import with_ranges
from benchmarks.settings import build
from methods import data_of, find_method, method_names
from methods.core.artifact import Affine, CompressedModel
from methods.core.budget import Budget
from methods.core.errors import BudgetError, CompressError
from methods.core.file.storage import from_bytes, to_bytes
from methods.core.graph.build import apply, frozen_layers, weight_layers
from methods.core.train.finetune import Recipe
from methods.core.train.recipe import Distill, Link
from methods.engine.accumulate import accumulate_int64
from methods.engine.exact import IntegerNetwork

COUNTER = "num_batches_tracked"


class Case:
    """A method with its smoke row, called on a fresh tiny network."""

    def __init__(self, name, tiny):
        found = [table.smoke for table in all_tables() if table.method == name and table.smoke]
        assert found and set(found[0]) >= {"budget"}, f"no paper_configs file has a [smoke] table for {name}"
        self.method, self.tiny = find_method(name), tiny
        self.budget = build(Budget, found[0]["budget"])
        self.config = build(self.method.Config, found[0].get("config", {}))
        assert data_of(self.method, self.config) in ("train", "held_out", "calibration", "none")

    def task(self):
        return self.tiny.task().seen_as(data_of(self.method, self.config))

    def compress(self, *, model=None, budget=None, run=None, seed=0, config=None):
        getattr(self.method, "LAST", {}).clear()  # what a method keeps of its last call, for the next rows of a table
        model = self.tiny.model() if model is None else model
        budget = self.budget if budget is None else budget
        generator = torch.Generator().manual_seed(seed)
        return self.method.compress(model, self.task(), budget, self.config if config is None else config, generator,
                                    run=run)


@pytest.fixture(params=method_names())
def case(request, tiny):
    return Case(request.param, tiny)


CACHE: dict[str, CompressedModel] = {}


@pytest.fixture
def compressed(case):
    """The outcome of the smoke row, computed once per method."""
    name = case.method.__name__
    if name not in CACHE:
        CACHE[name] = case.compress()
    return CACHE[name]


def test_the_input_model_is_left_as_it_was(case, tiny):
    model = tiny.model().train()
    model.bn2.eval()  # a user's mixed flags, a frozen parameter and a gradient
    model.fc.bias.requires_grad_(False)
    model.conv1.weight.grad = torch.ones_like(model.conv1.weight)
    before = tiny.fingerprint(model)
    out = case.compress(model=model)
    assert tiny.same(tiny.fingerprint(model), before)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    assert not any(bool((value == 7.0).all()) for value in out.rest.values())  # nor does the result lean on it


def test_the_state_dict_is_covered(compressed, tiny):
    skeleton = tiny.net()
    before = tiny.fingerprint(skeleton)
    network = apply(compressed, skeleton)
    assert tiny.same(tiny.fingerprint(skeleton), before)
    wanted = {name for name in network.state_dict() if not name.endswith(COUNTER)}
    assert set(compressed.state_dict()) == wanted
    assert all(value.device.type == "cpu" and value.is_contiguous() for value in compressed.state_dict().values())
    with torch.no_grad():
        assert network(tiny.Batches(24, 9).inputs).isfinite().all()


def test_pruned_is_zero_and_kept_is_on_the_grid(compressed):
    for name, tensor in compressed.weights.items():
        weight, grid = tensor.decode(), tensor.grid
        assert weight.dtype == torch.float32 and torch.equal(weight == 0, ~tensor.mask), name
        assert not bool(torch.signbit(weight[~tensor.mask]).any())
        low, high = grid.code_range(tensor.bits)
        scale = getattr(grid, "scale", torch.ones(())).double()
        for c in range(len(weight)):  # every value the channel's grid has, from the definitions
            if isinstance(grid, Affine):
                levels = torch.arange(low, high + 1) - int(grid.zero.expand(len(weight))[c])
            else:
                levels = getattr(grid, "levels", getattr(grid, "values", None))[:high + 1]
            values = (scale.expand(len(weight))[c] * levels.double()).float()
            assert torch.isin(weight[c][tensor.mask[c]], values).all(), name


def test_the_same_seed_gives_the_same_bytes_whatever_the_global_state(case, compressed):
    torch.manual_seed(4321)
    before = torch.get_rng_state()
    model = case.tiny.model()  # its initial weights come from the global generator
    drawn = torch.get_rng_state()
    assert not torch.equal(before, drawn)
    assert to_bytes(case.compress(model=model))[0] == to_bytes(compressed)[0]
    assert torch.equal(torch.get_rng_state(), drawn)


def limit(budget_value, layer, n):
    """`n` times the budget of a layer, rounded up."""
    value = budget_value[layer] if isinstance(budget_value, dict) else budget_value
    return max(math.ceil(value * n * (1 - 1e-12)), 1)


def test_the_budget_is_kept(case, compressed, tiny):
    budget, tensors = case.budget, compressed.weights
    dense = {name: layer.weight for name, layer in weight_layers(tiny.net()).items()}
    weights = {name: layer.weight for name, layer in weight_layers(apply(compressed, tiny.net())).items()}
    if budget.density is not None:
        kept = {name: int((weight != 0).sum()) for name, weight in weights.items()}
        allowed = {name: limit(budget.density, name, weight.numel()) for name, weight in dense.items()}
        assert sum(kept.values()) <= sum(allowed.values())  # a method may move density between layers
    if budget.bits is not None:
        for name, tensor in tensors.items():
            assert tensor.bits <= limit(budget.bits, name, 1), name
        assert set(tensors) == set(dense)
    if budget.channel_density is not None:
        alive = {name: int((weight != 0).flatten(1).any(1).sum()) for name, weight in weights.items()}
        thinned = [name for name in alive if alive[name] < len(dense[name])]
        assert thinned and all(alive[name] <= limit(budget.channel_density, name, len(dense[name])) for name in thinned)
    total = sum(weight.numel() for weight in dense.values())
    if budget.data_ratio is not None:
        assert sum(tensor.kept * tensor.bits for tensor in tensors.values()) <= budget.data_ratio * 32 * total
    if budget.size_ratio is not None:
        floats = sum(value.numel() for value in tiny.net().state_dict().values() if value.is_floating_point())
        assert len(to_bytes(compressed)[0]) <= budget.size_ratio * 4 * floats
    if budget.mac_ratio is not None or budget.bop_ratio is not None:
        places = {"conv1": 64, "conv2": 64, "conv3": 4, "fc": 1}  # 8 x 8 pixels, a pool of 2, a stride of 2
        whole = sum(count * dense[name].numel() for name, count in places.items())
        macs = {name: count * weights[name].numel() for name, count in places.items()}
        bops = sum(macs[name] * tensor.bits * 8 for name, tensor in tensors.items())
        assert sum(macs.values()) <= (1.0 if budget.mac_ratio is None else budget.mac_ratio) * whole
        assert bops <= (1.0 if budget.bop_ratio is None else budget.bop_ratio) * 32 * 32 * whole


def test_a_foreign_budget_field_is_refused(case):
    everything = {"density": 0.5, "channel_density": 0.5, "bits": 4, "data_ratio": 0.1, "size_ratio": 0.1,
                  "mac_ratio": 0.5, "bop_ratio": 0.1}
    assert set(everything) == {field.name for field in fields(Budget)}
    with pytest.raises(BudgetError, match="it takes: ") as caught:
        case.compress(budget=Budget(**everything))
    taken = re.search("it takes: (.*)$", str(caught.value))[1].split(", ")
    own = {name for name in everything if getattr(case.budget, name) is not None}
    assert own <= set(taken) - {"none"} < set(everything)
    for name in set(everything) - set(taken):
        with pytest.raises(BudgetError, match=f"cannot honour the budget field '{name}'"):
            case.compress(budget=replace(case.budget, **{name: everything[name]}))
    if case.budget != Budget():
        with pytest.raises(BudgetError, match="needs the budget field"):
            case.compress(budget=Budget())


def test_layers_left_alone_stay_float_or_the_method_says_it_cannot(case, tiny):
    """A frozen first layer and the classifier, in one budget; untrained, they are the given ones to the bit."""
    def frozen():
        model = tiny.model()
        model.conv1.weight.requires_grad_(False)
        return model

    model = frozen()
    if case.budget.density is None and case.budget.bits is None:
        with pytest.raises(BudgetError, match="no layers to leave alone"):
            case.budget.leaving(["fc"])
        return
    budget = case.budget.leaving([*frozen_layers(model), "fc"])
    untrained = with_recipes(case.config, epochs=0)
    try:
        results = [case.compress(model=frozen(), budget=budget, config=c) for c in (untrained, case.config)]
    except BudgetError as error:
        assert "it cannot leave" in str(error) and "\n" not in str(error)
        return
    for out in results:
        assert set(out.weights) == {"conv2", "conv3"} and bool((out.rest["fc.weight"] != 0).all())
        assert to_bytes(from_bytes(to_bytes(out)[0]))[0] == to_bytes(out)[0]
        ranged = with_ranges(out, tiny.net(), tiny.task())
        for network in (apply(out, tiny.net()), IntegerNetwork(ranged, tiny.net())):
            with torch.no_grad():
                assert network(tiny.Batches(24, 9).inputs).isfinite().all()
    for out, name in ((results[0], "conv1"), (results[0], "fc"), (results[1], "conv1")):  # frozen: not trained either
        assert torch.equal(out.rest[f"{name}.weight"], model.get_submodule(name).weight), name


def with_recipes(config, **changes):
    """`config` with every recipe, at any depth, changed."""
    if isinstance(config, Recipe):
        return replace(config, **changes)
    parts = {f.name: getattr(config, f.name) for f in fields(config) if is_dataclass(getattr(config, f.name))}
    return replace(config, **{name: with_recipes(part, **changes) for name, part in parts.items()})


def test_every_training_can_be_distilled(case, compressed, tiny):
    """From the given network, which stays as it is; a cut run goes on to the same bytes."""
    config = with_recipes(case.config, distill=Distill(2.0, 0.2, links=(Link("bn2", weight=0.5),)))
    if config == case.config:
        assert case.method.DATA != "train", "a method that trains takes a Recipe"
        return
    model = tiny.model()
    before = tiny.fingerprint(model)
    counted = tiny.Run()
    out = case.compress(model=model, config=config, run=counted)
    assert tiny.same(tiny.fingerprint(model), before)
    assert to_bytes(out)[0] != to_bytes(compressed)[0]
    states = {}
    with pytest.raises(tiny.Interrupted):
        case.compress(config=config, run=tiny.Run(states, len(counted.calls) // 2))
    assert to_bytes(case.compress(config=config, run=tiny.Run(states)))[0] == to_bytes(out)[0]


WRONG = {"model": "a network", "task": DataLoader([0]), "budget": {"bits": 8}, "config": None, "generator": 0}


@pytest.mark.parametrize("argument", WRONG)
def test_an_argument_of_another_type_is_refused_in_one_line(case, argument):
    given = {"model": case.tiny.model(), "task": case.task(), "budget": case.budget, "config": case.config,
             "generator": torch.Generator(), argument: WRONG[argument]}
    named = "a str was given where a network" if argument == "model" else rf"{argument} = a \w+( of bits)?: \w+ takes "
    with pytest.raises(CompressError, match=named) as caught:
        case.method.compress(*given.values())
    assert "\n" not in str(caught.value)


def test_no_task_is_refused_where_one_is_needed(case):
    if data_of(case.method, case.config) == "none":
        case.method.compress(case.tiny.model(), None, case.budget, case.config, torch.Generator())
        return
    with pytest.raises(CompressError, match="task = None: with these settings .* needs a task, such as Task.from_"):
        case.method.compress(case.tiny.model(), None, case.budget, case.config, torch.Generator())


@pytest.mark.parametrize("where", ["conv2.weight", "bn1.running_var"])
def test_nan_is_refused(case, tiny, where):
    model = tiny.model()
    model.state_dict()[where].view(-1)[3] = math.nan
    with pytest.raises(CompressError, match=f"{re.escape(where)} holds NaN"):
        case.compress(model=model)


def test_inputs_that_are_not_finite_are_refused_in_one_line(case, monkeypatch):
    task = case.task()
    if task is not None:
        (task.calibration if task.train is None else task.train).inputs[5, 1, 2, 3] = math.nan
        monkeypatch.setattr(case, "task", lambda: task)
        with pytest.raises(CompressError) as caught:
            case.compress()
        assert "\n" not in str(caught.value)


def test_a_network_without_layers_is_refused_in_one_line(case):
    with pytest.raises(CompressError) as caught:
        case.compress(model=nn.Sequential(nn.ReLU()))
    assert "\n" not in str(caught.value)


def test_a_file_gives_back_every_bit(compressed, tiny):
    for mode in ("best", "paper"):
        back = from_bytes(to_bytes(compressed, mode=mode)[0])
        assert list(back.weights) == list(compressed.weights)
        for name, tensor in compressed.weights.items():
            other = back.weights[name]
            assert type(other.grid) is type(tensor.grid) and other.bits == tensor.bits
            assert tiny.same(vars(other.grid), vars(tensor.grid))
            assert torch.equal(other.codes, tensor.codes) and torch.equal(other.mask, tensor.mask)
        assert tiny.same(dict(back.rest), dict(compressed.rest))
        for part in ("activations", "windows"):
            assert dict(getattr(back, part)) == dict(getattr(compressed, part))
        assert dict(back.topology.folded) == dict(compressed.topology.folded)
        assert {k: tuple(v) for k, v in back.topology.widths.items()} == dict(compressed.topology.widths)
        assert tuple(back.topology.removed) == tuple(compressed.topology.removed)
        assert back.ranges_by == compressed.ranges_by
        assert to_bytes(back, mode=mode)[0] == to_bytes(compressed, mode=mode)[0]


def test_integer_kernels_equal_int64_on_every_integer_layer(compressed, tiny):
    skeleton = tiny.net()
    network = IntegerNetwork(with_ranges(compressed, skeleton, tiny.task()), skeleton)
    seen = {}

    def see(layer, codes, total):
        inputs = codes.to(torch.int64) - layer.source.zero
        assert torch.equal(codes, codes.round()) and layer.source.code_range[0] <= int(codes.min())
        assert int(codes.max()) <= layer.source.code_range[1]
        seen[layer.node.name] = torch.equal(accumulate_int64(layer.node.module, inputs, layer.weight.integers),
                                            total.to(torch.int64))

    network.see = see
    inputs = tiny.Batches(48, 9).inputs
    integer = network(inputs)
    assert seen == dict.fromkeys(compressed.weights, True)
    for name, tensor in compressed.weights.items():
        assert torch.equal(network.layers[name].weight.integers != 0, tensor.mask), name
    with torch.no_grad():  # and the integers mean what the decoded weights mean
        real = apply(compressed, skeleton)(inputs)
    assert float((integer - real).square().mean().sqrt()) < 0.3 * float(real.std())


def test_an_interrupted_run_resumes_to_the_same_bytes(case, compressed):
    counted = case.tiny.Run()
    assert to_bytes(case.compress(run=counted))[0] == to_bytes(compressed)[0]
    total = len(counted.calls)
    for calls in sorted({total // 4, total // 2, total - 1} - {-1}) if total else ():
        states = {}
        with pytest.raises(case.tiny.Interrupted):
            case.compress(run=case.tiny.Run(states, calls))
        assert to_bytes(case.compress(run=case.tiny.Run(states)))[0] == to_bytes(compressed)[0], calls
