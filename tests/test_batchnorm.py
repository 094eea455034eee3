"""Renewing batch norm: what must not change, what must be made good, and the closed form against sampling."""

import copy
import math

import pytest
import torch
from torch import nn

from benchmarks.settings import build
from methods import admm, annc, data_of, df_mpc, dfq, neuron_merging, udfc
from methods.core.budget import Budget
from methods.core.errors import CompressError, ConfigError
from methods.core.fit import batchnorm
from methods.core.fit.batchnorm import (
    carried_over,
    closed_form,
    input_moments,
    rectified_moments,
    renew,
    spread,
    statistics_on,
    tap_correlation,
)
from methods.core.fit.images import noise_images
from methods.core.graph.build import apply, assemble
from methods.core.graph.channels import find_pairs

NORMS = ("bn1", "bn2", "bn3")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def statistics_of(model):
    return {name: (model.get_submodule(name).running_mean, model.get_submodule(name).running_var) for name in NORMS}


def settled(tiny, inputs):
    """The tiny network with the statistics that it has on `inputs`."""
    model = tiny.model()
    for name, (mean, variance) in statistics_on(model, inputs).items():
        model.get_submodule(name).running_mean.copy_(mean)
        model.get_submodule(name).running_var.copy_(variance)
    return model


def chain(into, width, kernel):
    """conv - norm - ReLU - conv - norm."""
    layers = [nn.Conv2d(into, width, kernel), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 3, kernel)]
    return nn.Sequential(*layers, nn.BatchNorm2d(3)).eval()


def test_an_unchanged_network_keeps_its_statistics(tiny):
    model = tiny.model()
    found = carried_over(model, copy.deepcopy(model), noise_images(20, (3, 8, 8), seeded()), {})
    assert list(found) == list(NORMS)
    for name, (mean, variance) in statistics_of(model).items():
        assert torch.allclose(found[name][0], mean.double(), rtol=1e-10, atol=1e-10)
        assert torch.allclose(found[name][1], variance.double(), rtol=1e-10, atol=1e-10)
    model = chain(3, 6, 3)
    model[4].running_mean.copy_(torch.tensor([1.0, -2.0, 0.5]))
    closed = closed_form(model, copy.deepcopy(model), {})
    assert list(closed) == ["1", "4"]
    for name, (mean, variance) in closed.items():
        norm = model.get_submodule(name)
        assert torch.allclose(mean, norm.running_mean.double(), rtol=1e-10, atol=1e-8)
        assert torch.allclose(variance, norm.running_var.double(), rtol=1e-10)


def test_scaled_and_shifted_filters_are_made_good(tiny):
    """On inputs whose statistics the given network remembers, every affine change of an output is undone."""
    inputs = tiny.Batches(64, 5).inputs
    model = settled(tiny, inputs)
    student = copy.deepcopy(model)
    with torch.no_grad():
        student.conv1.weight.mul_(torch.linspace(0.5, 2, 8).reshape(-1, 1, 1, 1))
        student.conv2.weight.mul_(1.7)
        student.conv2.bias.add_(3.0)
        student.conv3.weight.mul_(0.6)
        assert not torch.allclose(student(inputs), model(inputs), atol=0.1)
        for name, (mean, variance) in carried_over(model, student, inputs, {}).items():
            student.get_submodule(name).running_mean.copy_(mean)
            student.get_submodule(name).running_var.copy_(variance)
        assert torch.allclose(student(inputs), model(inputs), atol=2e-3)  # eps does not scale along


def test_the_formula_of_one_norm():
    """mu' = mu + (m_s - m_t) sqrt(v / v_t), v' = v v_s / v_t with eps in every variance."""
    norm = nn.BatchNorm2d(2, eps=0.5)
    norm.running_mean.copy_(torch.tensor([1.0, 2.0]))
    norm.running_var.copy_(torch.tensor([3.5, 7.5]))  # v = 4, 8
    ours = torch.tensor([5.0, 5.0]).double(), torch.tensor([8.5, 3.0]).double()  # v_s = 9, 3.5
    theirs = torch.tensor([4.0, 4.0]).double(), torch.tensor([0.5, 0.0]).double()  # v_t = 1; a constant channel
    mean, variance = batchnorm.moved(norm, slice(None), ours, theirs)
    assert torch.allclose(mean, torch.tensor([1 + 2.0, 2 + math.sqrt(8 / 0.5)]).double())
    assert torch.allclose(variance, torch.tensor([4 * 9 / 1 - 0.5, 7.5]).double())


