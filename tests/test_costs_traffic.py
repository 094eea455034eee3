"""Traffic: a residual network counted by hand, readers and forms, and the roofline."""

import pytest
import torch
from torch import Tensor, nn

from benchmarks import networks
from methods.core.artifact import ActivationQuantizer
from methods.core.errors import ConfigError
from methods.engine.costs.shapes import sizes_of
from methods.engine.costs.traffic import Traffic, output_width, roofline, traffic_of


class Residual(nn.Module):
    """conv1 -> relu -> {conv2, shortcut} -> add -> average pool -> flatten -> linear."""

    def __init__(self):
        super().__init__()
        self.conv1, self.relu, self.pool = nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
        self.conv2, self.norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)
        self.average, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.conv1(x)))  # 2 x 2 x 2
        return self.fc(torch.flatten(self.average(self.norm(self.conv2(x)) + x), 1))


EIGHT, FOUR, OTHER = ActivationQuantizer(0.1), ActivationQuantizer(0.1, bits=4), ActivationQuantizer(0.2)
WEIGHTS = {"conv1": 100, "conv2": 40, "fc": 60}


def by_hand(ranges):
    graph, sizes = sizes_of(Residual(), (1, 4, 4))
    return graph, traffic_of(graph, sizes, ranges, WEIGHTS, batch=2)


def test_float_by_hand():
    """The add takes conv2's accumulators, with the batch norm between; the shortcut it reads from memory."""
    graph, rows = by_hand({})
    assert rows == {
        "conv1": Traffic(50, 32 * 16, 32 * 8),  # writes what remains after the max pool
        "conv2": Traffic(20, 32 * 8, 0),
        "add": Traffic(0, 32 * 8, 32 * 8),
        "average": Traffic(0, 32 * 8, 32 * 2),
        "fc": Traffic(30, 32 * 2, 32 * 3)}
    assert rows["conv1"].total == 50 + 32 * 24
    assert output_width(graph, {"average": FOUR}, "conv2") == 4  # stored as the sum


def test_quantized_by_hand():
    """conv2 and the add read one tensor: written once if they share a quantizer, else once for each. With a
    quantizer of its own the add reads conv2's output too."""
    ranges = {"conv1": EIGHT, "conv2": EIGHT, "add:0": FOUR, "add:1": EIGHT, "average": EIGHT, "fc": FOUR}
    graph, rows = by_hand(ranges)
    assert rows["conv1"] == Traffic(50, 8 * 16, 8 * 8) and rows["conv2"] == Traffic(20, 8 * 8, 4 * 8)
    assert rows["add"] == Traffic(0, (4 + 8) * 8, 8 * 8) and rows["fc"] == Traffic(30, 4 * 2, 32 * 3)
    assert rows["average"] == Traffic(0, 8 * 8, 4 * 2)
    assert by_hand(ranges | {"add:1": OTHER})[1]["conv1"].writes == 2 * 8 * 8
    assert by_hand({k: v for k, v in ranges.items() if k != "add:1"})[1]["conv1"].writes == (8 + 32) * 8
    assert [output_width(graph, ranges, name) for name in ("conv1", "conv2", "average", "fc")] == [8, 4, 4, 32]
    assert output_width(graph, {"conv2": EIGHT}, "conv1") == 32  # the add reads it in float


def test_flatten_moves_nothing():
    """The input of LeNet-300 is read once, flattened; the network does not write it."""
    graph, sizes = sizes_of(networks.build("lenet300", 10, 1), (1, 28, 28))
    rows = traffic_of(graph, sizes, {"ip1": EIGHT}, {})
    assert rows["ip1"] == Traffic(0, 8 * 784, 32 * 300)
    assert sum(row.writes for row in rows.values()) == 32 * (300 + 100 + 10)


def test_roofline():
    assert roofline(1000, 800, peak=10, bandwidth=5).__dict__ == {"intensity": 10, "seconds": 100, "bound": "compute"}
    slow = roofline(1000, 800, peak=10, bandwidth=0.5)
    assert (slow.seconds, slow.bound) == (200, "memory")
    with pytest.raises(ConfigError, match="bandwidth = 0"):
        roofline(1, 1, 1, 0)


def test_batch_of_none():
    with pytest.raises(ConfigError, match="batch = 0"):
        traffic_of(*sizes_of(Residual(), (1, 4, 4)), {}, {}, batch=0)
