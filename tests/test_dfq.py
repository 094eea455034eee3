"""DFQ: equalization changes no output, corrected biases leave no mean error, moments are those of the integrals."""

import math

import pytest
import scipy.integrate
import scipy.stats
import torch
from torch import nn

from benchmarks import networks
from methods import dfq
from methods.core.budget import Budget
from methods.core.errors import BudgetError, ConfigError
from methods.core.graph.build import apply, weight_layers
from methods.core.graph.channels import find_pairs
from methods.core.graph.fold import fold_batchnorm
from methods.core.graph.graph import trace
from methods.dfq import Config, Normal, absorb_biases, equalize, read_normal

KINDS = (nn.Conv2d, nn.Linear)


def filled(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm1d)):
            n = module.num_features
            module.weight.data = torch.randn(n, generator=generator)
            module.bias.data = torch.randn(n, generator=generator)
            module.running_mean = torch.randn(n, generator=generator)
            module.running_var = torch.rand(n, generator=generator) + 0.1
    return model.eval()


def chain():
    return filled(nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 5, 3, padding=1),
        nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 16, 7), nn.ReLU(), nn.Linear(7, 4)))


def prepared(model):
    folded, topology = fold_batchnorm(model)
    outputs = {layer: read_normal(model.get_submodule(norm)) for layer, norm in topology.folded.items()}
    return folded.double(), find_pairs(folded, KINDS), outputs


def row_ranges(weight):
    return torch.stack([row.abs().max() for row in weight])


def column_ranges(weight, n):
    return torch.stack([part.abs().max() for part in weight.chunk(n, 1)])


def compress(model, config=None, **budget):
    return dfq.compress(model, None, Budget(**budget), Config() if config is None else config, torch.Generator())


# --- equalization and absorption ---------------------------------------------------------------------------


def test_equalization_changes_no_output_and_makes_ranges_equal():
    folded, pairs, outputs = prepared(chain())
    assert len(pairs) == 3
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        before, firsts = folded(x), {name: folded[:1](x) for name in "0"}
        rounds = equalize(folded, pairs, outputs, Config())
        assert 1 < rounds < Config().rounds
        assert torch.allclose(folded(x), before, rtol=1e-10, atol=1e-10)
        assert not torch.allclose(folded[:1](x), firsts["0"])
    for pair in pairs:
        first, second = (folded.get_submodule(name).weight.detach() for name in (pair.first, pair.second))
        assert torch.allclose(row_ranges(first), column_ranges(second, len(first)), rtol=1e-4)
    again = {name: layer.weight.clone() for name, layer in weight_layers(folded).items()}
    assert equalize(folded, pairs, outputs, Config()) == 1
    for name, layer in weight_layers(folded).items():
        assert torch.allclose(layer.weight, again[name], rtol=1e-4)


def test_one_pair_meets_at_the_geometric_mean():
    model = filled(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3)))
    folded, pairs, outputs = prepared(model)
    folded.requires_grad_(False)
    first, second = folded[0].weight.clone(), folded[3].weight.clone()
    old, bias = outputs["0"], folded[0].bias.detach().clone()
    equalize(folded, pairs, outputs, Config())
    for i in range(6):
        r1, r2 = float(first[i].abs().max()), float(second[:, i].abs().max())
        assert float(folded[0].weight[i].abs().max()) == pytest.approx(math.sqrt(r1 * r2), rel=1e-12)
        assert float(folded[3].weight[:, i].abs().max()) == pytest.approx(math.sqrt(r1 * r2), rel=1e-12)
        s = math.sqrt(r1 * r2) / r2
        assert float(folded[0].bias[i]) == pytest.approx(float(bias[i]) / s)
        assert float(outputs["0"].mean[i]) == pytest.approx(float(old.mean[i]) / s)
        assert float(outputs["0"].std[i]) == pytest.approx(float(old.std[i]) / s)


def test_dead_channels_are_left_alone():
    folded, pairs, outputs = prepared(chain())
    with torch.no_grad():
        folded[0].weight[1], folded[4].weight[:, 2] = 0.0, 0.0
        kept = folded[0].weight[2].clone(), folded[4].weight[:, 1].clone()
        equalize(folded, pairs[:1], outputs, Config())
    assert torch.equal(folded[0].weight[2], kept[0]) and torch.equal(folded[4].weight[:, 1], kept[1])
    assert all(layer.weight.isfinite().all() for layer in weight_layers(folded).values())