def test_removed_channels_without_effect_change_nothing(tiny):
    model = tiny.model()
    with torch.no_grad():
        model.fc.weight[:, [1, 4, 9]] = 0
    kept = torch.tensor([0, 2, 3, 5, 6, 7, 8, 10, 11])
    small = copy.deepcopy(model)
    small.conv3.weight = nn.Parameter(model.conv3.weight[kept])
    small.bn3 = nn.BatchNorm2d(9)
    small.bn3.load_state_dict({key: value[kept] if value.ndim else value for key, value in
                               model.bn3.state_dict().items()})
    small.fc.weight = nn.Parameter(model.fc.weight[:, kept])
    found = carried_over(model, small, tiny.Batches(16, 3).inputs, {"bn3": kept})
    assert torch.allclose(found["bn3"][0], model.bn3.running_mean[kept].double(), atol=1e-6)
    assert torch.allclose(found["bn3"][1], model.bn3.running_var[kept].double(), rtol=1e-5)


# --- closed form ----------------------------------------------------------------------------------------------


def test_moments_of_rectified_normals_against_sampling():
    beta, sigma = torch.tensor([0.3, -1.0, 2.0, 0.5]).double(), torch.tensor([1.0, 0.7, 1.5, 0.0]).double()
    rho = torch.tensor([[1, 0.6, -0.5, 0.2], [0.6, 1, 0.1, 0], [-0.5, 0.1, 1, 0], [0.2, 0, 0, 1]]).double()
    y = torch.randn(1_000_000, 4, dtype=torch.float64, generator=seeded()) @ torch.linalg.cholesky(rho).T
    x = (beta + sigma * y).relu()
    mean, covariance = rectified_moments(beta, sigma, rho)
    assert torch.allclose(mean, x.mean(0), atol=5e-3) and torch.allclose(covariance, x.T.cov(), atol=1e-2)
    assert mean[3] == 0.5 and bool((covariance[3] == 0).all())


def test_covariance_is_the_arc_cosine_kernel_without_a_bias():
    """E ReLU(a) ReLU(b) = (sqrt(1 - r^2) + r (pi - arccos r)) / (2 pi) for standard normals (Cho and Saul 2009)."""
    for r in (-0.7, 0.0, 0.4, 0.8):
        rho = torch.tensor([[1.0, r], [r, 1.0]]).double()
        mean, covariance = rectified_moments(torch.zeros(2).double(), torch.ones(2).double(), rho)
        product = (math.sqrt(1 - r * r) + r * (math.pi - math.acos(r))) / (2 * math.pi)
        assert abs(float(covariance[0, 1]) - (product - 1 / (2 * math.pi))) < 1e-5
        assert abs(float(mean[0]) - 1 / math.sqrt(2 * math.pi)) < 1e-12
        assert abs(float(covariance[0, 0]) - (0.5 - 1 / (2 * math.pi))) < 1e-12


def test_taps_and_spread_against_the_written_out_matrices():
    layer = nn.Conv2d(2, 3, (2, 3), dilation=(1, 2))
    points = [(y, 2 * x) for y in range(2) for x in range(3)]
    wanted = torch.tensor([[math.exp(-math.dist(a, b) / 3) for b in points] for a in points]).double()
    taps = tap_correlation(layer)
    assert torch.allclose(taps, wanted) and tap_correlation(nn.Linear(2, 2)).tolist() == [[1.0]]
    covariance = torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double()
    weight = layer.weight.detach().double()
    flat = weight.reshape(3, -1)
    full = torch.kron(covariance, taps)
    assert torch.allclose(spread(weight.flatten(2), covariance, taps), (flat @ full @ flat.T).diagonal())


