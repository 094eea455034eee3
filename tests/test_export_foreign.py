"""Networks as other people write them: an ONNX file says what the integers here say, or there is no file."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from methods.core.errors import ConfigError, GraphError
from methods.core.fit.calibrate import calibrate
from methods.core.fit.quantize import fit_symmetric, quantize
from methods.core.graph.build import apply, assemble, weight_layers
from methods.engine.export import onnx_session, to_onnx
from methods.engine.opened import Opened

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


class Between(nn.Module):
    """`between`, a function of a tensor, between two layers."""

    def __init__(self, first, between, last):
        super().__init__()
        self.first, self.last, self.between = first, last, between

    def forward(self, x):
        return self.last(self.between(self.first(x)))


def opened(net, x):
    """`net` with weights and activations of 8 bits."""
    net.eval()
    weights = {name: quantize(layer.weight, fit_symmetric(layer.weight, 8), 8)
               for name, layer in weight_layers(net).items()}
    ranges = calibrate(apply(assemble(net, weights), net), x, 8)
    return Opened(assemble(net, weights, activations=ranges), net, tuple(x.shape[1:]))


def agrees(net, x, path):
    """Both arithmetics, in both opsets, against the integers here; the operations of the file."""
    found = opened(net, x)
    want = found.exact(x)
    for opset in (13, 21):
        found.to_onnx(path, arithmetic="exact", opset=opset)
        assert torch.equal(onnx_session(path)(x), want)
        found.to_onnx(path, opset=opset)
        assert float((onnx_session(path)(x) - want).abs().max()) < 0.02 * float(want.abs().max())
    return [node.op_type for node in onnx.load(path).graph.node]


def is_refused(net, x, path, match, **options):
    for arithmetic in ("qdq", "exact"):
        with pytest.raises(GraphError, match=match) as caught:
            opened(net, x).to_onnx(path, arithmetic=arithmetic, **options)
        assert "\n" not in str(caught.value) and not path.exists()


@pytest.mark.parametrize("dims, keep", [((1, 2), False), ((-2, -3), False), ((1,), False), (2, True), ((1, 3), True),
                                        ((1, 2, 3), True)])
def test_means_are_over_the_dimensions_that_were_named(tmp_path, dims, keep):
    torch.manual_seed(0)
    width = 1 if keep and dims == (1, 2, 3) or dims == (1, 3) else 8
    net = Between(nn.Linear(8, 8), lambda x: x.mean(dims, keep), nn.Linear(width, 4))
    assert "ReduceMean" in agrees(net, torch.rand(4, 8, 8, 8), tmp_path / "net.onnx")


@pytest.mark.parametrize("mean", [lambda x: x.mean((2, 3)), lambda x: torch.mean(x, dim=[3, 2])])
def test_means_over_pictures_stay_pools(tmp_path, mean):
    torch.manual_seed(0)
    net = Between(nn.Conv2d(3, 6, 3), mean, nn.Linear(6, 4))
    assert "GlobalAveragePool" in agrees(net, torch.rand(4, 3, 8, 8), tmp_path / "net.onnx")


@pytest.mark.parametrize("pool", [nn.AdaptiveAvgPool2d(1), nn.AvgPool2d((6, 8)), nn.MaxPool2d(2, 1, 1)])
def test_pools_over_inputs_without_channels_are_refused(tmp_path, pool):
    net = Between(nn.Linear(8, 8), pool, nn.Linear(9 if isinstance(pool, nn.MaxPool2d) else 1, 4))
    is_refused(net, torch.rand(4, 6, 8), tmp_path / "net.onnx", r"between pools inputs of \[6, 8\]")


@pytest.mark.parametrize("moved", [lambda x: x.view(-1, 16), lambda x: x.mean(0, True), lambda x: x.transpose(0, 1)])
def test_values_without_a_batch_are_refused(tmp_path, moved):
    net = Between(nn.Linear(8, 8), moved, nn.Linear(8 if moved(torch.ones(1, 2, 8)).shape[-1] == 8 else 16, 4))
    is_refused(net, torch.rand(4, 4, 8), tmp_path / "net.onnx", "whose first dimension is the batch")


@pytest.mark.parametrize("pool, size", [
    (nn.AvgPool2d(2, ceil_mode=True), 7), (nn.AvgPool2d(3, 4, ceil_mode=True), 5),
    (nn.AvgPool2d((2, 3), 2, 1, ceil_mode=True), 6), (nn.AvgPool2d(4, 2, 1, ceil_mode=True), 5),
    (nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), 6), (nn.AvgPool2d(2, 4, 1, ceil_mode=True), 7),
    (nn.AvgPool2d(3, 2, 1), 7), (nn.MaxPool2d(3, 2, 1, ceil_mode=True), 6)])
def test_windows_that_go_beyond_the_edge(tmp_path, pool, size):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), pool, nn.Conv2d(8, 4, 1))
    agrees(net, torch.rand(8, 3, size, size), tmp_path / "net.onnx")


def pictures(between, last=None):
    torch.manual_seed(0)
    return Between(nn.Conv2d(3, 8, 1), between, nn.Conv2d(8, 4, 1) if last is None else last)


@pytest.mark.parametrize("pool, kind", [
    (nn.AdaptiveMaxPool2d(1), "GlobalMaxPool"), (nn.AdaptiveMaxPool2d((2, None)), "MaxPool"),
    (lambda x: F.adaptive_max_pool2d(x, (1, 1)), "GlobalMaxPool"), (lambda x: F.max_pool2d(x, 2), "MaxPool"),
    (lambda x: F.max_pool2d(x, [3, 2], 1, padding=1, dilation=(1, 2)), "MaxPool"),
    (lambda x: torch.max_pool2d(x, (3,), 2, ceil_mode=True), "MaxPool")])
def test_max_pools_over_pictures(tmp_path, pool, kind):
    assert kind in agrees(pictures(pool), torch.rand(8, 3, 8, 8), tmp_path / "net.onnx")


@pytest.mark.parametrize("pool, shape", [
    (nn.MaxPool1d(2), (6, 8)), (nn.MaxPool1d(3, 2, ceil_mode=True), (6, 8)), (lambda x: F.max_pool1d(x, 2), (6, 8)),
    (nn.MaxPool3d(2), (4, 6, 6, 8)), (lambda x: F.max_pool3d(x, (1, 2, 2), padding=(0, 1, 0)), (4, 6, 6, 8))])
def test_max_pools_over_one_and_three_dimensions(tmp_path, pool, shape):
    torch.manual_seed(0)
    net = Between(nn.Linear(8, 8), pool, nn.Linear(4, 4))
    assert "MaxPool" in agrees(net, torch.rand(8, *shape), tmp_path / "net.onnx")


def test_max_pools_that_onnx_does_not_know_are_refused(tmp_path):
    is_refused(pictures(nn.AdaptiveMaxPool2d(3)), torch.rand(4, 3, 8, 8), tmp_path / "net.onnx",
               "between makes 3 x 3 of 8 x 8 in windows of several sizes")
    net = Between(nn.Linear(8, 8), nn.MaxPool1d(2), nn.Linear(4, 4))
    is_refused(net, torch.rand(4, 8), tmp_path / "net.onnx", r"between pools inputs of \[8\]")


@pytest.mark.parametrize("moved, kind", [
    (nn.Upsample(scale_factor=2), "Resize"), (lambda x: F.interpolate(x, size=(24, 8)), "Resize"),
    (lambda x: F.interpolate(x, scale_factor=1.5, mode="nearest-exact"), "Gather"), (nn.Upsample(size=5), "Gather"),
    (nn.ZeroPad2d((1, 0, 2, 3)), "Pad"), (lambda x: F.pad(x, (1, 1)), "Pad"), (nn.ReflectionPad2d(2), "Gather"),
    (nn.CircularPad2d(1), "Gather"), (lambda x: x.permute(0, 1, 3, 2), "Transpose"),
    (lambda x: x.unsqueeze(2).squeeze(2).flip(3), "Gather"), (lambda x: x[:, :, 1:-1, ::2], "Gather"),
    (nn.ChannelShuffle(2), "Gather"), (lambda x: x.roll(1, 2).repeat(1, 1, 2, 1), "Gather")])
def test_moves_over_pictures(tmp_path, moved, kind):
    net = pictures(moved)
    nn.init.constant_(net.first.bias, 0.5)  # a 0 is then no code 0
    assert kind in agrees(net, torch.randn(8, 3, 8, 8), tmp_path / "net.onnx")


class Moves(nn.Module):
    """Parts that are moved apart and joined again, read by several layers."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        x = F.max_pool2d(F.pad(torch.relu(self.a(x)), (1, 1, 1, 1)), 2)
        left, right = x.chunk(2, 1)
        x = torch.cat([right, left], 1)
        x = (self.b(x) + self.c(F.pad(x, (0, 0)))).permute(0, 2, 3, 1)
        return self.fc(x).mean((1, 2), keepdim=True).squeeze(1).squeeze(1)


