"""Dead units: the small network gives the outputs of the masked one, and nothing is left that could go."""

import pytest
import torch
from torch import nn

from methods.core.artifact import ActivationQuantizer, Affine, Codebook, CompressedTensor, Levels, Topology, Window
from methods.core.errors import CompressError
from methods.core.file.storage import from_bytes, to_bytes
from methods.core.fit.calibrate import calibrate
from methods.core.graph.build import apply, assemble, weight_layers
from methods.core.graph.graph import trace
from methods.core.graph.live import live_positions
from methods.core.graph.shrink import shrink
from methods.engine.exact import IntegerNetwork
from methods.engine.layers import layer_macs


def conv(into, out, size=3, **options):
    return nn.Conv2d(into, out, size, padding=size // 2, **options)


def norm_relu(channels):
    return nn.BatchNorm2d(channels), nn.ReLU()


class Residual(nn.Module):
    """A sum of two branches, read twice."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn1 = conv(3, 12, bias=False), nn.BatchNorm2d(12)
        self.a, self.bn2 = conv(12, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.b, self.short = conv(12, 10), conv(12, 10, 1)
        self.relu, self.pool, self.fc = nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Linear(10, 4)

    def forward(self, x):
        x = self.relu(self.bn1(self.stem(x)))
        x = self.relu(self.bn2(self.a(x)) + x)
        x = self.relu(self.b(x)) + self.short(x)
        return self.fc(torch.flatten(self.pool(x), 1))


class Mobile(nn.Module):
    """Depthwise, a multiplier of two, and three groups."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(conv(3, 12), *norm_relu(12), conv(12, 12, groups=12, bias=False), *norm_relu(12),
                                  conv(12, 9, 1), nn.ReLU(), conv(9, 18, groups=9), nn.ReLU(),
                                  conv(18, 12, 1, groups=3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                                  nn.Linear(12 * 16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x):
        return self.body(x)


class Dense(nn.Module):
    """Concatenations, as in DenseNet."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(3, 6), conv(6, 5, 1), conv(11, 7, 1)
        self.relu, self.pool, self.fc = nn.ReLU(), nn.AvgPool2d(2), nn.Linear(18 * 16, 4)

    def forward(self, x):
        x = self.relu(self.a(x))
        x = torch.cat([x, self.relu(self.b(x))], 1)
        x = torch.cat([x, self.relu(self.c(x))], 1)
        x = self.pool(x)
        return self.fc(x.view(x.size(0), -1))


def chain(*between):
    """LeNet-like; no padding, so every constant can go."""
    return nn.Sequential(nn.Conv2d(3, 6, 3), *between, nn.MaxPool2d(2), nn.Conv2d(6, 8, 2), *between, nn.Flatten(),
                         nn.Linear(32, 20), *between, nn.Linear(20, 4))


NETWORKS = {
    "residual": Residual, "mobile": Mobile, "dense": Dense, "lenet": lambda: chain(nn.ReLU()),
    "vgg": lambda: nn.Sequential(conv(3, 8), *norm_relu(8), conv(8, 8), *norm_relu(8), nn.MaxPool2d(2), conv(8, 12),
                                 *norm_relu(12), nn.Flatten(), nn.Linear(192, 16), nn.BatchNorm1d(16), nn.ReLU(),
                                 nn.Dropout(), nn.Linear(16, 4)),
    "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 20), nn.Tanh(), nn.Linear(20, 12), nn.Hardtanh(),
                                 nn.Linear(12, 4)),
}


def made(name, density, seed=0):
    """A random network under random masks, whole rows and columns of which are empty, as compressed model."""
    torch.manual_seed(seed)
    return pruned(NETWORKS[name](), density)


def pruned(model, density):
    model.eval()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
        elif getattr(module, "bias", None) is not None:
            nn.init.normal_(module.bias)
    return model, assemble(model, {layer: coded(module.weight, density, i)
                                   for i, (layer, module) in enumerate(weight_layers(model).items())})


def coded(weight, density, kind=0):
    """A weight on one of the three kinds of grid."""
    shape, out = weight.shape, weight.shape[0]
    mask = torch.rand(shape) < density
    mask[torch.rand(out) < 0.3] = False
    mask[:, torch.rand(shape[1]) < 0.3] = False
    if out == 4:
        mask[:, -1] = True
    scale = torch.rand(out) / shape[1:].numel() ** 0.5 + 0.05
    if kind % 3 == 0:
        grid = Affine(scale, torch.arange(out, dtype=torch.int32) % 3)
        return CompressedTensor.of(torch.randint(-8, 8, shape), grid, 4, mask)
    if kind % 3 == 1:
        return CompressedTensor.of(torch.randint(0, 4, shape), Levels(scale, torch.tensor([-3, -1, 1, 3]).int()), 2,
                                   mask)
    return CompressedTensor.of(torch.randint(0, 16, shape), Codebook(torch.randn(16) * scale[0]), 4, mask)


def batch(count=8):
    return torch.randn(count, 3, 8, 8)


@torch.no_grad()
def assert_same_outputs(compressed, small, model, x):
    want, found = apply(compressed, model)(x), apply(small, model)(x)
    assert torch.allclose(found, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("density", [0.03, 0.3])
def test_the_small_network_gives_the_outputs_of_the_masked_one(name, density):
    for seed in range(3):
        model, compressed = made(name, density, seed)
        before = to_bytes(compressed)[0]
        small = shrink(compressed, model)
        assert_same_outputs(compressed, small, model, batch())
        assert to_bytes(compressed)[0] == before
        assert small.topology.widths
        assert sum(layer_macs(apply(small, model), (3, 8, 8)).values()) < sum(layer_macs(model, (3, 8, 8)).values())
        data = to_bytes(small)[0]
        assert len(data) < len(before)
        assert_same_outputs(compressed, from_bytes(data), model, batch())
        again = shrink(small, model)  # nothing is left to do, and widths stay known
        assert again.topology == small.topology
        assert all(torch.equal(t.codes, again.weights[n].codes) for n, t in small.weights.items())


def effects(model, layer, x):
    """(bool [C]: the channel's value matters to an output, bool [C]: it is one number everywhere), by changing it."""
    module, seen = model.get_submodule(layer), {}

    def hook(channel):
        def change(_, __, y):
            seen["y"] = y
            if channel is not None:
                y = y.clone()
                y[:, channel] = 9 * torch.randn_like(y[:, channel])
            return y
        return change

    def run(channel):
        handle = module.register_forward_hook(hook(channel))
        out = model(x)
        handle.remove()
        return out

    plain, channels = run(None), module.weight.shape[0]
    values = seen["y"].transpose(0, 1).reshape(channels, -1)
    constant = (values - values[:, :1]).abs().amax(1) < 1e-6
    return torch.stack([(run(c) != plain).any() for c in range(channels)]), constant


@torch.no_grad()
@pytest.mark.parametrize("name", ["lenet", "mlp"])
def test_what_stays_in_a_chain_is_what_matters_and_varies(name):
    """The definition by brute force: no padding, so every constant can go."""
    for seed in range(3):
        model, compressed = made(name, 0.05, seed)
        masked, small = apply(compressed, model), shrink(compressed, model)
        for layer in list(compressed.weights)[:-1]:
            matters, constant = effects(masked, layer, batch(64))
            kept = int((matters & ~constant).sum())
            assert small.weights[layer].codes.shape[0] == max(kept, 1), layer


@torch.no_grad()
@pytest.mark.parametrize("name", ["residual", "mobile", "dense", "vgg"])
def test_what_matters_and_varies_stays(name):
    model, compressed = made(name, 0.04)
    masked, small = apply(compressed, model), shrink(compressed, model)
    for layer in compressed.weights:
        matters, constant = effects(masked, layer, batch(4))
        assert small.weights[layer].codes.shape[0] >= int((matters & ~constant).sum()), layer


@pytest.mark.parametrize("name", [*NETWORKS, "linear chain"])
def test_live_positions_are_those_with_a_gradient(name):
    """A weight, kept or pruned, is worth its bits where an output changes with it; no constant but 0 is around."""
    model, compressed = made(name, 0.2) if name != "linear chain" else pruned(chain(), 0.2)
    masked, masks = apply(compressed, model), {layer: t.mask for layer, t in compressed.weights.items()}
    for module in [*masked.modules(), *model.modules()]:
        for shift in ("bias", "running_mean"):
            if getattr(module, shift, None) is not None:
                getattr(module, shift).data.zero_()
    masked(batch(256)).square().sum().backward()
    found = live_positions(trace(model), masks)
    assert any(not positions.all() for positions in found.values())
    for layer, positions in live_positions(trace(masked)).items():
        gradient = masked.get_submodule(layer).weight.grad != 0
        assert torch.equal(positions, found[layer]) and not (gradient & ~positions).any(), layer
        assert name != "linear chain" or torch.equal(gradient, positions), layer


@torch.no_grad()
def test_constants_pass_only_where_padding_cannot_show_them():
    for padding, widths in ((0, {"0": (1, 2), "2": (2, 1)}), (1, {})):
        model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3, padding=padding)).eval()
        model[0].weight[0], model[0].bias[0] = 0, 0.75
        small = shrink(assemble(model, {}), model)
        assert dict(small.topology.widths) == widths
        assert_same_outputs(assemble(model, {}), small, model, torch.randn(2, 2, 9, 9))
    model[0].bias[0] = -0.75  # after the ReLU it is 0, and so is the padding
    assert dict(shrink(assemble(model, {}), model).topology.widths) == {"0": (1, 2), "2": (2, 1)}


@torch.no_grad()
def test_a_layer_without_bias_gives_its_constant_to_the_batch_norm_behind_it():
    for norm in (nn.BatchNorm2d(3), nn.Identity()):
        model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 3, 1, bias=False), norm).eval()
        model[0].weight[0], model[0].bias[0] = 0, 0.75
        small = shrink(assemble(model, {}), model)
        assert bool(small.topology.widths) == isinstance(norm, nn.BatchNorm2d)
        assert_same_outputs(assemble(model, {}), small, model, torch.randn(2, 2, 4, 4))


