"""Networks at the edge of what methods take: chains, wrappers, norms without statistics, sizes that are read."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from methods import (
    admm,
    annc,
    dfq,
    iterative_sensitivity,
    neuron_merging,
    sparq,
    udfc,
)
from methods import sequential_reconstruction as sequential
from methods.core.budget import Budget
from methods.core.errors import BudgetError, CompressError, ConfigError
from methods.core.fit.batchnorm import closed_form
from methods.core.graph.build import apply
from methods.core.graph.fold import fold_batchnorm
from methods.core.graph.graph import trace
from methods.core.train.recipe import Recipe
from methods.core.train.run import NullRun
from methods.core.train.task import Task
from tests.edge_networks import NONE, SMALL, chain, seeded, task

# --- batch norm renewed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [udfc, neuron_merging])
def test_closed_form_of_a_chain_that_lost_channels(method):
    made = method.compress(chain(), None, Budget(channel_density=0.5), method.Config(batchnorm="closed"), seeded())
    assert made.rest["4.running_mean"].shape == (4,) and apply(made, chain())(torch.rand(2, 3, 8, 8)).isfinite().all()


def test_the_closed_form_knows_what_a_bias_moved():
    """A bias of the second layer moves the mean in front of its batch norm by as much, and no variance."""
    given = chain()
    student = copy.deepcopy(given)
    with torch.no_grad():
        student[3].bias.add_(torch.arange(8.0))
    before, after = (closed_form(given, one, {})["4"] for one in (given, student))
    torch.testing.assert_close(after[0] - before[0], torch.arange(8.0).double())
    torch.testing.assert_close(after[1], before[1])


def test_a_layer_between_two_others_is_renewed_once_in_closed_form():
    """The norm behind the second layer of a pair knows what that pair reads, also if it begins another pair."""
    given = chain()
    student = copy.deepcopy(given)
    with torch.no_grad():
        for i in (0, 3, 6):
            student[i].weight.mul_(0.5).add_(0.01 * torch.randn(student[i].weight.shape, generator=seeded(i)))
    whole, alone = closed_form(given, student, {}), closed_form(given[:5], student[:5], {})
    assert set(whole) == {"1", "4", "7"} and set(alone) == {"1", "4"}
    for name in alone:
        torch.testing.assert_close(whole[name], alone[name])


@pytest.mark.parametrize("mode", ["noise", "closed", "data"])
def test_a_network_in_a_wrapper_is_renewed(mode):
    config = admm.Config(prune_iterations=0, retrain=NONE, quantize_iterations=0, fix_rounds=0, batchnorm=mode)
    one, other = (admm.compress(model, task(), Budget(density=0.5, bits=3), config, seeded())
                  for model in (chain(), nn.DataParallel(chain())))
    assert torch.equal(one.rest["4.running_mean"], other.rest["4.running_mean"])


def test_norms_without_statistics_are_left_alone():
    model = chain()
    model[4] = nn.BatchNorm2d(8, track_running_stats=False)
    made = udfc.compress(model, task(), Budget(bits=4), udfc.Config(batchnorm="data"), seeded())
    assert not torch.equal(made.rest["1.running_mean"], model[1].running_mean) and "4.running_mean" not in made.rest


@pytest.mark.parametrize("method, config", [
    (admm, admm.Config(prune=Recipe(1, 0.01), retrain=Recipe(1, 0.01))), (annc, annc.Config(recipe=Recipe(1, 0.01)))])
@pytest.mark.parametrize("mode", ["noise", "closed", "data"])
def test_no_norm_to_renew_is_said_before_training(method, config, mode, monkeypatch):
    monkeypatch.setattr(method, "train", lambda *_, **__: pytest.fail("it trains first"))
    budget = Budget(data_ratio=0.1) if method is annc else Budget(density=0.5, bits=3)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 4))
    with pytest.raises(CompressError, match=f"batchnorm = '{mode}': the network has no batch norm"):
        method.compress(flat, task(), budget, replace(config, batchnorm=mode), seeded())


# --- networks ----------------------------------------------------------------------------------------------------


class Pyramid(nn.Module):
    """The size of one branch is read before its values are."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.side, self.down, self.top = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        x = torch.relu(self.bn(self.stem(x)))
        side = self.side(x)
        x = F.interpolate(self.top(self.down(x)), size=side.shape[-2:]) + side
        return self.fc(x.mean((2, 3)))