def test_moves_in_a_network(tmp_path):
    torch.manual_seed(0)
    assert {"Pad", "Gather", "Transpose", "ReduceMean"} <= set(
        agrees(Moves(), torch.randn(16, 3, 10, 10), tmp_path / "net.onnx"))


@pytest.mark.parametrize("moved, last", [(nn.PixelShuffle(2), nn.Conv2d(2, 4, 1)),
                                         (lambda x: F.pad(x, (-1, 1)), nn.Conv2d(8, 4, 1))])
def test_other_moves_are_refused(tmp_path, moved, last):
    is_refused(pictures(moved, last), torch.rand(4, 3, 8, 8), tmp_path / "net.onnx", "and is none of them")


@pytest.mark.parametrize("shape", [(), None, 5, (3, -1, 8), (3, 8, "8"), (0, 8, 8), (True, 8, 8)])
def test_a_shape_is_needed(tmp_path, shape):
    found = opened(pictures(nn.ReLU()), torch.rand(4, 3, 8, 8))
    with pytest.raises(ConfigError) as caught:
        to_onnx(found.compressed, found.skeleton, tmp_path / "net.onnx", shape)
    assert str(caught.value) == f"shape = {shape!r}: to_onnx needs that of one input, such as (3, 32, 32)"


@pytest.mark.parametrize("shape", [(3,), (4, 8, 8), (3, 8), (3, 1, 1)])
def test_a_wrong_shape_is_named(tmp_path, shape):
    found = opened(pictures(nn.AvgPool2d(2)), torch.rand(4, 3, 8, 8))
    with pytest.raises(ConfigError, match=r"^shape = \(.*\): Between cannot take a batch of 2 such float inputs: .*$"):
        to_onnx(found.compressed, found.skeleton, tmp_path / "net.onnx", shape)
    assert not list(tmp_path.iterdir())


