"""The traced graph computes what the module computes, and refuses what it does not know in one line."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from methods.core.errors import GraphError
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


def summed_into_its_input(a, b, x):
    y = z = a(x)
    z += x
    return b(y) + z


def conv():
    return nn.Conv2d(3, 3, 1)


REFUSED = {
    "operation": (lambda m, x: x.view(5, -1), {}, r"'view'.*known are: adaptive_avg_pool2d, add"),
    "function": (lambda m, x: F.gelu(x), {}, "gelu"),
    "layer": (lambda m, x: m.a(x), {"a": nn.PReLU()}, r"'a' is a PReLU; known are: AdaptiveAvgPool2d"),
    "subclass": (lambda m, x: m.a(x), {"a": type("Mine", (nn.Conv2d,), {"__module__": "torch.nn"})(3, 3, 1)}, "Mine"),
    "twice": (lambda m, x: m.a(m.a(x)), {"a": conv()}, "'a' is called more than once"),
    "twice without weights": (lambda m, x: m.a(m.a(x)), {"a": nn.BatchNorm2d(3, affine=False)}, "more than once"),
    "alias": (lambda m, x: m.b(m.a(x)), dict.fromkeys("ab", conv()), "'a' is called more than once"),
    "tuple": (lambda m, x: (m.a(x), x), {"a": conv()}, "single tensor"),
    "dict": (lambda m, x: {"out": m.a(x)}, {"a": conv()}, "single tensor"),
    "parameter": (lambda m, x: x + m.p, {"p": nn.Parameter(torch.zeros(1))}, "'p' is used outside"),
    "constant": (lambda m, x: x + 1, {}, "not an activation"),
    "scaled add": (lambda m, x: torch.add(x, x, alpha=2), {}, "scales it"),
    "keyword": (lambda m, x: m.a(input=x), {"a": conv()}, "'a' must be called with one tensor"),
    "branch": (lambda m, x: x if x.sum() > 0 else -x, {}, "cannot trace Made: symbolically traced variables"),
    "in place": (lambda m, x: m.r(m.a(x)), {"a": conv(), "r": Made(lambda m, y: m.r(y) + y, r=nn.ReLU(True))},
                 "'r.r' changes a tensor in place that 'add' reads later"),
    "in place function": (lambda m, x: F.relu(x, True) + x, {}, "'relu' changes"),
    "in place under another name": (lambda m, x: m.r(m.d(x)) + x, {"r": nn.ReLU(True), "d": nn.Dropout()},
                                    "'r' changes a tensor in place that 'add' reads later"),
    "in place sum": (lambda m, x: summed_into_its_input(m.a, m.b, x), {"a": conv(), "b": conv()},
                     "'add' changes a tensor in place that 'b' reads later: .* x = x [+] y"),
    "tensor by keyword": (lambda m, x: torch.flatten(input=x, start_dim=1), {}, "'flatten' takes a tensor by keyword"),
    "statistics": (lambda m, x: m.bn(x), {"bn": nn.BatchNorm2d(3, track_running_stats=False)}, "running statistics"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case):
    run, layers, message = REFUSED[case]
    with pytest.raises(GraphError, match=message) as caught:
        trace(Made(run, **layers))
    assert "\n" not in str(caught.value)


def test_an_error_without_a_message_and_two_inputs_are_refused_too():
    class Silent(nn.Module):
        def forward(self, x):
            raise AssertionError

    class Two(nn.Module):
        def forward(self, x, y):
            return x + y

    for model, message in ((Silent(), "AssertionError"), (Two(), "one input")):
        with pytest.raises(GraphError, match=message):
            trace(model)
