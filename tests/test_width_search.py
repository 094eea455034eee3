"""Width search: what points cost, what is judged, what comes back as a model of the whole network."""

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.measure import with_ranges
from benchmarks.report.courses import course_plot
from benchmarks.settings import build, plain
from methods import Budget, ConfigError, Recipe, Task, apply, find_method, pipeline, width_search
from methods.core.errors import BudgetError
from methods.core.file.storage import to_bytes
from methods.core.graph.build import float_bytes
from methods.core.graph.coupled import find_groups
from methods.core.graph.graph import trace
from methods.core.graph.narrow import Channels
from methods.core.graph.weights import weight_layers
from methods.core.train.distill import soft_loss
from methods.width_search import Config, Inner
from methods.width_search.slimmable import Sandwich
from methods.width_search.space import Costs, Space, width_choices

from .test_narrow import Joined, made
from .test_shrink import Mobile, Residual

QUICK = {"evaluations": 4, "population": 2, "bn_inputs": 48, "recipe": None, "multiple": 4}
RTN = pipeline.Config(order=("quantize",), calibration_inputs=24)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def compress(tiny, budget, model=None, run=None, task=None, **settings):
    model = tiny.model() if model is None else model
    config = Config(**{**QUICK, "inner": Inner("pipeline", RTN), **settings})
    return width_search.compress(model, tiny.task() if task is None else task, Budget(**budget), config, seeded(),
                                 run=run)


def space_of(net, *, bits=(), coded=None, multiple=2, order=None):
    graph = trace(net)
    groups = {", ".join(group.members): group for group in find_groups(graph)}
    order = {name: torch.randperm(group.size) for name, group in groups.items()} if order is None else order
    coded = dict.fromkeys(weight_layers(net), 8) if coded is None else coded
    return Space(graph, Channels(graph), groups, order, coded, bits, multiple, 8)


def test_choices():
    assert width_choices(64, 8, 100) == (8, 16, 24, 32, 40, 48, 56, 64)
    assert width_choices(20, 8, 8) == (8, 16, 20) and width_choices(7, 8, 8) == (7,)
    few = width_choices(512, 8, 5)
    assert len(few) == 5 and (few[0], few[-1]) == (8, 512) and all(width % 8 == 0 for width in few)


@pytest.mark.parametrize("kind, shape", [(Residual, (3, 8, 8)), (Mobile, (3, 8, 8)), (Joined, (3, 2, 2))])
def test_costs_are_those_of_the_network_that_is_made(kind, shape):
    net, x = made(kind), torch.randn(1, *shape)
    space = space_of(net, bits=(2, 4, 8))
    costs, draw = Costs(space, net, x, 8), np.random.default_rng(0)
    for point in [space.largest, space.smallest, *(tuple(draw.integers(0, space.levels)) for _ in range(5))]:
        small, macs = space.network(net, point), {}

        def see(module, inputs, output, name, macs=macs):
            macs[name] = output[0].numel() * module.weight[0].numel()

        layers = {name: layer for name, layer in small.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))}
        for name, layer in layers.items():
            layer.register_forward_hook(lambda *given, name=name: see(*given, name))
        with torch.no_grad():
            small(x)
        assert costs.macs(point) == sum(macs.values())
        bits = space.values(point)["bits"]
        assert set(bits) == set(layers)
        whole = 32 * 32 * costs.macs(space.largest)
        assert costs.bop_ratio(point) == pytest.approx(sum(8 * bits[n] * macs[n] for n in layers) / whole)
        coded = sum(layer.weight.numel() * bits[name] / 8 + 4 * len(layer.weight) for name, layer in layers.items())
        assert costs.code_bytes(point) == coded
        for name, width in space.values(point)["width"].items():
            first = name.split(", ")[0]
            assert len(layers[first].weight) == width * len(net.get_submodule(first).weight) // next(
                group.size for group in find_groups(trace(net)) if first in group.members)


def test_the_best_channels_make_a_width_and_wider_ones_hold_narrower_ones():
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    space = space_of(net, order={"0": torch.tensor([5, 2, 7, 0, 1, 3, 4, 6])})
    assert space.dims[0].choices == (2, 4, 6, 8)
    assert torch.equal(space.network(net, (0,))[0].weight, net[0].weight[[2, 5]])
    assert torch.equal(space.network(net, (1,))[2].weight, net[2].weight[:, [0, 2, 5, 7]])


