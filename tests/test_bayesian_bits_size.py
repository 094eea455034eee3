"""A size of the file in one training: what is counted, how mu is turned, and that the file fits."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from methods import Budget, bayesian_bits, compress_to_size
from methods.bayesian_bits import Config, steering
from methods.bayesian_bits.network import GatedNetwork, Point, Wiring
from methods.bayesian_bits.steering import Steering, coded_bits
from methods.core.errors import BudgetError, ConfigError
from methods.core.file.storage import encode, to_bytes
from methods.core.graph.build import apply, float_bytes
from methods.core.train.finetune import Recipe

OPEN, CLOSED = 6.0, -6.0


def two_layers(bits=None):
    """Linear(2, 3) and Linear(3, 2), the second fed by the first alone; ranges of 1."""
    points = [Point("0", True, 1.0, True, 1.0, 3, bits), Point("2", True, 1.0, True, 1.0, 0, bits)]
    wiring = Wiring({"0": 6, "2": 6}, {"0": ("input_1", 1), "2": ("1", 1)}, {"2": "0"})
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.9, -0.9], [0.1, 0.1], [0.9, 0.1]]))
        model[2].weight.copy_(torch.tensor([[0.9, 0.9, 0.1], [0.1, -0.9, 0.1]]))
    return GatedNetwork(model, points, wiring)


def entropy(*counts):
    return sum(n * math.log2(sum(counts) / n) for n in counts)


def test_bits_are_those_of_codes_at_thresholded_gates():
    """At 2 bits the codes are -1, 0 and 1: 0.9 is beyond a third of the range, 0.1 is not."""
    network = two_layers()
    closed, opened = torch.full((2, 4), CLOSED), torch.full((3,), OPEN)
    assert coded_bits(network, closed, opened) == pytest.approx(entropy(2, 1, 3) + entropy(2, 3, 1))
    some = torch.tensor([OPEN, CLOSED, OPEN])  # row 1 of the first layer goes, and column 1 of the second
    assert coded_bits(network, closed, some) == pytest.approx(entropy(2, 1, 1) + entropy(1, 3))
    assert coded_bits(network, closed, torch.full((3,), CLOSED)) == 0
    half = torch.tensor([[OPEN] * 4, [CLOSED] * 4])
    assert coded_bits(network, half, opened) == pytest.approx(6 * 32 + entropy(2, 3, 1))
    with torch.no_grad():  # 4 bits tell 0.9 from 0.7
        network.network[0].weight[2, 1] = 0.7
    four = torch.tensor([[OPEN, CLOSED, OPEN, OPEN], [CLOSED] * 4])
    assert coded_bits(network, four, opened) == pytest.approx(entropy(2, 1, 2, 1) + entropy(2, 3, 1))
    assert coded_bits(network, closed, opened) == pytest.approx(entropy(3, 1, 2) + entropy(2, 3, 1))
    assert coded_bits(two_layers(8), closed, opened) == pytest.approx(entropy(2, 1, 3) + entropy(2, 3, 1))


def test_batch_norm_is_in_what_is_coded(tiny):
    points, wiring = bayesian_bits.survey(tiny.model(), tiny.Batches(8, 1).inputs)
    network = GatedNetwork(tiny.model(), points, wiring).eval()
    fixed, _ = bayesian_bits.fix_gates(network)
    for name, weight in network.folded_weights().items():
        torch.testing.assert_close(weight, fixed.network.get_submodule(name).weight)


def steer(total=80, limit=1000, taken=2000, mu=1.0):
    network = two_layers()
    weighed = []
    return network, Steering(mu, limit, total, network, lambda seen: weighed.append(seen) or taken)


def test_wanted_falls_to_the_budget_and_stays():
    network, found = steer()
    start = coded_bits(network, network.phi, network.phi2)
    goal = start * steering.AIM / 2
    assert (found.start, found.goal, found.wanted()) == pytest.approx((start, goal, start))
    found.steps = 20
    assert found.wanted() == pytest.approx(math.sqrt(start * goal))
    for found.steps in (40, 60):
        assert found.wanted() == pytest.approx(goal)
    _, larger = steer(taken=500)
    assert larger.start == larger.goal > start  # a file with room to spare is not asked to grow first


def test_mu_is_turned_after_where_the_gates_are_going():
    network, found = steer(limit=1056)
    for _ in range(7):
        found.step(network)
    assert found.mu == 1.0
    found.step(network)  # nothing moved, more than is wanted
    now = coded_bits(network, network.phi, network.phi2)
    assert found.mu == pytest.approx((now / found.wanted()) ** 0.2)
    with torch.no_grad():  # by 1 in 8 steps: 8 further in 64, at -3, are closed
        network.phi -= 1.0
    before = found.mu
    for _ in range(8):
        found.step(network)
    soon = coded_bits(network, torch.full((2, 4), -3.0), network.phi2)
    assert now > found.wanted() > soon
    assert found.mu == pytest.approx(before * max((soon / found.wanted()) ** 0.2, 1 / 1.1))
    before = found.mu
    for _ in range(8):  # they stopped, and are still open
        found.step(network)
    assert found.mu == pytest.approx(before * (now / found.wanted()) ** 0.2)


def test_the_loss_has_the_turned_mu_of_weights_and_that_of_the_config_of_activations():
    """At kappa 1 each gate up to b bits costs b times P(all up to it are open); all are as likely here."""
    plain, found = steer(mu=3.0)
    points = [*plain.points, Point("1", False, 1.0, False, 0.5)]
    network = GatedNetwork(plain.network, points, plain.wiring)
    phase = bayesian_bits.Phase(replace(CONFIG, mu=0.5), second=False, steering=found)
    phase.optimizers(network, CONFIG.recipe)
    opened = 1 / (1 + math.exp(2 / 3 * math.log(0.1 / 1.1) - OPEN))
    bits = sum(b * opened**n for n, b in enumerate((4, 8, 16, 32), 1))
    weights, activation = (2 + bits) * opened + 1 + bits, 1 + 0.5 * bits  # without channels the first is a constant 1
    assert float(phase.loss(network, torch.tensor(2.0)).detach()) == pytest.approx(2 + 3 * weights + 0.5 * activation)
    free = bayesian_bits.Phase(replace(CONFIG, mu=0.5), second=False)
    free.optimizers(network, CONFIG.recipe)
    assert float(free.loss(network, torch.tensor(2.0)).detach()) == pytest.approx(2 + 0.5 * (weights + activation))
    for steers, mu in ((found, 3), (None, 0.5)):
        own = bayesian_bits.Phase(replace(CONFIG, mu=0.5, activation_mu=0.25), second=False, steering=steers)
        own.optimizers(network, CONFIG.recipe)
        expected = 2 + mu * weights + 0.25 * activation
        assert float(own.loss(network, torch.tensor(2.0)).detach()) == pytest.approx(expected)
    assert float(bayesian_bits.Phase(CONFIG, second=True).loss(network, torch.tensor(2.0))) == 2


def test_an_epoch_corrects_the_goal():
    network, found = steer()
    phase = bayesian_bits.Phase(CONFIG, second=False, steering=found)
    found.weigh, before = lambda network: 4000, found.goal
    phase.after_epoch(network, 0)
    assert found.goal == pytest.approx(before / 2)


CONFIG = Config(recipe=Recipe(24, 3e-3, "adam", weight_decay=0.0, schedule="constant"), gate_lr=0.2, mu=0.1,
                range_inputs=48, init=(6.0, 6.0, -6.0, -6.0), fixed=Recipe(1, 1e-3))  # 96 steps


def test_gates_are_set_once_the_file_fits():
    """To what they are at test time, for good; and mu stays."""
    network, found = steer()
    for _ in range(8):
        found.step(network)
    assert not found.settled and network.phi.max() == OPEN
    with torch.no_grad():
        network.phi[0].copy_(torch.tensor([-0.93, -0.94, OPEN, OPEN]))  # either side of the threshold
        network.phi2.copy_(torch.tensor([OPEN, -3.0, CLOSED]))
    fits = coded_bits(network, network.phi, network.phi2)
    found.goal, found.start = 0.99 * fits, 2 * fits
    for _ in range(8):
        found.step(network)
    assert not found.settled and found.wanted() > fits  # less than is wanted now, and more than there is room for
    found.goal, before = fits, found.mu
    for _ in range(7):
        found.step(network)
    assert not found.settled
    found.step(network)
    assert found.settled and found.mu == before
    assert network.phi[0].sign().tolist() == [1, -1, 1, 1] and network.phi2.sign().tolist() == [1, -1, -1]
    assert network.train().draw()[0][0][:2].tolist() == [1, 0] and network.draw()[2]["0"].tolist() == [1, 0, 0]
    phase = bayesian_bits.Phase(CONFIG, second=False, steering=found)
    optimizers = phase.optimizers(network, CONFIG.recipe)
    phase.loss(network, network(torch.tensor([[1.0, 0.0]])).square().sum()).backward()
    phase.after_backward(network, 0.1)
    held, weight = network.phi.detach().clone(), network.network[0].weight.detach().clone()
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(network.phi, held) and not torch.equal(network.network[0].weight, weight)


def run(tiny, ratio, run=None, **changes):
    return bayesian_bits.compress(tiny.model(), tiny.task(), Budget(size_ratio=ratio), replace(CONFIG, **changes),
                                  torch.Generator().manual_seed(0), run=run)


@pytest.mark.parametrize("ratio", [0.2, 0.16])
def test_the_file_fits(ratio, tiny, tmp_path):
    found = run(tiny, ratio)
    size, limit = encode(found, tmp_path / "a.jc").total, ratio * float_bytes(tiny.model())
    said = found.notes["size"]
    assert size == said["bytes"] <= limit == pytest.approx(said["limit"], abs=1)
    assert said["knob"] == "config.mu" and said["value"] != CONFIG.mu
    assert apply(found, tiny.model())(tiny.Batches(8, 1).inputs).isfinite().all()
    same = compress_to_size(bayesian_bits, tiny.model(), tiny.task(), Budget(size_ratio=ratio), CONFIG,
                            torch.Generator().manual_seed(0))
    assert to_bytes(same)[0] == to_bytes(found)[0]


def test_a_file_that_ends_too_large_loses_its_least_weights(tiny):
    """Widths are fixed and nothing is pruned, so that no mu makes it smaller."""
    fixed = {"bits": (2, 8), "prune": False, "init": Config().init, "mu": Config().mu, "gate_lr": Config().gate_lr}
    whole = run(tiny, 0.9, **fixed)
    bytes_of = whole.notes["size"]["bytes"]
    assert whole.notes["size"]["trimmed"] == 0
    found = run(tiny, 0.97 * bytes_of / float_bytes(tiny.model()), **fixed)
    said = found.notes["size"]
    assert 0 < said["trimmed"] < 0.3 and 0.9 * said["limit"] < len(to_bytes(found)[0]) == said["bytes"] <= said["limit"]
    assert any(not torch.equal(found.rest[name], whole.rest[name]) for name in found.rest)  # biases make up for them


def test_an_interrupted_run_ends_with_the_same_bytes(tiny):
    total = tiny.Run({})
    whole = run(tiny, 0.16, total)
    for calls in (2, len(total.calls) // 2, len(total.calls) - 1):
        states = {}
        with pytest.raises(tiny.Interrupted):
            run(tiny, 0.16, tiny.Run(states, calls))
        assert to_bytes(run(tiny, 0.16, tiny.Run(states)))[0] == to_bytes(whole)[0]


def test_what_cannot_be_turned_or_met_is_refused(tiny):
    with pytest.raises(ConfigError, match="activation_mu = -1"):
        replace(CONFIG, activation_mu=-1.0)
    with pytest.raises(ConfigError, match="mu = 0 with budget size_ratio"):
        run(tiny, 0.2, mu=0.0)
    with pytest.raises(BudgetError, match=r"size_ratio = 0.01 allows 73 bytes, .* takes \d+: allowed are"):
        run(tiny, 0.01)
    with pytest.raises(BudgetError, match="no file of at most .* allowed are more epochs"):
        run(tiny, 0.1, bits=(8, 8), prune=False, init=Config().init, mu=Config().mu, gate_lr=Config().gate_lr)
    with pytest.raises(BudgetError, match="no file of at most .* allowed are more epochs"):  # floats, all of it
        run(tiny, 0.16, init=Config().init, recipe=Recipe(0, 3e-3, "adam", weight_decay=0.0, schedule="constant"))
    with pytest.raises(BudgetError, match="it takes: size_ratio"):
        bayesian_bits.compress(tiny.model(), tiny.task(), Budget(bits=4), Config(), torch.Generator())
