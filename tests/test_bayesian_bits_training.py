"""Bayesian Bits as a whole: training, its settings, what is refused."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks.jobs import CONFIGS, prepare, read_table
from benchmarks.settings import build
from methods import bayesian_bits
from methods.bayesian_bits import Config, Phase
from methods.bayesian_bits.network import GatedNetwork, Point, Wiring, survey
from methods.core.budget import Budget
from methods.core.errors import ConfigError
from methods.core.file.storage import to_bytes
from methods.core.train.finetune import Recipe, train
from methods.core.train.recipe import Distill
from methods.core.train.task import First, Task

SHORT = Recipe(epochs=1, lr=1e-3, optimizer="adam", weight_decay=0.0, schedule="constant")


def one_point(kappa=1.0, channels=0, bits=None):
    """A network whose only quantized tensor is the weight of its one layer."""
    points = [Point("0", True, 1.0, True, kappa, channels, bits)]
    wiring = Wiring({"0": 6}, {"0": ("input_1", 1)}, {})
    return GatedNetwork(nn.Sequential(nn.Linear(2, 3)), points, wiring)


def test_dead_gates_feel_the_regulariser_alone():
    network = one_point(1.0, 3).train()
    with torch.no_grad():
        network.phi.copy_(torch.tensor([[6.0, -2.0, 6.0, 6.0]]))
    out = network(torch.randn(4, 2, generator=torch.Generator().manual_seed(0)))
    assert network.drawn[1] == [1] and network.drawn[0][0][1:].tolist() == [0, 0, 0]
    out.square().sum().backward()
    assert network.phi.grad[0, 1:].tolist() == [0, 0, 0] and network.phi2.grad.shape == (3,)
    network.dead_gates = False
    torch.manual_seed(0)
    assert any(network.draw()[1][0] > 1 for _ in range(200))  # without the rule it opens now and then


def test_learning_rates(tiny):
    """hold: constant for floor(2/3 E) epochs, then linear, of the weights alone."""
    recipe = Recipe(epochs=6, lr=1e-3, optimizer="adam", weight_decay=0.0, schedule="constant")
    points, wiring = survey(tiny.model(), tiny.Batches(8, 1).inputs)
    rates = []

    class Watching(Phase):
        def after_step(self, model, lr):
            super().after_step(model, lr)
            rates.append([group["lr"] for optimizer in self.all for group in optimizer.param_groups])

        def optimizers(self, model, recipe):
            self.all = super().optimizers(model, recipe)
            return self.all

    network = GatedNetwork(tiny.model(), points, wiring)
    config = Config(recipe=recipe, gate_lr=2e-3, range_lr=3e-3)
    train(network, tiny.task(), recipe, torch.Generator().manual_seed(0), hooks=Watching(config, second=False))
    by_epoch = rates[::4]
    assert [r[:2] for r in by_epoch] == [pytest.approx([1e-3 * f] * 2) for f in (1, 1, 1, 1, 1, 0.5)]
    assert all(r[2:] == [3e-3, 2e-3] for r in by_epoch) and rates[-1] == by_epoch[-1]


def run(tiny, **config):
    gates = {} if "bits" in config else {"init": (6.0, 6.0, -6.0, -6.0)}
    config = Config(**{"recipe": SHORT, "range_inputs": 48, **gates, **config})
    return bayesian_bits.compress(tiny.model(), tiny.task(), Budget(), config, torch.Generator().manual_seed(0))


def test_more_mu_fewer_bit_operations(tiny):
    """A strong price closes gates and prunes; without one nothing moves; notes say how it went."""
    recipe = replace(SHORT, epochs=4)
    cheap, dear = (run(tiny, mu=mu, recipe=recipe, gate_lr=0.8) for mu in (0.0, 0.3))
    assert cheap.notes["bops_percent"][-1] > 2 * dear.notes["bops_percent"][-1] and len(dear.notes["bops_percent"]) == 4
    assert set(dear.notes["weight_bits"].values()) <= {2, 4, 8} and min(dear.notes["weight_bits"].values()) == 2
    assert dear.notes["float_weights"] == [] and dear.topology.folded["conv2"] == "bn2"


def test_ablations(tiny):
    fast = {"gate_lr": 0.8, "mu": 0.3, "recipe": replace(SHORT, epochs=4)}
    pruned = run(tiny, bits=(4, 8), **fast)
    assert {t.bits for t in pruned.weights.values()} == {4} and set(pruned.notes["activation_bits"].values()) == {8}
    assert sum(pruned.notes["kept_channels"].values()) < 28
    quantized = run(tiny, prune=False, **fast)
    assert quantized.notes["kept_channels"] == {} and min(quantized.notes["weight_bits"].values()) < 8
    assert run(tiny, stochastic=False, init=(6, 6, -6, -6), **fast).notes["bops_percent"][-1] < 6.25
    full = run(tiny, init=(6.0,) * 4)
    assert full.weights == {} and len(full.notes["float_weights"]) == 4 and set(full.activations) == {"conv1"}


@pytest.mark.parametrize("learn", ["gates", "gates_ranges"])
def test_post_training_leaves_the_weights(tiny, learn):
    model, task = tiny.model(), tiny.task()
    network = GatedNetwork(model, *survey(model, task.calibration_inputs(48)), frozen_norms=True)
    before, beta = {k: v.clone() for k, v in network.network.state_dict().items()}, network.beta.detach().clone()
    config = Config(recipe=replace(SHORT, epochs=2), learn=learn, mu=0.1)
    task = replace(task, train=First(task.train, n=2))
    train(network, task, config.recipe, torch.Generator().manual_seed(0), hooks=Phase(config, second=False))
    after = network.network.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(network.beta, beta) is (learn == "gates") and (network.phi != 6.0).any()


@pytest.mark.parametrize("setting", [{"learn": "gates"}, {"learn": "gates_ranges"}, {"fast": True}])
def test_frozen_batch_norms_that_no_layer_is_in_front_of_stay_frozen(setting):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.Flatten(),
                          nn.Linear(128, 4))
    batches = [(5 * torch.rand(32, 1, 8, 8), torch.arange(32) % 4) for _ in range(4)]
    out = bayesian_bits.compress(model, Task.from_loader(batches, batches), Budget(),
                                 Config(recipe=replace(SHORT, epochs=2), **setting), torch.Generator().manual_seed(0))
    for name in ("2.running_mean", "2.running_var"):
        torch.testing.assert_close(out.rest[name], model.state_dict()[name])


def test_a_batch_norm_of_two_names_is_not_folded(tiny):
    """What is trained and what is stored see the same weight: that of the convolution as it is."""
    class Alias(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.fc = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Linear(288, 4)
            self.alias = self.bn

        def forward(self, x):
            return self.fc(torch.flatten(torch.relu(self.bn(self.conv(x))), 1))

    torch.manual_seed(0)
    model, inputs = Alias().eval(), torch.rand(16, 1, 8, 8)
    with torch.no_grad():
        model.bn.weight.uniform_(2, 4)
        network = GatedNetwork(model, *survey(model, inputs, prune=False, bits=(16, 16))).eval()
        torch.testing.assert_close(network(inputs), model(inputs), rtol=0.01, atol=0.01)
        assert torch.equal(network.folded_weights()["conv"], model.conv.weight)


def test_a_restarted_network_learns_from_the_one_that_was_given(tiny, monkeypatch):
    seen = []
    monkeypatch.setattr(bayesian_bits, "train", lambda model, task, *_, **__: seen.append(task.teacher))
    model = tiny.model()
    config = Config(recipe=replace(SHORT, distill=Distill()), scratch=True)
    bayesian_bits.compress(model, tiny.task(), Budget(), config, torch.Generator().manual_seed(0))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in seen[0].state_dict().items())
    assert not any(parameter.requires_grad for parameter in seen[0].parameters())


def test_post_training_without_training_batches_is_refused(tiny):
    task = replace(tiny.task(), train=None, calibration=tiny.task().train)
    with pytest.raises(ConfigError, match="holds no training batches"):
        bayesian_bits.compress(tiny.model(), task, Budget(), Config(subset=2), torch.Generator())


def test_a_layer_of_zeros_is_noted(tiny):
    """Its weights lie below half a step of 2 bits, all channels kept; and one of 32 bits without a kept channel."""
    model, config = tiny.model(), {"recipe": replace(SHORT, epochs=0), "range_inputs": 48, "prune": False}
    with torch.no_grad():
        model.conv2.weight.zero_()
    for bits in ((2, 8), (32, 8)):
        out = bayesian_bits.compress(model, tiny.task(), Budget(), Config(bits=bits, **config), torch.Generator())
        assert out.notes["empty_layers"] == ["conv2"] and set(out.notes["kept_channels"]) == set()


@pytest.mark.parametrize("option", [{"subset": 1}, {"fixed_range_lr": 0.3}, {"range_lr": 0.3}, {"gate_lr": 0.3}])
def test_every_setting_has_an_effect(tiny, option):
    plain = Config(recipe=SHORT, fixed=SHORT)
    one, same, other = (bayesian_bits.compress(tiny.model(), tiny.task(), Budget(), config, torch.Generator())
                        for config in (plain, plain, replace(plain, **option)))
    assert to_bytes(one)[0] == to_bytes(same)[0] != to_bytes(other)[0]


def test_fast_keeps_the_statistics(tiny):
    fast, slow = (run(tiny, fast=value, mu=0.0) for value in (True, False))
    assert to_bytes(fast)[0] != to_bytes(slow)[0]
    model, inputs = tiny.model(), tiny.Batches(24, 5).inputs
    network = GatedNetwork(model, *survey(model, inputs), frozen_norms=True).train()
    network(inputs)
    assert torch.equal(model.bn1.running_mean, tiny.model().bn1.running_mean)


def test_the_gates_optimizer_is_adam_with_its_usual_moments():
    """phi after five steps on the regulariser alone, by Adam's equations in float64: 0.9, 0.999, 1e-8."""
    network, config = one_point(0.7, 3), Config(recipe=SHORT, gate_lr=0.8, mu=0.3)
    phase = Phase(config, second=False)
    optimizers = phase.optimizers(network, config.recipe)
    phi = network.phi.detach().double().clone()
    m, v = torch.zeros_like(phi), torch.zeros_like(phi)
    for step in range(1, 6):
        for optimizer in optimizers:
            optimizer.zero_grad()
        phase.loss(network, network.beta.sum() * 0).backward()
        gradient = network.phi.grad.double()
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        phi = phi - 0.8 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.allclose(network.phi.detach().double(), phi, atol=1e-4) and float(phi.min()) < 3