def test_l1_keeps_the_largest_filters(tiny):
    model = tiny.model()
    out = compress(tiny, {"mac_ratio": 0.99, "bits": 8}, model, multiple=8)
    best = model.conv3.weight.detach().abs().sum((1, 2, 3)).argsort(descending=True)[:8].sort().values
    found = apply(out, model).conv3.weight.flatten(1)  # scaled: batch norm is folded
    assert len(found) == 8
    assert bool((torch.cosine_similarity(found, model.conv3.weight[best].flatten(1)).abs() > 0.999).all())


@pytest.mark.parametrize("criterion", ["l1", "l2", "taylor"])
def test_a_channel_that_does_nothing_goes_first(criterion, tiny):
    model = tiny.model()
    with torch.no_grad():
        model.conv3.weight[2] = 0
    out = compress(tiny, {"mac_ratio": 0.995, "bits": 8}, model, multiple=11, criterion=criterion)
    found = apply(out, model).conv3.weight.flatten(1)
    same = torch.cosine_similarity(found[:, None], model.conv3.weight.flatten(1)[None], dim=2).abs() > 0.999
    assert len(found) == 11 and same.any(0).tolist() == [i != 2 for i in range(12)]


def test_what_is_judged_has_the_statistics_of_its_own_width(tiny):
    """As torch's own batch norm gathers them in training mode, over the inputs that the generator draws."""
    model, task = tiny.model(), tiny.task()
    space = space_of(model, multiple=4)
    judge = width_search.Judge(model, task, space, Config(bn_inputs=60), seeded(3), tiny.Run())
    found, wanted = judge.network(space.smallest), space.network(model, space.smallest)
    for module in wanted.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = 1.0
    with torch.no_grad():
        wanted.train()(task.training_inputs(60, seeded(3)))
    for name in ("bn1", "bn2", "bn3"):
        for part in ("running_mean", "running_var"):
            torch.testing.assert_close(getattr(found.get_submodule(name), part),
                                       getattr(wanted.get_submodule(name), part), rtol=1e-4, atol=1e-5)
    assert judge(space.smallest) == task.error(wanted)
    assert not torch.equal(found.bn1.running_mean, model.bn1.running_mean[:4])


def test_searched_bits_are_judged_rounded(tiny):
    """Symmetric per channel: the largest weight of a filter is its last step."""
    model, task = tiny.model(), tiny.task()
    space = space_of(model, bits=(2, 8), multiple=8)
    point = tuple(0 if dim.what == "bits" else len(dim.choices) - 1 for dim in space.dims)
    judge = width_search.Judge(model, task, space, Config(bn_inputs=60), seeded(3), tiny.Run())
    rounded = tiny.model()
    with torch.no_grad():
        for layer in weight_layers(rounded).values():
            step = layer.weight.flatten(1).abs().amax(1).reshape(-1, *[1] * (layer.weight.ndim - 1))
            layer.weight.copy_((layer.weight / step).round() * step)  # -1, 0, 1
    reestimated = judge.network(point).state_dict()
    rounded.load_state_dict({name: reestimated[name] if "running" in name else value
                             for name, value in rounded.state_dict().items()})
    assert judge(point) == task.error(rounded) != task.error(model)
    assert judge(space.largest[:1] + point[1:]) == judge(point)


@pytest.mark.parametrize("name", ["mac_ratio", "bop_ratio", "size_ratio"])
def test_the_smallest_network_is_within_reach_and_nothing_below(name, tiny):
    with pytest.raises(BudgetError) as caught:
        compress(tiny, {name: 1e-4, "bits": 8})
    least = float(str(caught.value).split()[-1])
    out = compress(tiny, {name: least * 1.001, "bits": 8})
    assert out.notes["width"] == {"conv1, conv2": 4, "conv3": 4}
    with pytest.raises(BudgetError, match="out of reach"):
        compress(tiny, {name: least * 0.99, "bits": 8})


def test_an_interrupted_search_judges_nothing_twice(tiny, monkeypatch):
    judged, states = [], {}
    original = Task.error
    monkeypatch.setattr(Task, "error", lambda task, network: judged.append(0) or original(task, network))
    whole = compress(tiny, {"mac_ratio": 0.6, "bits": 8}, multiple=2, evaluations=8)
    count = len(judged)
    with pytest.raises(tiny.Interrupted):
        compress(tiny, {"mac_ratio": 0.6, "bits": 8}, multiple=2, evaluations=8, run=tiny.Run(states, count))
    again = compress(tiny, {"mac_ratio": 0.6, "bits": 8}, multiple=2, evaluations=8, run=tiny.Run(states))
    assert to_bytes(again)[0] == to_bytes(whole)[0] and len(judged) <= 2 * count + 1
    assert again.notes["trace"] == whole.notes["trace"]