def test_a_size_that_is_read_is_there():
    model = Pyramid().eval()
    order = [node.name for node in sequential.in_order(trace(model), {})]
    assert sorted(order) == sorted(node.name for node in trace(model) if node.op != "input")
    made = sequential.compress(model, None, Budget(bits=4), SMALL, seeded())
    assert apply(made, model)(torch.rand(2, 3, 8, 8)).isfinite().all()


@pytest.mark.parametrize("last", [nn.Identity(), nn.Unflatten(1, (2, 2)), nn.Flatten(0)])
def test_reconstruction_takes_outputs_that_are_no_classes(last):
    sequential.LAST.clear()
    made = sequential.compress(nn.Sequential(chain(), last), None, Budget(bits=4), SMALL, seeded())
    assert len(made.weights) == 4


def test_reconstruction_refuses_several_outputs_before_it_distils(monkeypatch):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = chain()

        def forward(self, x):
            return self.inner(x), x

    monkeypatch.setattr(sequential, "distill_images", lambda *_, **__: pytest.fail("it distils first"))
    with pytest.raises(CompressError, match="puts out a tuple"):
        sequential.compress(Two(), None, Budget(bits=4), SMALL, seeded())
    with pytest.raises(ConfigError, match="bits = 1: a symmetric grid"):
        sequential.compress(chain(), None, Budget(bits=1), replace(SMALL, scheme="symmetric"), seeded())


def test_images_are_those_of_what_the_network_computes():
    """The same tensors behind another activation, and a buffer that numpy does not know."""
    one, other = chain(), chain()
    other[2] = other[5] = other[8] = nn.ELU()
    for model in (one, other):
        model.register_buffer("sixteen", torch.zeros((), dtype=torch.bfloat16))
    sequential.LAST.clear()
    alone = sequential.images_for(other, SMALL, seeded(), NullRun())
    sequential.images_for(one, SMALL, seeded(), NullRun())
    assert torch.equal(sequential.images_for(other, SMALL, seeded(), NullRun()), alone)
    assert not torch.equal(sequential.images_for(one, SMALL, seeded(), NullRun()), alone)


def test_a_norm_without_parameters_that_is_used_twice_is_not_folded():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
            self.bn, self.fc = nn.BatchNorm2d(8, affine=False), nn.Linear(8, 4)

        def forward(self, x):
            x = torch.relu(self.bn(self.a(x)))
            return self.fc(torch.relu(self.bn(self.b(x))).mean((2, 3)))

    model, x = Twice().eval(), torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(fold_batchnorm(model)[0](x), model(x))
    assert dfq.compress(model, None, Budget(bits=8), dfq.Config(), seeded()).weights


def test_weights_without_counted_operations_keep_16_bits():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.twice, self.spare = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.twice(torch.relu(self.twice(torch.relu(self.fc(x)))))

    batches = [(torch.rand(16, 6, generator=seeded()), torch.arange(16) % 4)]
    made = iterative_sensitivity.compress(Unused(), Task.from_loader(batches, batches), Budget(),
                                          iterative_sensitivity.Config(bops_percent=2.0, calibration_inputs=16),
                                          seeded())
    assert made.weights["fc"].bits < 16 == made.weights["twice"].bits == made.weights["spare"].bits


def test_sparq_says_that_nothing_is_left_to_it():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    with pytest.raises(BudgetError, match="leaves alone what sparq acts on: allowed are bits for one of"):
        sparq.compress(model, task(), Budget(bits={"1": 8, "3": None, "5": None}), sparq.Config(), seeded())
