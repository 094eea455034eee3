"""Sequential reconstruction: the ridge regression against a solver, and what a refit must leave or make good."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import networks
from methods import sequential_reconstruction as method
from methods.core.budget import Budget
from methods.core.errors import BudgetError, CompressError, ConfigError
from methods.core.fit.batchnorm import statistics_on
from methods.core.fit.odd_levels import quantize_odd
from methods.core.graph.build import apply, weight_layers
from methods.core.graph.graph import trace
from methods.sequential_reconstruction import Config, Walk, in_order, ridge_regression

SMALL = Config(images=12, steps=3, image_size=8, ridge=0.1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def compress(model, config=SMALL, **budget):
    return method.compress(model, None, Budget(**budget), config, seeded())


@pytest.mark.parametrize("layer", [nn.Conv2d(2, 3, 3, stride=2, padding=1, dilation=1), nn.Conv2d(2, 3, (1, 2)),
                                   nn.Linear(5, 3)])
def test_ridge_regression_is_the_least_of_its_objective(layer):
    """|y - V x|^2 / n + lam |V - V0|^2, both centred: stacked rows, solved by numpy."""
    x = torch.randn(30, 2, 7, 6) + 1 if isinstance(layer, nn.Conv2d) else torch.randn(30, 5) + 1
    y = layer(x).detach() * 2 + torch.randn(layer(x).shape)
    start = layer.weight.detach().double().flatten(1).numpy()
    if isinstance(layer, nn.Conv2d):  # windows by moving a picture of one entry through the layer
        probe = nn.Conv2d(2, start.shape[1], layer.kernel_size, layer.stride, layer.padding, bias=False)
        probe.weight.data = torch.eye(start.shape[1]).reshape(start.shape[1], 2, *layer.kernel_size)
        windows = probe(x).detach().transpose(0, 1).flatten(1).double().numpy()
    else:
        windows = x.T.double().numpy()
    targets = y.transpose(0, 1).flatten(1).double().numpy()
    windows, targets = windows - windows.mean(1, keepdims=True), targets - targets.mean(1, keepdims=True)
    n = windows.shape[1]
    lam = 0.2 * (windows ** 2).sum(1).mean() / n
    matrix = np.concatenate([windows.T / np.sqrt(n), np.sqrt(lam) * np.eye(len(windows))])
    goal = np.concatenate([targets.T / np.sqrt(n), np.sqrt(lam) * start.T])
    wanted = np.linalg.lstsq(matrix, goal, rcond=None)[0].T
    got = ridge_regression(layer, x, y, 0.2).flatten(1).detach().numpy()
    assert np.abs(got - wanted).max() < 1e-5


def test_nothing_pruned_and_nothing_rounded_changes_nothing(tiny):
    model, images = tiny.model(), torch.randn(12, 3, 8, 8, generator=seeded())
    walk = Walk(model, copy.deepcopy(model), {}, {}, SMALL, 0.1, images)
    assert walk.over(12) < 1e-10 and walk.weights == {}
    for name, value in model.state_dict().items():
        assert torch.allclose(walk.student.state_dict()[name].double(), value.double(), atol=1e-4), name


def test_later_layers_make_good_what_the_first_did(tiny):
    """A first layer that is another linear image of the same space: the refit finds the way back."""
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)).eval()
    student = copy.deepcopy(model)
    with torch.no_grad():
        student[2].weight.mul_(0.3)
    images = torch.randn(40, 3, 4, 4, generator=seeded())
    walk = Walk(model, student, {}, {}, SMALL, 1e-6, images)
    assert walk.over(30) < 1e-6
    assert torch.allclose(walk.student[3].running_var, model[3].running_var, rtol=1e-3)


def test_running_statistics_say_what_the_batch_s_did(tiny):
    """Where the given network remembers the statistics of these very images, so does the student of its own."""
    model, images = tiny.model(), torch.randn(40, 3, 8, 8, generator=seeded())
    for name, (mean, variance) in statistics_on(model, images).items():
        model.get_submodule(name).running_mean.copy_(mean)
        model.get_submodule(name).running_var.copy_(variance)
    walk = Walk(model, copy.deepcopy(model), {}, dict.fromkeys(weight_layers(model), 2), SMALL, 0.1, images)
    walk.over(40)
    theirs, ours = walk.values["fc"]
    with torch.no_grad():
        assert torch.allclose(model(images), theirs, atol=1e-4)
        assert torch.allclose(walk.student(images), ours, atol=1e-3)
        assert not torch.allclose(ours, theirs, atol=1e-1)


def test_a_residual_block_takes_over_the_error_of_its_shortcut():
    """y = conv2(x) + conv1(x): conv2 can say all that conv1 no longer does."""

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.right, self.bn1 = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)
            self.left, self.bn2 = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.bn2(self.left(x)) + self.bn1(self.right(x))

    model = Sum().eval()
    with torch.no_grad():
        model.bn2.weight.copy_(torch.tensor([1.0, 0.5, 2.0, 0.0005]))
    assert [node.name for node in in_order(trace(model), {"left": "add:0"})] == ["right", "bn1", "left", "bn2", "add"]
    images = torch.randn(50, 3, 4, 4, generator=seeded())
    walk = Walk(model, copy.deepcopy(model), {}, {"right": 2}, SMALL, 1e-6, images)
    missing = []
    seen = walk.missing

    def missing_of(node, wanted):
        missing.append(seen(node, wanted))
        return missing[-1]

    walk.missing = missing_of
    walk.over(50)
    assert float(missing[0][:, :3].abs().max()) > 0.01 and bool((missing[0][:, 3] == 0).all())
    alone = Walk(model, copy.deepcopy(model), {}, {"right": 2}, SMALL, 1e-6, images)
    alone.takers = {}
    assert Walk(model, copy.deepcopy(model), {}, {"right": 2}, SMALL, 1e-6, images).over(50) < 0.75 * alone.over(50)


def test_what_is_stored_is_on_the_grid_of_eq3_and_classifier_keeps_its_mean(tiny):
    model = tiny.model()
    small = compress(model, channel_density=0.5, bits=3)
    for name, tensor in small.weights.items():
        again = quantize_odd(tensor.decode(), 3)
        assert torch.allclose(again.decode(), tensor.decode(), atol=1e-6) and tensor.grid.scale.ndim == 0, name
    assert set(small.weights) == set(weight_layers(model)) and small.topology.widths["conv3"] == (6, 8)
    network = apply(small, model)
    images = torch.randn(64, 3, 8, 8, generator=seeded(5))
    walk = Walk(model, copy.deepcopy(model), {}, {"fc": 2}, SMALL, 0.1, images)
    walk.over(64)
    features = []
    trace(model).run(images, lambda node, x, y: features.append(x[0]) if node.name == "fc" else None)
    assert network(images).isfinite().all() and not torch.equal(walk.student.fc.bias, model.fc.bias)


def test_the_ridge_of_least_block_error_is_taken(tiny):
    small = compress(tiny.model(), Config(images=12, steps=3, image_size=8), channel_density=0.5, bits=4)
    errors = small.notes["block_error"]
    assert list(errors) == [str(value) for value in method.RIDGES]
    assert errors[str(small.notes["ridge"])] == min(errors.values())


def test_it_is_nearer_than_its_starting_point(tiny):
    model, inputs = tiny.model(), tiny.Batches(96, 7).inputs
    config = Config(images=48, steps=20, image_size=8, ridge=0.1)

    def error(compressed):
        return float((apply(compressed, model)(inputs) - model(inputs)).detach().square().mean())

    from methods import udfc
    start = udfc.compress(model, None, Budget(channel_density=0.5, bits=3), udfc.Config(criterion="l2"), seeded())
    assert error(compress(model, config, channel_density=0.5, bits=3)) < 0.8 * error(start)


def test_refusals(tiny):
    model = tiny.model()
    for options, word in (({"ridge": 0.0}, "ridge = 0.0: allowed is a number above 0"), ({"images": 4}, "images = 4"),
                          ({"scheme": "even"}, "scheme = 'even'"), ({"steps": 0}, "steps = 0: allowed is 1 or more")):
        with pytest.raises(ConfigError, match=word):
            Config(**options)
    with pytest.raises(BudgetError, match="'channel_density' or 'bits'"):
        compress(model)
    with pytest.raises(CompressError, match="LeNet.* has no batch norm"):
        compress(networks.build("lenet5_caffe", 10, 1), Config(), bits=4)
    with pytest.raises(CompressError, match="does not run on square images of 1 pixels"):
        compress(networks.build("vgg16", 10, 3), Config(image_size=1), bits=4)


class Foreign(nn.Module):
    """What the table of operations partly knows: GELU, a gate, chunks, linear layers on positions, 1-d convolutions."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.gelu = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.GELU()
        self.depth, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.mix, self.along = nn.Linear(4, 6), nn.Conv1d(6, 6, 3, padding=1)
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        x = self.gelu(self.bn1(self.conv1(x)))
        x = x * torch.sigmoid(x.mean((2, 3), keepdim=True)) + self.bn2(self.depth(x))
        first, second = x.chunk(2, 1)
        x = self.mix((first + second).flatten(2).transpose(1, 2))
        return self.fc(self.along(x.transpose(1, 2)).mean(2))


def test_operations_of_other_networks():
    model = Foreign().eval()
    for bits in (12, 3):
        small = compress(model, bits=bits)
        assert set(small.weights) == set(weight_layers(model))
        inputs = torch.randn(8, 3, 8, 8, generator=seeded())
        with torch.no_grad():
            error = float((apply(small, model)(inputs) - model(inputs)).abs().max() / model(inputs).std())
        assert error < 0.05 if bits == 12 else 0.05 < error < 10
