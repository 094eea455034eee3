"""The traced graph computes what the module computes, and refuses what it does not know in one line."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from methods import Budget, Task, find_method
from methods.core.errors import CompressError, GraphError
from methods.core.graph.graph import trace


class Wild(nn.Module):
    """Every function and method the graph knows, in-place forms, and one ReLU module called twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 6), (6, 6), (6, 6)))
        self.bn, self.relu, self.pool = nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.AvgPool2d(2)
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        x = self.relu(self.a(x))
        y = self.bn(self.b(x))
        y += x
        y = torch.add(self.relu(self.c(y)), F.relu(y, inplace=True))
        y = self.pool(torch.relu(y).relu().contiguous()) + F.avg_pool2d(x, 2)
        y = F.dropout(F.max_pool2d(y, kernel_size=2), 0.5, self.training)
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(y, output_size=1), start_dim=1).flatten(1))


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * self._conv_forward(x, self.weight, None)


class Made(nn.Module):
    """A network from a function of (self, x) and layers."""

    def __init__(self, run, **layers):
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.run(self, x)


def pictures(seed=0):
    return torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_runs_as_the_module_does(tiny):
    for model in (tiny.model(), Wild().eval(), nn.Sequential(nn.Conv2d(3, 4, 8), nn.Identity(), nn.Flatten()).eval()):
        x = pictures()
        with torch.no_grad():
            assert torch.equal(trace(model).run(x.clone()), model(x.clone()))


def test_a_watcher_sees_operands_as_they_were():
    seen = {}
    trace(Wild().eval()).run(pictures(), lambda node, inputs, output: seen.update(
        {node.name: ([i.clone() for i in inputs], output.clone(), node.op)}))
    adds = [(inputs, output) for inputs, output, op in seen.values() if op == "add"]
    assert len(adds) == 3 and all(torch.equal(a + b, output) for (a, b), output in adds)
    relus = [(inputs, output) for inputs, output, op in seen.values() if op == "relu"]
    assert len(relus) == 5 and all(torch.equal(x.clamp_min(0), output) for (x,), output in relus)
    assert sum(bool((x < 0).any()) for (x,), _ in relus) == 3  # the other two read what is rectified already


def test_names_and_edges(tiny):
    graph = trace(tiny.net())
    assert graph.edges() == ["conv1", "conv2", "add:0", "add:1", "conv3", "pool2", "fc"]
    assert " ".join(node.op for node in graph) == ("input conv bn relu conv bn add relu maxpool conv bn relu avgpool "
                                                   "flatten identity linear")
    assert graph.nodes["add"].inputs == ("bn2", "relu1") and graph.output == "fc"
    assert [node.name for node in graph.consumers("relu1")] == ["conv2", "add"]
    assert graph.norm_after("conv2") == "bn2" and graph.norm_after("fc") is None
    assert graph.accumulator_edges() == {"add:0": "conv2"}


def test_an_add_takes_accumulators_only_from_a_layer_that_nobody_else_reads():
    def edges(run):
        layers = {"a": nn.Conv2d(3, 3, 1), "b": nn.Conv2d(3, 3, 1), "bn": nn.BatchNorm2d(3), "no": nn.Identity()}
        return trace(Made(run, **layers)).accumulator_edges()

    assert edges(lambda m, x: m.a(x) + m.b(x)) == {"add:0": "a"}
    assert edges(lambda m, x: x + m.bn(m.b(x))) == {"add:1": "b"}
    assert edges(lambda m, x: x + m.no(m.bn(m.b(x)))) == {"add:1": "b"}
    assert edges(lambda m, x: x + m.bn(m.no(m.b(x)))) == {}  # this batch norm does not follow its conv directly
    assert edges(lambda m, x: x + m.b(x).relu()) == {}
    assert edges(lambda m, x: (lambda y: y + m.bn(y))(m.a(x))) == {}


def test_a_name_is_never_used_twice():
    layers = {"x": conv(), "relu": nn.ReLU(), "relu_1": conv()}
    twins = Made(lambda m, x: m.relu_1(m.relu(m.x(torch.relu(m.relu(torch.relu(x)))))), **layers)
    graph = trace(twins)
    x = pictures() - 1
    assert len(graph.nodes) == 7 and torch.equal(graph.run(x), twins(x))
    assert graph.nodes["x"].module is twins.x and graph.nodes["relu_1"].module is twins.relu_1


def conv():
    return nn.Conv2d(3, 3, 1)


def summed_into_its_input(a, b, x):
    y = z = a(x)
    z += x
    return b(y) + z


def changed_under_a_view(a, x):
    y = a(x)
    part = y[:, :2]
    y += x
    return part.sum(1) + y.sum(1)