@torch.no_grad()
@pytest.mark.parametrize("name", ["lenet", "residual", "mobile"])
def test_the_integer_network_of_a_method_gives_the_same_outputs(name):
    for seed in range(3):
        model = made(name, 0.1, seed)[0]
        weights = {layer: coded(module.weight, 0.1, i % 2) for i, (layer, module) in
                   enumerate(weight_layers(model).items())}  # codebooks are rounded once more to be integers
        ranges = calibrate(apply(assemble(model, weights), model), batch(32), 4, "minmax")
        with_ranges = assemble(model, weights, activations=ranges)
        small, x = shrink(with_ranges, model), batch(16)
        assert small.topology.widths and dict(small.activations) == ranges
        want, found = IntegerNetwork(with_ranges, model)(x), IntegerNetwork(small, model)(x)
        assert torch.allclose(want, found, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


@torch.no_grad()
def test_a_constant_is_taken_as_its_reader_reads_it():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).eval()
    model[0].weight[0], model[0].bias[0] = 0, 0.6
    ranges = {"0": ActivationQuantizer(0.1), "1": ActivationQuantizer(0.25)}
    small = shrink(assemble(model, {}, activations=ranges), model)  # 0.6 is read as 2 x 0.25
    assert torch.allclose(small.rest["1.bias"], model[1].bias + 0.5 * model[1].weight[:, 0])
    small = shrink(assemble(model, {}, activations=ranges, ranges_by="harness"), model)
    assert torch.allclose(small.rest["1.bias"], model[1].bias + 0.6 * model[1].weight[:, 0])
    model[0].bias[0] = 0.625  # in the middle of two codes
    assert not shrink(assemble(model, {}, activations=ranges), model).topology.widths


