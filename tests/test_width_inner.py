"""Width search: what the inner method makes of the network that was found, as one of the whole network."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks.measure import with_ranges
from methods import Budget, Recipe, Task, apply, clip_q, pipeline, rptq_train, width_search
from methods.core.file.storage import to_bytes
from methods.core.graph.build import float_bytes
from methods.width_search import Config, Inner

from .test_width_search import QUICK, compress, seeded


def test_layers_left_alone_keep_their_channels(tiny):
    model = tiny.model()
    out = compress(tiny, {"mac_ratio": 0.97, "bits": {"*": 8, "conv1": None}}, model, multiple=2)
    assert torch.equal(out.rest["conv1.weight"], model.conv1.weight) and out.notes["width"].keys() == {"conv3"}


def test_an_inner_method_may_take_out_blocks():
    """One of two blocks goes after all widths were cut; the file's topology says both."""
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x):
            return (x + self.b(self.a(x).relu())).relu()

    net = nn.Sequential(nn.Conv2d(3, 8, 3), Block(), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    batch = torch.randn(8, 3, 8, 8), torch.arange(8) % 4
    inner = pipeline.Config(prune=pipeline.Prune("loss", "block", blocks=1), calibration_inputs=8)
    out = width_search.compress(net, Task.from_loader([batch], [batch]), Budget(mac_ratio=0.5, bits=8), Config(
        **QUICK, inner=Inner("pipeline", inner)), seeded())
    assert len(out.topology.removed) == 1 and len(out.topology.widths) == 4
    assert apply(out, net)(batch[0]).shape == (8, 4)


@pytest.mark.parametrize("method, config, bits", [
    ("rptq_train", rptq_train.Config(sensitivity_inputs=16, calibration_inputs=24, recipe=Recipe(2, 0.01)), None),
    ("clip_q", clip_q.Config(search="uniform", finetune=Recipe(1, 0.01)), 4)])
def test_the_inner_method_may_be_given_a_size(tiny, method, config, bits):
    """Of the whole network's floats, though the inner method sees a narrow one, for a method that keeps sizes itself
    and for one whose knob is searched; with ranges in it."""
    model, whole = tiny.model(), float_bytes(tiny.model())
    out = compress(tiny, {"mac_ratio": 0.6, "bits": bits}, model, inner=Inner(method, config, size_ratio=0.14),
                   multiple=2)
    size = len(to_bytes(with_ranges(out, model, tiny.task()))[0])
    assert 0.1 * whole < size <= 0.14 * whole, size / whole
    assert out.topology.widths


def test_beside_the_size_of_the_file_the_weights_handed_on_are_limited(tiny):
    model, whole = tiny.model(), float_bytes(tiny.model())
    config = rptq_train.Config(sensitivity_inputs=16, calibration_inputs=24, recipe=Recipe(1, 0.01))
    out = compress(tiny, {"size_ratio": 0.4}, model, inner=Inner("rptq_train", config, size_ratio=0.12), multiple=1)
    left = sum(4 * (tensor.codes.numel() + len(tensor.codes)) for tensor in out.weights.values())
    assert 0.3 * whole < left <= 0.4 * whole and len(to_bytes(out)[0]) <= 0.12 * whole


def test_results_that_are_too_large_twice_are_expected_as_the_last_one_was():
    """1,000 bytes are expected at 10 and there are 1,200; then 900 at 5, now 1.2 times as many, and there are 1,188."""
    sizes = object.__new__(width_search.Sizes)
    sizes.costs, sizes.start, sizes.slope = SimpleNamespace(code_bytes=lambda point: point[0]), 800.0, 20.0
    sizes.most, sizes.correction, sizes.stored = 1100, 1.0, lambda made: made
    assert [sizes.bytes((n,)) for n in (10, 5)] == [1000, 900]
    assert not sizes.keep((10,), 1200)
    assert [sizes.bytes((n,)) for n in (10, 5)] == pytest.approx([1200, 1080])
    assert not sizes.keep((5,), 1188)
    assert [sizes.bytes((n,)) for n in (10, 5)] == pytest.approx([1320, 1188])
    assert sizes.keep((5,), 1000) and sizes.bytes((5,)) == pytest.approx(1188)  # one that fits changes nothing