def test_a_range_stays_positive_whatever_its_gradient(tiny):
    """A step of Adam that would take every range below 0 leaves it at the least range, and the network finite."""
    out = run(tiny, range_lr=50.0, mu=0.0, recipe=replace(SHORT, epochs=1))
    steps = [q.scale for q in out.activations.values()] + [float(t.grid.scale) for t in out.weights.values()]
    assert min(steps) > 0 and all(math.isfinite(step) for step in steps)
    network = GatedNetwork(*(tiny.model(), *survey(tiny.model(), tiny.Batches(24, 5).inputs)))
    with torch.no_grad():
        network.beta.fill_(-3.0)
    Phase(Config(), second=False).after_step(network, 0.1)
    assert float(network.beta.detach().min()) > 0


def test_what_is_stored_is_of_after_phase_2(tiny):
    """Ranges that phase 2 moved far: the steps of activations and weights are theirs, not those of before."""
    before, after = (run(tiny, bits=(8, 8), prune=False, fixed=fixed, **more)
                     for fixed, more in ((None, {}), (replace(SHORT, epochs=2), {"fixed_range_lr": 0.2})))
    moved = [edge for edge in ("conv2", "conv3", "fc")
             if abs(after.activations[edge].scale / before.activations[edge].scale - 1) > 0.05]
    assert moved and all(float(after.weights[name].grid.scale) != float(t.grid.scale)
                         for name, t in before.weights.items())