def test_absorbed_biases():
    folded, pairs, outputs = prepared(chain())
    state = {name: value.clone() for name, value in folded.state_dict().items()}
    none = {name: Normal(3 * normal.std - 0.1, normal.std) for name, normal in outputs.items()}
    absorb_biases(folded, pairs, none)
    assert all(torch.equal(folded.state_dict()[name], state[name]) for name in state)
    c = torch.tensor([0.0, 0.5, 0.0, 1.5, 0.0, 0.25], dtype=torch.float64)
    high = {"0": Normal(3 * outputs["0"].std + c, outputs["0"].std)}
    x = 50 + torch.rand(1, 6, 4, 4, dtype=torch.float64)  # an input of the second layer, far above 0
    with torch.no_grad():
        before = folded[4](x)[:, :, 1:-1, 1:-1]
        absorb_biases(folded, pairs, high)
        after = folded[4](x - c[:, None, None])[:, :, 1:-1, 1:-1]
    assert torch.allclose(folded[0].bias, state["0.bias"] - c) and torch.allclose(before, after)
    assert torch.allclose(high["0"].mean, 3 * outputs["0"].std)


# --- expectations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta, gamma", [(0.0, 1.0), (1.3, 0.4), (-0.7, 2.0), (-3.0, 0.5), (5.0, 0.1)])
def test_moments_after_a_relu_are_the_integrals(beta, gamma):
    first, variance = Normal(*torch.tensor([[beta], [gamma]], dtype=torch.float64), True).moments()
    density = scipy.stats.norm(beta, gamma).pdf
    points = {"points": [0.0, beta], "limit": 200}
    low, high = min(0.0, beta - 12 * gamma), max(0.0, beta + 12 * gamma) + 1
    mean = scipy.integrate.quad(lambda x: max(x, 0) * density(x), low, high, **points)[0]
    second = scipy.integrate.quad(lambda x: max(x, 0) ** 2 * density(x), low, high, **points)[0]
    assert float(first) == pytest.approx(mean, abs=1e-9)
    assert float(variance) == pytest.approx(second - mean**2, abs=1e-8)


def test_moments_of_constants():
    normal = Normal(torch.tensor([2.0, -2.0, 0.0]).double(), torch.zeros(3).double(), True)
    assert [part.tolist() for part in normal.moments()] == [[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert normal.range(6.0) == (0.0, 2.0)
    assert Normal(torch.tensor([1.0, -1.0]).double(), torch.tensor([0.5, 1.0]).double()).range(6.0) == (-7.0, 5.0)


def test_the_corrected_mean_error_of_a_gaussian_is_zero():
    """conv -> BN -> ReLU -> conv at 2 bits, where the first output is exactly N(beta, gamma^2)."""
    model = filled(nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3)), seed=3)
    config = Config(equalize=False, absorb=False, activation_bits=None)
    corrected = compress(model, config, bits=2)
    plain = compress(model, Config(equalize=False, absorb=False, correct=False, activation_bits=None), bits=2)
    beta, gamma = model[1].bias.detach(), model[1].weight.detach()
    noise = torch.randn(20_000, 6, 3, 3, generator=torch.Generator().manual_seed(0))
    x = torch.relu(beta[:, None, None] + gamma[:, None, None] * noise)
    with torch.no_grad():
        wanted = model[3](x).mean((0, 2, 3))
        errors = [(apply(small, model)[3](x).mean((0, 2, 3)) - wanted).abs().max() for small in (corrected, plain)]
    assert errors[0] < 0.02 * errors[1] and errors[1] > 0.05