def test_everything_allowed_is_the_inner_method_on_the_network_itself(tiny):
    model = tiny.model()
    out = compress(tiny, {"mac_ratio": 1.0, "bits": 8}, model)
    alone = pipeline.compress(model, tiny.task(), Budget(bits=8), RTN, seeded())
    assert to_bytes(out)[0] == to_bytes(alone)[0]
    assert out.notes["width"] == {"conv1, conv2": 8, "conv3": 12}
    assert out.notes["error"] == tiny.task().error(model)


@pytest.mark.parametrize("strategy", ["random", "greedy", "evolutionary", "bayes"])
def test_limits_are_kept(strategy, tiny):
    settings = {} if strategy == "greedy" else {"evaluations": 6, "population": 20 if strategy != "evolutionary" else 3}
    config = {**QUICK, "evaluations": 100, "population": 20, **settings}
    out = compress(tiny, {"mac_ratio": 0.6, "bop_ratio": 0.03}, strategy=strategy, multiple=2, bits=(2, 3, 8), **{
        key: value for key, value in config.items() if key != "multiple"})
    seen = out.notes["trace"]
    assert len(seen["points"]) == len(seen["errors"]) == len(seen["mac_ratio"]) == len(seen["fits"])
    chosen = [i for i, fit in enumerate(seen["fits"]) if fit and seen["errors"][i] == out.notes["error"]]
    assert chosen and all(seen["mac_ratio"][i] <= 0.6 and seen["bop_ratio"][i] <= 0.03 for i in chosen)
    assert {name: tensor.bits for name, tensor in out.weights.items()} == out.notes["bits"]
    assert course_plot({"method": "width_search", "notes": plain(out.notes)}) is not None


@pytest.mark.parametrize("ratio", [0.1, 0.15, 0.25])
def test_bytes_are_kept_and_used(ratio, tiny):
    model = tiny.model()
    out = compress(tiny, {"size_ratio": ratio, "bits": 8}, model, multiple=2)
    assert 0.7 * ratio * float_bytes(model) < len(to_bytes(out)[0]) <= ratio * float_bytes(model)


def test_ranges_that_the_harness_adds_find_room(tiny):
    """Deep Compression leaves them out; with them the file keeps the limit, too."""
    model, config = tiny.model(), width_search.inner.untrained(find_method("deep_compression").Config())
    out = compress(tiny, {"size_ratio": 0.15, "density": 0.6, "bits": 5}, model, multiple=2,
                   inner=Inner("deep_compression", config))
    ranged = with_ranges(out, tiny.net(), tiny.task())
    assert not out.activations and ranged.activations
    assert len(to_bytes(out)[0]) < len(to_bytes(ranged)[0]) <= 0.15 * float_bytes(model)


def test_a_result_that_is_too_large_is_made_again(tiny, monkeypatch):
    """The first file has grown by training: from then on all are expected to, and another point is taken."""
    model, calls, sizes = tiny.model(), [], []
    keep, stored = width_search.Sizes.keep, width_search.Sizes.stored

    def kept(self, point, made):
        calls.append(point)
        return keep(self, point, made)

    def grown(self, made):
        sizes.append(stored(self, made))
        return 1.02 * self.most if len(sizes) == 4 else sizes[-1]  # after both ends and the untrained file

    monkeypatch.setattr(width_search.Sizes, "keep", kept)
    monkeypatch.setattr(width_search.Sizes, "stored", grown)
    out = compress(tiny, {"size_ratio": 0.2, "bits": 8}, model, multiple=2)
    assert len(calls) == 4 and calls[0] == calls[1] != calls[2] == calls[3]
    assert len(to_bytes(out)[0]) == sizes[-1] <= 0.2 * float_bytes(model)


@pytest.mark.parametrize("name, budget, config", [
    ("rptq", {}, {"sensitivity_inputs": 8, "calibration_inputs": 24, "check_inputs": 24}),
    ("dfq", {"bits": 8}, {}), ("deep_compression", {"density": 0.5, "bits": 4}, {}),
    ("prune_then_quantize", {"density": 0.5, "bits": 6}, {}), ("udfc", {"channel_density": 0.5, "bits": 6}, {})])
