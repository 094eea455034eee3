"""Batch norm on given inputs: torch's own as the definition, and the same bytes for any number of threads."""

import contextlib
import copy

import pytest
import torch
from torch import nn

from methods import sparq
from methods.core.budget import Budget
from methods.core.errors import CompressError
from methods.core.fit.norms import following, normalized, reestimate_norms
from methods.core.train.task import Task

from .sparq_networks import Inputs


@contextlib.contextmanager
def threads(n):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def draw(*shape, seed=0):
    return 3 + 5 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("norm, shape", [
    (nn.BatchNorm2d(6), (7, 6, 5, 4)), (nn.BatchNorm2d(6, affine=False), (2, 6, 1, 1)), (nn.BatchNorm1d(6), (9, 6)),
    (nn.BatchNorm2d(6, momentum=None), (7, 6, 3, 3)), (nn.BatchNorm2d(6, track_running_stats=False), (3, 6, 2, 2)),
    (nn.BatchNorm2d(6, eps=0.5, momentum=0.4), (300, 6, 60, 60))])  # the last in several blocks
def test_as_torch_in_training_mode(norm, shape):
    if norm.affine:
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    ours, theirs = copy.deepcopy(norm).eval(), copy.deepcopy(norm).train()
    for seed in range(2):
        x = draw(*shape, seed=seed)
        assert torch.allclose(normalized(ours, x), theirs(x), atol=2e-5)
    for name, value in theirs.state_dict().items():
        assert torch.allclose(ours.state_dict()[name], value, rtol=1e-5), name


def test_inside_following_batch_norm_trains_and_afterwards_not():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    trained, x = copy.deepcopy(net).train(), draw(5, 3, 6, 6)
    with following(net):
        assert torch.allclose(net(x), trained(x), atol=1e-5)
    assert torch.allclose(net[1].running_var, trained[1].running_var)
    before = net[1].running_var.clone()
    assert torch.allclose(net(x), trained.eval()(x), atol=1e-5) and torch.equal(net[1].running_var, before)


def test_reestimated_statistics_are_the_means_of_batches():
    net = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()).eval()
    x = draw(20, 3, 4, 4)
    reestimate_norms(net, x, batch=10)
    parts = [part.double().transpose(0, 1).flatten(1) for part in x.split(10)]
    assert torch.allclose(net[0].running_mean.double(), sum(part.mean(1) for part in parts) / 2)
    assert torch.allclose(net[0].running_var.double(), sum(part.var(1) for part in parts) / 2)
    assert net[0].momentum == 0.1 and not net.training
    with pytest.raises(CompressError, match="2 inputs or more"):
        reestimate_norms(net, x[:1])
    with pytest.raises(CompressError, match="none left"):
        reestimate_norms(nn.Sequential(nn.ReLU()), x)


def test_the_number_of_threads_changes_no_byte():
    """Of the statistics that batch norm takes, and of what SPARQ calibrates with them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1),
            nn.BatchNorm2d(16), nn.ReLU(), nn.AvgPool2d(16), nn.Flatten(), nn.Linear(16, 4)).eval()
    inputs = draw(64, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    task, found = Task(None, Inputs(inputs), calibration=Inputs(inputs), channels_last=True), []
    for n in (1, 2):
        with threads(n):
            compressed = sparq.compress(net, task, Budget(), sparq.Config(), torch.Generator().manual_seed(0))
            again = reestimate_norms(copy.deepcopy(net), inputs).state_dict()
        found.append((compressed.activations, {**compressed.rest, **again}))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(value, found[1][1][name]) for name, value in found[0][1].items())