def test_phase_2_has_no_weight_decay_unless_it_is_given():
    for given, wanted in (({"epochs": 1, "lr": 1e-3}, 0.0), ({"epochs": 1, "lr": 1e-3, "weight_decay": 0.1}, 0.1)):
        assert build(Config, {"fixed": given}).fixed.weight_decay == wanted


def test_from_scratch_the_trained_weights_do_not_matter(tiny):
    model, other = tiny.model(), tiny.model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-3.0)
    config = Config(recipe=SHORT, range_inputs=48, scratch=True, mu=0.0, init=(6.0, 6.0, -6.0, -6.0))
    one, two, kept = (to_bytes(bayesian_bits.compress(m, tiny.task(), Budget(), c, torch.Generator().manual_seed(3)))[0]
                      for m, c in ((model, config), (other, config), (other, replace(config, scratch=False))))
    assert one == two != kept

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

    with pytest.raises(ConfigError, match=r"scratch = True: 1 \(Scaled\) has parameters and no reset"):
        bayesian_bits.restarted(nn.Sequential(nn.ReLU(), Scaled()), torch.Generator())


def test_it_trains_in_float32_unless_told_otherwise(tiny, monkeypatch):
    """An 8-bit grid has values that bfloat16 does not: under autocast a step of the grid moves by half a step."""
    seen = []
    monkeypatch.setattr(bayesian_bits, "train", lambda model, task, *_, **__: seen.append(task.autocast))
    for autocast in (False, True):
        task = replace(tiny.task(), autocast=torch.bfloat16)
        config = Config(recipe=SHORT, range_inputs=48, autocast=autocast)
        bayesian_bits.compress(tiny.model(), task, Budget(), config, torch.Generator())
    assert seen == [None, torch.bfloat16]
    code, step = torch.tensor(0.1) * 203, torch.tensor(0.1)
    assert abs(float(code.bfloat16()) - float(code)) > 0.3 * float(step)