def test_closed_form_on_a_layer_written_out():
    """1 x 1 convolutions: the inputs of the second are what sampling the first one's batch norm gives."""
    model = chain(4, 5, 1)
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1.0, -0.5, 0.8, 1.2, 0.3]))
        model[1].bias.copy_(torch.tensor([0.5, 0.2, -0.4, 0.0, 1.0]))
        kept = torch.tensor([0, 2, 4])
        small = chain(4, 3, 1)
        for i in (0, 1):
            small[i].load_state_dict({name: value[kept] if value.ndim else value
                                      for name, value in model[i].state_dict().items()})
    filters = model[0].weight.detach().double().flatten(1)
    z = torch.randn(400_000, 4, dtype=torch.float64, generator=seeded()) @ (filters / filters.norm(dim=1)[:, None]).T
    x = (model[1].weight.detach() * z + model[1].bias.detach()).relu()
    pair = find_pairs(model)[0]
    mean, covariance = input_moments(model, pair)
    assert torch.allclose(mean, x.mean(0), atol=1e-2) and torch.allclose(covariance, x.T.cov(), atol=1e-2)
    old = x @ model[3].weight.detach().double().flatten(1).T
    new = x[:, kept] @ small[3].weight.detach().double().flatten(1).T
    got = closed_form(model, small, {"1": kept})["4"]
    moved = (small[3].bias - model[3].bias).detach().double()
    assert torch.allclose(got[0], (new - old).mean(0) + moved, atol=2e-2)
    assert torch.allclose(got[1] + 1e-5, (1 + 1e-5) * new.var(0) / old.var(0), rtol=3e-2)


@torch.no_grad()
def test_closed_form_knows_other_filters_and_what_the_norm_makes_of_them():
    """1 x 1 convolutions, inputs of mean m: filters that shrank or grew, with parts at right angles to w and m, before
    a norm that was scaled, as s tilde and c do."""
    model, m = chain(4, 5, 1), torch.tensor([1.0, -2.0, 0.5, 1.5])
    model[1].weight.copy_(torch.tensor([1.0, -0.5, 0.8, 1.2, 0.3]))
    model[1].bias.copy_(torch.tensor([0.5, 0.2, -0.4, 0.0, 1.0]))
    filters = model[0].weight.flatten(1)
    model[1].running_mean.copy_(filters @ m + model[0].bias)
    model[1].running_var.copy_(filters.square().sum(1))
    small = copy.deepcopy(model)
    shares, scales = torch.tensor([0.5, 1.5, 1.0, 0.7, 0.9]), torch.tensor([2.0, 0.6, 1.0, 1.0, 1.3])
    for row, w in enumerate(filters):
        axes = torch.linalg.qr(torch.stack([w, m]).T, mode="complete").Q  # the last two are at right angles to both
        small[0].weight[row] = (shares[row] * w + 0.6 * w.norm() * axes[:, 2])[:, None, None]
    small[0].bias.add_(0.3)
    small[1].weight.mul_(scales)
    small[1].bias.mul_(scales)
    x = (m + torch.randn(300_000, 4, generator=seeded()))[:, :, None, None]
    found = closed_form(model, small, {})
    first = small[0](x)[:, :, 0, 0].double()
    assert torch.allclose(found["1"][0], first.mean(0), atol=2e-2)
    assert torch.allclose(found["1"][1], first.var(0), rtol=2e-2)
    small[1].running_mean.copy_(found["1"][0])
    small[1].running_var.copy_(found["1"][1])
    before, after = (net[3](net[:3](x))[:, :, 0, 0].double() for net in (model, small))
    assert torch.allclose(found["4"][0] - model[4].running_mean, after.mean(0) - before.mean(0), atol=2e-2)
    assert torch.allclose(found["4"][1] / model[4].running_var, after.var(0) / before.var(0), rtol=3e-2)


# --- data -------------------------------------------------------------------------------------------------------


def test_data_is_the_task_s_re_estimation(tiny):
    model, task = tiny.model(), tiny.task()
    inputs = task.training_inputs(60, seeded(3))
    found = renew(assemble(model, {}), model, "data", seeded(3), task=task, count=60).rest
    assert torch.allclose(found["bn1.running_mean"], model.conv1(inputs).mean((0, 2, 3)), atol=1e-5)
    assert not torch.allclose(found["bn3.running_var"], model.bn3.running_var, rtol=1e-2)


# --- the pass in every method that offers it ----------------------------------------------------------------------

METHODS = [(udfc, Budget(channel_density=0.5, bits=4)), (neuron_merging, Budget(channel_density=0.5)),
           (df_mpc, Budget(bits=6)), (dfq, Budget(bits=4))]