def test_sums_and_layers_without_norm_against_samples():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 5, 1), nn.Conv2d(3, 5, 1)
            self.na, self.nb = nn.BatchNorm2d(5), nn.BatchNorm2d(5)
            self.relu, self.c, self.d = nn.ReLU(), nn.Conv2d(5, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            return self.d(self.c(self.relu(self.na(self.a(x))) + self.nb(self.b(x))))

    model = filled(Block())
    folded, topology = fold_batchnorm(model)
    outputs = {layer: read_normal(model.get_submodule(norm)) for layer, norm in topology.folded.items()}
    graph = trace(folded)
    seen = dfq.Distributions(graph, outputs, {name: layer.weight.detach().double()
                                              for name, layer in weight_layers(folded).items()}).seen
    generator = torch.Generator().manual_seed(1)
    drawn = {layer: normal.mean + normal.std * torch.randn(200_000, 5, dtype=torch.float64, generator=generator)
             for layer, normal in outputs.items()}
    total = drawn["a"].clamp_min(0) + drawn["b"]
    through = total @ folded.c.weight.detach().double()[:, :, 0, 0].T + folded.c.bias.detach().double()
    for name, sample in (("add", total), ("c", through)):
        assert torch.allclose(seen[name].mean, sample.mean(0), atol=0.03)
        assert torch.allclose(seen[name].std, sample.std(0), rtol=0.02)


def test_batch_norm_that_cannot_be_folded_is_a_normal():
    """conv -> ReLU -> BN -> pool -> conv: the second conv reads N(beta, gamma^2), cut off nowhere."""
    model = filled(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.BatchNorm2d(6), nn.MaxPool2d(2), nn.Conv2d(6, 4, 1)))
    small = compress(model, Config(equalize=False, absorb=False), bits=8)
    read = small.activations["4"]
    low, high = read.decode(torch.tensor([float(code) for code in read.code_range])).tolist()
    beta, gamma = model[2].bias.detach(), model[2].weight.detach().abs()
    assert low == pytest.approx(float((beta - 6 * gamma).min()), abs=2 * read.scale)
    assert high == pytest.approx(float((beta + 6 * gamma).max()), abs=2 * read.scale)
    shift = (model[4].weight.detach() - small.weights["4"].decode())[:, :, 0, 0] @ beta
    assert torch.allclose(small.rest["4.bias"], model[4].bias.detach() + shift, atol=1e-5)


def test_a_pool_after_a_relu_reads_nothing_negative():
    model = filled(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 4, 1)))
    assert compress(model, bits=8).activations["4"].zero == 0


def test_a_sum_of_flattened_values():
    """[C] moments of channels beside [C H W] ones of a linear layer."""
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(16, 16)

        def forward(self, x):
            y = torch.flatten(torch.relu(self.bn(self.conv(x))), 1)
            return y + self.fc(y)

    graph = trace(filled(Block()))
    normal = Normal(torch.arange(4.0).double(), torch.ones(4).double())
    seen = dfq.Distributions(graph, {"conv": normal}, {"fc": torch.zeros(16, 16).double()}).seen
    folded = Normal(graph.nodes["bn"].module.bias.double(), graph.nodes["bn"].module.weight.double().abs(), True)
    assert torch.allclose(seen["add"].mean, folded.moments()[0].repeat_interleave(4) + seen["fc"].mean)
    assert torch.allclose(seen["add"].std, folded.moments()[1].repeat_interleave(4).sqrt())


def test_flattened_channels_own_their_columns():
    model = chain()
    folded, topology = fold_batchnorm(model)
    outputs = {layer: read_normal(model.get_submodule(norm)) for layer, norm in topology.folded.items()}
    weights = {name: layer.weight.detach().double() for name, layer in weight_layers(folded).items()}
    node = trace(folded).nodes["8"]
    mean = outputs["4"].moments()[0]
    wanted = weights["8"] @ torch.cat([mean[i].repeat(16) for i in range(5)])
    assert torch.allclose(dfq.respond(node, weights["8"], mean), wanted)
    grouped = nn.Conv2d(6, 4, 3, groups=2).double()
    constant = torch.randn(6, dtype=torch.float64)
    node = trace(nn.Sequential(grouped)).nodes["0"]
    with torch.no_grad():
        out = grouped(constant[None, :, None, None].expand(1, 6, 3, 3))[0, :, 0, 0] - grouped.bias
        assert torch.allclose(dfq.respond(node, grouped.weight, constant), out)


# --- the whole method --------------------------------------------------------------------------------------


def test_wide_codes_keep_the_function():
    model = chain()
    small = apply(compress(model, Config(absorb=False), bits=16), model)
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        assert torch.allclose(small(x), model(x), rtol=1e-3, atol=1e-3 * float(model(x).abs().max()))