def test_any_inner_method(name, budget, config, tiny):
    """Its result belongs to the whole network, and is what it makes of the narrow one."""
    method, model, made_of = find_method(name), tiny.model(), []
    settings = build(method.Config, config)
    settings = width_search.inner.untrained(settings)

    def seen(network, *given, **more):
        made_of.append((network, found := original(network, *given, **more)))
        return found

    original = method.compress
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(method, "compress", seen)
        out = compress(tiny, {"mac_ratio": 0.6, **budget}, model, inner=Inner(name, settings))
    x = tiny.Batches(24, 9).inputs
    narrow, found = made_of[-1]
    with torch.no_grad():
        assert torch.equal(apply(out, model)(x), apply(found, narrow)(x))
    assert sum(p.numel() for p in narrow.parameters()) < sum(p.numel() for p in model.parameters())


def test_settings_of_the_inner_method_from_plain_values():
    config = build(Config, {"inner": {"method": "rptq", "config": {"points": 2.0}}})
    assert config.inner == Inner("rptq", find_method("rptq").Config(points=2.0))
    kept = build(Config, {"inner": {"config": {"activation_bits": 6}}})
    assert kept.inner.config == pipeline.Config(order=("quantize",), activation_bits=6)
    assert build(Config, plain(config)) == config
    with pytest.raises(ConfigError, match="unknown key .*'pints'"):
        build(Config, {"inner": {"method": "rptq", "config": {"pints": 2.0}}})
    assert Config(recipe=None, inner=Inner("rptq")).data == "held_out" and Config().data == "train"


# --- slimmable ---------------------------------------------------------------------------------------------


def test_a_step_sums_the_gradients_of_all_widths(tiny):
    """Of the smallest width as of the whole network whose weights read no other channel, on what the largest says."""
    net = made(Residual).train()
    net.requires_grad_(True)
    space = space_of(net, multiple=5)
    x = torch.randn(6, 3, 8, 8)
    sandwich = Sandwich(net, tiny.task(), space)
    sandwich.points = lambda: [space.smallest]
    outputs = net(x)
    sandwich.after_backward(net, 0.1)
    found = {name: p.grad.clone() for name, p in net.named_parameters()}
    kept = space.kept(space.smallest)
    net.zero_grad()
    masks = {name: torch.from_numpy(kept[space.channels.columns[name]]).float() for name in ("a", "b", "short", "fc")}
    weights = {f"{name}.weight": net.get_submodule(name).weight * mask.reshape(1, -1, *[1] * (
        net.get_submodule(name).weight.ndim - 2)) for name, mask in masks.items()}
    soft_loss(torch.func.functional_call(net, weights, (x,)), outputs.detach(), 1.0).backward()
    for name, p in net.named_parameters():
        layer = name.rpartition(".")[0]
        rows = torch.from_numpy(kept[space.channels.rows[layer]])
        torch.testing.assert_close(found[name][rows], p.grad[rows], rtol=1e-3, atol=1e-5)
        assert bool((found[name][~rows] == 0).all()), name


def test_a_width_of_few_channels_is_trained_in_the_layout_that_suits_it(tiny):
    """The whole network has 16 channels in front of its strided 1x1 convolution; oneDNN is wrong below that."""
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 1, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    task, seen = Task(None, [], channels_last=True), []
    sandwich = Sandwich(task.placed(net), task.suited_to(net), space_of(net, multiple=4))
    sandwich.points = lambda: [sandwich.space.smallest]
    looking = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda layer, given: seen.extend((given[0], layer.weight)) if isinstance(layer, nn.Conv2d) else None)
    with looking:
        net.train()(task.placed_batch((torch.randn(8, 3, 8, 8), torch.zeros(8)))[0])
        sandwich.after_backward(net, 0.1)
    assert [t.shape[1] for t in seen] == [3, 3, 16, 16, 3, 3, 4, 4]
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in seen[:4])
    assert all(t.stride() == torch.empty(t.shape).stride() for t in seen[4:])


def test_slimmable_training_helps_the_narrow(tiny):
    recipe = Recipe(4, 0.01, optimizer="adam")
    errors = [compress(tiny, {"mac_ratio": 0.4, "bits": 8}, slimmable=slimmable, multiple=2).notes["error"]
              for slimmable in (None, recipe)]
    assert errors[1] < errors[0] - 0.05
