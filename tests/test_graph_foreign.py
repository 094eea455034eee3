"""What networks of others do with tensors: copies that are no aliases, norms over positions."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from methods import Budget, Task, apply, decode, encode, load, open_file, prune_then_quantize, rptq
from methods.core.errors import CompressError
from methods.core.graph.graph import trace
from methods.core.graph.positions import check_positions


def seeded():
    return torch.Generator().manual_seed(0)


class Skip(nn.Module):
    """A copy of a value, kept beside one that is then changed in place."""

    def __init__(self, copied):
        super().__init__()
        self.a, self.b, self.h = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)
        self.relu, self.copied = nn.ReLU(inplace=True), copied

    def forward(self, x):
        y = self.a(x)
        skip = self.copied(y)
        return self.h((self.b(self.relu(y)) + skip).mean((2, 3)))


@pytest.mark.parametrize("copied", [lambda y: y.clone(), torch.clone, lambda y: y.flip(3), lambda y: y.roll(1, 2),
                                    lambda y: torch.roll(y, 1, 2), lambda y: y.repeat(1, 1, 1, 1)])
def test_a_copy_keeps_its_values_when_the_tensor_is_written_to(copied, tmp_path):
    net, x = Skip(copied).eval(), torch.randn(64, 3, 8, 8)
    assert torch.allclose(trace(net).run(x), net(x), atol=1e-5)
    encode(rptq.compress(net, Task.from_inputs(x), Budget(size_ratio=0.9), rptq.Config(), seeded()), tmp_path / "a.jc")
    want, found = net(x), open_file(tmp_path / "a.jc", net, (3, 8, 8))(x)
    assert (found - want).norm() < 0.05 * want.norm()
    assert (load(tmp_path / "a.jc", net)(x) - want).norm() < 0.05 * want.norm()


@pytest.mark.parametrize("alias", [lambda y: y, lambda y: y.detach(), lambda y: y.contiguous(),
                                   lambda y: F.dropout(y, training=False)])
def test_an_alias_has_what_was_written(alias):
    net, x = Skip(alias).eval(), torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        assert torch.allclose(trace(net).run(x), net(x), atol=1e-5)


def mixer(features):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, features), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(features, 4)).train()
    x = torch.randn(64, 8, 8) * torch.linspace(0.2, 3, 8)[:, None]
    for _ in range(50):
        net(x)
    return net.eval(), x


def test_a_norm_over_positions_of_another_number_is_not_folded(tmp_path):
    """[N, 8, 6]: eight positions are normalised, the layer has six channels."""
    net, x = mixer(6)
    assert trace(net).norm_after("0") is None
    made = prune_then_quantize.compress(net, Task.from_inputs(x), Budget(density=1.0, bits=8),
                                        prune_then_quantize.Config(), seeded())
    encode(made, tmp_path / "a.jc")
    want = net(x)
    for found in (apply(decode(tmp_path / "a.jc"), net)(x), open_file(tmp_path / "a.jc", net, (8, 8)).exact(x)):
        assert (found - want).norm() < 0.05 * want.norm()


def test_a_norm_over_as_many_positions_as_channels_is_refused():
    net, x = mixer(8)
    with pytest.raises(CompressError, match="batch norm '1' normalises positions of what '0' puts out, .2, 8, 8."):
        prune_then_quantize.compress(net, Task.from_inputs(x), Budget(density=1.0, bits=8),
                                     prune_then_quantize.Config(), seeded())
    check_positions(net, [x[:, 0]])
    check_positions(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.BatchNorm1d(8)), [x])  # behind no layer: left alone
    check_positions(nn.Sequential(nn.Conv1d(8, 8, 1), nn.BatchNorm1d(8)), [x])
    check_positions(net, [torch.ones(2, 3)])  # what it cannot take is not said here


def test_a_norm_of_pictures_behind_a_linear_layer_is_not_its(tmp_path):
    """[N, 8, 5, 8]: dimension 1 is normalised, channels are in the last one, as many."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm2d(8), nn.Linear(8, 4)), torch.rand(32, 8, 5, 8)
    net[1].running_mean.copy_(torch.randn(8))
    net.eval()
    assert trace(net).norm_after("0") is None
    encode(rptq.compress(net, Task.from_inputs(x), Budget(size_ratio=0.9), rptq.Config(), seeded()), tmp_path / "a.jc")
    want, found = net(x), open_file(tmp_path / "a.jc", net, (8, 5, 8))(x)
    assert (found - want).norm() < 0.05 * want.norm()