BARRIERS = {  # run, layers, which barrier has which module
    "function": (lambda m, x: F.gelu(x).cumsum(1), {}),
    "layer": (lambda m, x: m.a(x), {"a": nn.PReLU()}),
    "subclass that computes something else": (lambda m, x: m.a(x), {"a": Doubled(3, 3, 1)}),
    "twice": (lambda m, x: m.a(m.a(x)), {"a": conv()}),
    "twice without weights": (lambda m, x: m.a(m.a(x)), {"a": nn.BatchNorm2d(3)}),
    "parameter": (lambda m, x: x + m.p, {"p": nn.Parameter(torch.ones(1))}),
    "constant": (lambda m, x: x + 1, {}),
    "scaled add": (lambda m, x: torch.add(x, x, alpha=2), {}),
    "keyword": (lambda m, x: m.a(input=x), {"a": conv()}),
    "in place": (lambda m, x: m.r(m.a(x)), {"a": conv(), "r": Made(lambda m, y: m.r(y) + y, r=nn.ReLU(True))}),
    "in place function": (lambda m, x: F.relu(m.a(x) * 1, True) + x, {"a": conv()}),
    "in place under another name": (lambda m, x: (lambda y: m.r(m.d(y)) + y)(m.a(x)),
                                    {"a": conv(), "r": nn.ReLU(True), "d": nn.Dropout()}),
    "in place sum": (lambda m, x: summed_into_its_input(m.a, m.b, x), {"a": conv(), "b": conv()}),
    "tensor by keyword": (lambda m, x: torch.flatten(input=x, start_dim=1), {}),
    "statistics": (lambda m, x: m.bn(x), {"bn": nn.BatchNorm2d(3, track_running_stats=False)}),
    "branch": (lambda m, x: x if x.sum() > 0 else -x, {}),
}


@pytest.mark.parametrize("case", BARRIERS)
def test_what_is_not_known_computes_as_it_does(case):
    run, layers = BARRIERS[case]
    model, x = Made(run, **layers).eval(), pictures()
    with torch.no_grad():
        assert torch.equal(trace(model).run(x.clone()), model(x.clone()))


def test_a_layer_that_is_called_twice_is_no_layer_of_the_integer_kernels():
    graph = trace(Made(lambda m, x: m.b(m.a(m.a(x))), a=conv(), b=conv()))
    assert [node.name for node in graph.layers()] == ["b"] and [node.op for node in graph][1:3] == ["barrier"] * 2


def test_a_module_that_cannot_be_traced_is_one_barrier_and_named():
    class Odd(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    odd = Odd()
    graph = trace(nn.Sequential(conv(), odd, conv()))
    assert [node.op for node in graph] == ["input", "conv", "barrier", "conv"] and graph.nodes["1"].module is odd
    assert "1: Odd, symbolically traced" in graph.why_opaque() and "\n" not in graph.why_opaque()
    alone = trace(odd)
    assert [node.op for node in alone] == ["input", "barrier"] and "the network: Odd" in alone.why_opaque()
    assert graph.why_opaque().endswith("; apart from that, ") and alone.why_opaque().endswith("; so ")
    assert trace(conv()).why_opaque() == ""


class Branching(nn.Module):
    """What torch.fx cannot follow as a whole: a condition on values."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b, self.f = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x):
        h = self.norm(self.a(x)).relu()
        if h.sum() > 0:
            h = 2 * h
        return self.f(self.b(h).relu().mean((2, 3)))


@pytest.mark.parametrize("name, budget, settings", [
    ("udfc", {"channel_density": 0.5}, {}), ("neuron_merging", {"channel_density": 0.5}, {}),
    ("df_mpc", {"bits": 6}, {}), ("sequential_reconstruction", {"channel_density": 0.5}, {}),
    ("udfc", {"bits": 4}, {"batchnorm": "noise"}), ("sparq", {}, {}), ("iterative_sensitivity", {}, {}),
    ("bayesian_bits", {}, {}), ("width_search", {"mac_ratio": 0.5, "bits": 8}, {"recipe": None})])
def test_the_true_reason_leads_where_a_network_cannot_be_followed(name, budget, settings):
    method, batches = find_method(name), [(torch.rand(8, 3, 8, 8), torch.arange(8) % 4)] * 2
    with pytest.raises(CompressError) as caught:
        method.compress(Branching(), Task.from_loader(batches, batches), Budget(**budget), method.Config(**settings),
                        torch.Generator())
    said = str(caught.value)
    assert said.startswith("torch.fx cannot look into the network: Branching, symbolically traced variables")
    assert "; so " in said and "\n" not in said


def test_outputs_of_any_structure():
    model, x = Made(lambda m, x: {"out": (m.a(x), [x.relu()]), "size": x.shape[2]}, a=conv()), pictures()
    got, want = trace(model).run(x), model(x)
    assert torch.equal(got["out"][0], want["out"][0]) and torch.equal(got["out"][1][0], want["out"][1][0])
    assert got["size"] == 8


def test_refused_in_one_line():
    class Two(nn.Module):
        def forward(self, x, y):
            return x + y

    view = Made(lambda m, x: changed_under_a_view(m.a, x), a=conv())
    for model, message in ((Two(), "one input tensor here; forward of Two takes x, y"),
                           (view, "reads a part of a tensor that 'add' has changed in place")):
        with pytest.raises(GraphError, match=message) as caught:
            trace(model)
        assert "\n" not in str(caught.value)


def test_training_flags_are_left_as_they_were():
    model = nn.Sequential(conv(), nn.BatchNorm2d(3), nn.Dropout()).train()
    model[1].eval()
    trace(model)
    assert [module.training for module in model] == [True, False, True]