@pytest.mark.parametrize("wrong, message", [
    ({"fixed_range_lr": 0.3}, "fixed_range_lr = 0.3 does nothing: there is no phase 2"),
    ({"bits": (8, 8), "dead_gates": False}, "dead_gates = False does nothing: bits are fixed"),
    ({"learn": "gates", "range_lr": 0.3}, "range_lr = 0.3 does nothing"),
    ({"bits": (8, 8), "prune": False, "mu": 0.1}, "mu = 0.1 does nothing: there are no gates"),
    ({"recipe": replace(SHORT, ema=0.9)}, "recipe.ema = 0.9: allowed is 0"),
    ({"learn": "gates", "scratch": True}, "scratch = True with learn = 'gates'"),
    ({"mu": -1.0}, "mu = -1.0"), ({"gate_lr": 0.0}, "gate_lr = 0.0"), ({"hold": 1.5}, "hold = 1.5"),
    ({"recipe": Recipe(3, 0.1)}, "schedule 'cosine'"), ({"bits": (3, 8)}, r"bits = \[3, 8\]"),
    ({"learn": "weights"}, "learn = 'weights'"), ({"learn": "gates", "fixed": SHORT}, "no phase 2"),
    ({"learn": "gates", "bits": (8, 8), "prune": False}, "nothing to learn"), ({"range_inputs": 0}, "inputs = 0"),
    ({"subset": -1}, "subset = -1"), ({"mu": math.inf}, "mu = inf"),
    ({"mu": math.nan}, "mu = nan"), ({"init": (6.0, 2.0)}, r"init = \[6.0, 2.0\]"),
    ({"init": (6.0, 6.0, math.nan, 6.0)}, "init = .*allowed are 4 finite numbers")])
def test_configs_that_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=message) as caught:
        Config(**wrong)
    assert "\n" not in str(caught.value)


def test_the_table_is_well_formed():
    table = read_table(CONFIGS / "bayesian_bits_table1.toml")
    assert {job.task for job in table.compare} == {"digits", "mnist", "cifar10", "folder"}
    for job in (*table.rows, *table.compare):
        assert isinstance(prepare(job)[2], Config)
    printed = {job.name: job.paper for job in table.rows if job.paper}
    assert printed["LeNet-5 mu 0.1"] == {"top1_integer": [99.3, 0.03], "hardware.bb_bops_percent": [0.36, 0.01]}