@torch.no_grad()
def test_channels_that_a_window_pairs_stay():
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    model[0].weight[0], model[0].bias[0], model[2].weight[1], model[2].bias[1] = 0, 0, 0, 0
    ranges = {name: ActivationQuantizer(0.1) for name in ("0", "2", "4")}
    small = shrink(assemble(model, {}, activations=ranges, windows={"2": Window(4, (0, 1))}), model)
    assert dict(small.topology.widths) == {"2": (3, 4), "4": (2, 3)}


@torch.no_grad()
def test_a_network_in_which_nothing_varies_keeps_one_channel_of_each_layer():
    model = NETWORKS["residual"]().eval()
    for layer in weight_layers(model).values():
        layer.weight.zero_()
    small = shrink(assemble(model, {}), model)
    assert_same_outputs(assemble(model, {}), small, model, batch())
    assert small.rest["fc.weight"].shape == (4, 1) and small.rest["stem.weight"].shape == (1, 3, 3, 3)


def test_a_convolution_loses_whole_groups():
    model = nn.Sequential(nn.Conv2d(2, 6, 1), nn.Conv2d(6, 6, 1, groups=3))
    for widths, fault in (((3, 3), "its groups have 2 and 2"), ((4, 2), "its groups"), ((0, 0), "it has 6 and 6"),
                          ((8, 6), "it has 6 and 6"), ((2, -1), "it has 6 and 6"), ((2**62, 2), "it has 6 and 6")):
        with pytest.raises(CompressError, match=fault):
            apply(assemble(model, {}, topology=Topology(widths={"1": widths})), model)


def test_unused_values_of_a_codebook_go():
    grid = Codebook(torch.tensor([0.5, 0.0, 0.25, -1.0]))
    model = nn.Sequential(nn.Linear(2, 2))
    t = CompressedTensor.of(torch.tensor([[3, 1], [0, 1]]), grid, 2)
    small = shrink(assemble(model, {"0": t}), model).weights["0"]
    assert torch.equal(small.decode(), t.decode()) and small.grid.values.tolist() == [0.5, 0.0, -1.0]