def test_absorption_is_part_of_the_method():
    """The first bias moves by the mean less 3 deviations of its batch norm, the second takes what that leaves out."""
    model = filled(nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1)))
    model[1].bias.data, model[1].weight.data = torch.linspace(1, 6, 6), torch.full((6,), 0.5)
    with_, without = (compress(model, Config(equalize=False, absorb=absorb, correct=False), bits=16).rest
                      for absorb in (True, False))
    c = torch.tensor([0.0, 0.5, 1.5, 2.5, 3.5, 4.5])
    assert torch.allclose(without["0.bias"] - with_["0.bias"], c, atol=1e-5)
    assert torch.allclose(with_["3.bias"] - without["3.bias"], model[3].weight.detach()[:, :, 0, 0] @ c, atol=1e-5)


def test_equalization_helps_where_channels_differ():
    """Channels on scales of 1 to 10,000, one grid per tensor: the case of the paper, in small."""
    model = chain()
    with torch.no_grad():
        for layer, following in ((model[0], model[1]), (model[4], model[5])):
            scale = torch.logspace(0, 4, len(layer.weight))
            layer.weight *= scale.reshape(-1, 1, 1, 1)
            layer.bias *= scale
            following.running_mean *= scale
            following.weight *= scale
            following.running_var = (following.running_var + following.eps) - following.eps / scale**2
            following.bias *= scale
        for second, scale, span in ((model[4], torch.logspace(0, 4, 6), 1), (model[8], torch.logspace(0, 4, 5), 16)):
            columns = scale.repeat_interleave(span)
            second.weight /= columns.reshape(1, -1, *[1] * (second.weight.ndim - 2))
        x = torch.randn(8, 3, 8, 8)
        wanted = model(x)
        errors = [float((apply(compress(model, config, bits=8), model)(x) - wanted).norm() / wanted.norm())
                  for config in (Config(absorb=False, correct=False), Config(False, False, False))]
    assert errors[0] < 0.1 * errors[1]


def test_ranges_cover_every_edge_that_integers_read(tiny):
    model = tiny.model()
    small = compress(model, bits=8)
    graph = trace(apply(small, model))
    assert set(small.activations) == set(graph.edges()) - set(graph.accumulator_edges())
    assert small.ranges_by == "method" and all(q.bits == 8 for q in small.activations.values())
    assert small.activations["conv2"].zero == 0  # after a ReLU
    first = small.activations["conv1"]
    assert first.decode(torch.tensor([0.0, 255.0])).tolist() == pytest.approx([-6.0, 6.0], abs=0.05)
    assert set(small.topology.folded) == {"conv1", "conv2", "conv3"} and set(small.weights) == set(weight_layers(model))
    assert compress(model, Config(activation_bits=None), bits=8).activations == {}


def test_networks_without_pairs_and_names_of_networks():
    lenet = networks.build("lenet300", 10, 1).eval()
    assert compress(lenet, bits=8).notes["rounds"] >= 1
    alone = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
    assert apply(compress(alone, bits=4), alone)(torch.zeros(1, 4)).shape == (1, 2)


def test_errors():
    with pytest.raises(BudgetError, match="'bits'"):
        compress(chain())
    with pytest.raises(BudgetError, match="density"):
        compress(chain(), bits=8, density=0.5)
    with pytest.raises(ConfigError, match="allowed are symmetric, asymmetric"):
        compress(chain(), Config(scheme="cubic"), bits=8)
    for options in ({"sigmas": 0.0}, {"activation_bits": 17}, {"rounds": 0}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            Config(**options)


def test_no_data_no_forward_pass_no_randomness(monkeypatch, tiny):
    model = tiny.model()
    before, state, generator = tiny.fingerprint(model), torch.get_rng_state(), torch.Generator().manual_seed(7)
    drawn = generator.get_state()

    def fail(*_):
        raise AssertionError("a layer was run")

    for kind in (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.ReLU):
        monkeypatch.setattr(kind, "forward", fail)
    dfq.compress(model, None, Budget(bits=8), Config(), generator)
    assert torch.equal(generator.get_state(), drawn) and torch.equal(torch.get_rng_state(), state)
    assert tiny.same(tiny.fingerprint(model), before) and dfq.DATA == "none"