def test_a_shape_may_be_a_list(tmp_path):
    found = opened(pictures(nn.ReLU()), torch.rand(4, 3, 8, 8))
    for shape in ([3, 8, 8], torch.Size([3, 8, 8])):
        assert to_onnx(found.compressed, found.skeleton, tmp_path / "net.onnx", shape).bytes


class Several(nn.Module):
    def __init__(self, packed):
        super().__init__()
        self.fc, self.packed = nn.Linear(8, 4), packed

    def forward(self, x):
        return self.packed(self.fc(x))


@pytest.mark.parametrize("packed, kind", [(lambda y: (y, y + y), "tuple"), (lambda y: {"y": y}, "dict"),
                                          (lambda y: [y, y], "list")])
def test_outputs_of_several_tensors_are_refused(tmp_path, packed, kind):
    is_refused(Several(packed), torch.rand(4, 8), tmp_path / "net.onnx",
               f"output is a {kind}: to_onnx needs a network of one tensor")


def test_tokens_and_operations_without_a_form_are_refused(tmp_path):
    is_refused(nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 4)), torch.randint(0, 9, (4, 5)), tmp_path / "net.onnx",
               r"input of 0 \(Embedding\) is integers: to_onnx needs a network of one float input")
    is_refused(nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1)), torch.rand(4, 3, 8, 8),
               tmp_path / "net.onnx", r"no form for the operation '1' \(GroupNorm\)")
