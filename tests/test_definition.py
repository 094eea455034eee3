"""The int64 reference has wiring, integers and factors of its own: it notices when those of the network are wrong."""

import pytest
import torch
from torch import nn

from methods.core.artifact import Affine, Codebook, CompressedTensor, Levels
from methods.engine import exact, weights
from methods.engine.definition import integers_of
from methods.engine.exact import IntegerNetwork
from methods.engine.fast import FastNetwork
from methods.engine.verify import verify
from methods.engine.weights import integer_weight

from .test_fast import NETWORKS, compressed, normal, seeded


def verdict_on(name, in_float=()):
    model, x = seeded(NETWORKS[name][0]), normal(2, *NETWORKS[name][1])
    parts = compressed(model, x)
    book = Codebook(torch.tensor([0, -1.0, 0.3, 0.011]))
    fc = next(layer for layer in reversed(parts.weights))
    codes = torch.randint(0, 4, parts.weights[fc].codes.shape, generator=torch.Generator().manual_seed(0))
    parts.weights[fc] = CompressedTensor.of(codes, book, 2)
    return verify(FastNetwork(parts, model, in_float), [(x, None)], 2, 2)


def scaled(function, factor):
    return lambda *given: function(*given) * factor


BROKEN = {
    "nothing": lambda patch: None,
    "gains": lambda patch: patch.setattr(exact, "norm_ratio", scaled(exact.norm_ratio, 1.01)),
    "which adds take accumulators": lambda patch: patch.setattr(IntegerNetwork, "_pending", lambda self: {}),
    "shifts": lambda patch: patch.setattr(IntegerNetwork, "_epilogue", lambda self, node, of=IntegerNetwork._epilogue: (
        of(self, node)[0], of(self, node)[1] + 0.5)),
    "tables": lambda patch: patch.setattr(weights, "integer_table", lambda values, codes, of=weights.integer_table: (
        of(values, codes)[0].flip(0), *of(values, codes)[1:])),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_faults_of_the_network_are_noticed(fault, monkeypatch):
    BROKEN[fault](monkeypatch)
    found = verdict_on("resnet20")
    assert found.reference_codes > 0 and (found.reference_wrong > 0) == (fault != "nothing")


def test_layers_in_float_are_compared_too():
    assert verdict_on("vgg", ("0.0",)).reference_wrong == 0


@pytest.mark.parametrize("grid, bits", [
    (Affine(torch.rand(6) + 0.1, torch.tensor([0, 3, 5, 15, 7, 1]).int(), signed=False), 4),
    (Affine(torch.tensor(0.3), torch.tensor(-2).int()), 4), (Levels(torch.tensor(0.3), torch.tensor([-4, -1, 2]).int()),
                                                            2),
    (Codebook(torch.tensor([0, 0.5, -1.0, 0.25])), 2), (Codebook(torch.tensor([0, 1.0, 0.003, 1e-9])), 2),
    (Codebook(torch.tensor([0, 1.0, 0.9995, -0.3])), 2), (Codebook(torch.tensor([0, 1.0, 0.61, -0.3])), 2),
    (Codebook(torch.tensor([0, 1.0, 0.713, 0.4317, -0.557, 0.2711, -0.3333, -0.871])), 3),
    (Codebook(torch.randn(200) ** 3), 8)])
def test_integers_are_those_of_the_kernels(grid, bits):
    generator = torch.Generator().manual_seed(0)
    low, high = grid.code_range(bits)
    codes, mask = torch.randint(low, high + 1, (6, 4, 3, 3), generator=generator), torch.rand(6, 4, 3, 3) < 0.7
    codes[:, :3] = codes[0, 0, 0, 0]  # most weights have one code
    for tensor in (CompressedTensor.of(codes, grid, bits, mask), CompressedTensor.of(codes, grid, bits, mask & False)):
        integers, scale = integers_of(tensor)
        want = integer_weight(tensor)
        assert torch.equal(torch.from_numpy(integers), want.integers.long())
        assert torch.equal(torch.from_numpy(scale.copy()), want.scale)


def test_a_batch_norm_read_beside_its_layer_is_no_part_of_it():
    """A conv that is also read by others keeps its own output; its batch norm then runs in float, in both."""
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.last = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            y = self.conv(x)
            return self.last(torch.relu(self.bn(y)) + y)

    model, x = seeded(Net), normal(2, 3, 5, 5)
    fast = FastNetwork(compressed(model, x), model)
    found = verify(fast, [(x, None)], 2, 2)
    assert (found.wrong, found.reference_wrong, fast.float_nodes) == (0, 0, ["bn"])