@pytest.mark.parametrize(("method", "budget"), METHODS, ids=lambda part: getattr(part, "__name__", ""))
def test_only_statistics_change(tiny, method, budget):
    model = tiny.model()
    made = {mode: method.compress(model, tiny.task() if mode == "data" else None, budget,
                                  method.Config(batchnorm=mode), seeded()) for mode in ("keep", "noise", "data")}
    needed = [data_of(method, method.Config(batchnorm=mode)) for mode in batchnorm.MODES]
    assert needed == ["none", "none", "none", "calibration"]
    for mode in ("noise", "data"):
        changed = {name for name, value in made[mode].rest.items() if not torch.equal(value, made["keep"].rest[name])}
        assert changed or (method is neuron_merging and mode == "noise")  # what it prunes here is read by no norm
        assert all("running_" in name or method is dfq for name in changed)
        assert apply(made[mode], model)(tiny.Batches(8, 1).inputs).isfinite().all()
    with pytest.raises(CompressError, match="needs a task"):
        method.compress(model, None, budget, method.Config(batchnorm="data"), seeded())
    with pytest.raises(CompressError, match="two convolutions in a row with a batch norm behind each"):
        method.compress(model, None, budget, method.Config(batchnorm="closed"), seeded())
    with pytest.raises(ConfigError, match="batchnorm = 'zero': allowed are keep, noise, closed, data"):
        method.Config(batchnorm="zero")


def test_noise_brings_a_pruned_network_nearer(tiny):
    """Half of the channels gone and nothing put in their place: what the norms see is set right again."""
    model = tiny.model()
    inputs = tiny.Batches(96, 7).inputs
    budget = Budget(channel_density=0.5, bits=3)

    def error(mode):
        config = udfc.Config(reconstruct=False, batchnorm=mode, image_size=8 if mode == "noise" else None)
        network = apply(udfc.compress(model, None, budget, config, seeded()), model)
        return float((network(inputs) - model(inputs)).detach().square().mean())

    assert error("noise") < 0.9 * error("keep")


def test_folded_norms_take_the_renewal_into_scales_and_biases(tiny):
    """At 16 bits there is nothing to make good; at 3 the float network is met more closely."""
    model, inputs = tiny.model(), tiny.Batches(96, 7).inputs

    def error(bits, mode):
        size = 8 if mode == "noise" else None
        config = dfq.Config(batchnorm=mode, image_size=size, activation_bits=None, correct=False)
        network = apply(dfq.compress(model, None, Budget(bits=bits), config, seeded()), model)
        return float((network(inputs) - model(inputs)).detach().square().mean().sqrt())

    assert error(16, "noise") < 2e-3
    assert error(3, "noise") < error(3, "keep")


def test_refusals(tiny):
    model = tiny.model()
    same = assemble(model, {})
    assert renew(same, model, "keep", seeded()) is same
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    with pytest.raises(CompressError, match="no batch norm left to renew"):
        renew(assemble(plain, {}), plain, "noise", seeded())


# --- methods that train, and then move weights ---------------------------------------------------------------


@pytest.mark.parametrize("method, budget, config", [
    (admm, {"density": 0.3, "bits": 2},
     {"prune_iterations": 0, "quantize_iterations": 0, "retrain": {"epochs": 1}, "fix_rounds": 0}),
    (annc, {"data_ratio": 0.02}, {"recipe": {"epochs": 1, "lr": 0.05}, "finetune": {"epochs": 1, "lr": 0.01}})])
def test_the_statistics_after_training_are_those_of_the_stored_weights(tiny, method, budget, config):
    """Mean and variance of what the decoded first convolution gives for training inputs: batch norm's definition."""
    def made(**more):
        found = build(method.Config, {**config, **more})
        return method.compress(model, tiny.task(), Budget(**budget), found, torch.Generator().manual_seed(0))

    model = tiny.model()
    kept, renewed = made(), made(batchnorm="data")
    assert all(torch.equal(tensor.decode(), renewed.weights[name].decode()) for name, tensor in kept.weights.items())
    inputs = torch.cat([x for x, _ in tiny.task().train.epoch(torch.Generator().manual_seed(1))])
    network = apply(renewed, model)
    with torch.no_grad():
        outputs = network.conv1(inputs).double()
    mean, variance = outputs.mean((0, 2, 3)), outputs.var((0, 2, 3))
    assert torch.allclose(network.bn1.running_mean.double(), mean, atol=0.02 * float(variance.max().sqrt()))
    assert torch.allclose(network.bn1.running_var.double(), variance, rtol=0.05)
    other = apply(kept, model).bn1
    assert not torch.allclose(other.running_var.double(), variance, rtol=0.05)
    assert method.quick(build(method.Config, {"batchnorm": "data"})).batchnorm == "keep"

