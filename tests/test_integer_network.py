"""The integer network as a whole: near the float one, policies, pools, and what it refuses."""

import pytest
import torch
from torch import nn

from methods import prune_then_quantize
from methods.core.artifact import ActivationQuantizer, Codebook, CompressedTensor
from methods.core.budget import Budget
from methods.core.errors import GraphError
from methods.core.fit.calibrate import calibrate
from methods.core.fit.quantize import fit_symmetric, quantize
from methods.core.graph.build import apply, assemble, weight_layers
from methods.core.train.task import top1
from methods.engine.exact import IntegerNetwork
from methods.engine.reference import ReferenceRun


@pytest.fixture(scope="module")
def inputs():
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def compressed_8_bit(model, inputs, **changes):
    """Every conv and linear on a symmetric 8-bit grid, edges calibrated on `inputs`."""
    weights = {name: quantize(layer.weight, fit_symmetric(layer.weight, 8), 8)
               for name, layer in weight_layers(model).items()}
    plain = assemble(model, weights)
    ranges = calibrate(apply(plain, model), inputs, 8)
    return assemble(model, weights, **{"activations": ranges} | changes)


def build(*layers):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(*(layer() for layer in layers)).eval()


def test_top1_near_float(tiny):
    model, task = tiny.model(), tiny.task()
    compressed = prune_then_quantize.compress(model, task, Budget(density=1.0, bits=8), prune_then_quantize.Config(),
                                              torch.Generator().manual_seed(0))
    integer = IntegerNetwork(compressed, model)
    batches = tiny.Batches(240, 5)
    float_top1 = top1(apply(compressed, model), batches.epoch(None))
    right = sum(int((integer(x).argmax(1) == y).sum()) for x, y in batches.epoch(None))
    assert float_top1 > 40 and abs(100 * right / 240 - float_top1) < 3  # chance is 25
    assert integer.float_nodes == [] and {layer.weight.width for layer in integer.layers.values()} == {8}


def test_model_and_file_are_left_alone(tiny, inputs):
    model = tiny.model()
    compressed = compressed_8_bit(model, inputs)
    before = tiny.fingerprint(model)
    first = IntegerNetwork(compressed, model)
    kept = inputs.clone()
    assert torch.equal(first(inputs), first(inputs)) and torch.equal(inputs, kept)
    assert tiny.same(tiny.fingerprint(model), before)


def test_batches_do_not_mix(tiny, inputs):
    network = IntegerNetwork(compressed_8_bit(tiny.model(), inputs), tiny.model())
    whole = network(inputs)
    assert torch.equal(torch.cat([network(x[None]) for x in inputs]), whole)
    assert torch.equal(network(inputs.contiguous(memory_format=torch.channels_last)), whole)


def test_float_policy(tiny, inputs):
    model = tiny.model()
    compressed = compressed_8_bit(model, inputs)
    all_integer = IntegerNetwork(compressed, model)
    seen = {}
    all_integer.see = lambda layer, codes, total: seen.update({layer.node.name: codes})
    all_integer(inputs)
    network = IntegerNetwork(compressed, model, ("fc",))
    assert network.float_nodes == ["fc"] and "fc" not in network.layers
    decoded = apply(compressed, model)
    assert torch.equal(network(inputs), decoded.fc(compressed.activations["fc"].decode(seen["fc"])))


def test_a_layer_without_codes_runs_in_float(tiny, inputs):
    model = tiny.model()
    compressed = compressed_8_bit(model, inputs)
    rest = {**compressed.rest, "conv1.weight": model.conv1.weight.detach()}
    weights = {name: tensor for name, tensor in compressed.weights.items() if name != "conv1"}
    ranges = {edge: q for edge, q in compressed.activations.items() if edge != "conv1"}  # its input is read as it is
    network = IntegerNetwork(type(compressed)(weights, rest, ranges), model)
    assert network.float_nodes == ["conv1"]
    codes = {}
    network.see = lambda layer, x, total: codes.update({layer.node.name: x})
    network(inputs)
    want = ranges["conv2"].encode(torch.relu(model.bn1(model.conv1(inputs))))
    assert torch.equal(codes["conv2"], want.detach())


@pytest.mark.parametrize("layer", ["conv1", "conv3", "fc"])
def test_a_layer_without_quantizer_runs_in_float(tiny, inputs, layer):
    """As if the caller's policy had named it; without any quantizer the model was not calibrated."""
    model = tiny.model()
    compressed = compressed_8_bit(model, inputs)
    ranges = {edge: q for edge, q in compressed.activations.items() if edge != layer}
    network = IntegerNetwork(type(compressed)(compressed.weights, compressed.rest, ranges), model)
    assert network.float_nodes == [layer] and bool(network(inputs).isfinite().all())
    with pytest.raises(GraphError, match="conv1 has no activation quantizer: calibrate"):
        IntegerNetwork(type(compressed)(compressed.weights, compressed.rest), model)


class Shortcut(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 2, 1)

    def forward(self, x):
        return self.last(torch.relu(self.conv(x) + x))


def test_an_add_beside_a_value_without_codes_runs_in_float(inputs):
    model = Shortcut().eval()
    compressed = compressed_8_bit(model, inputs)
    whole = IntegerNetwork(compressed, model)
    assert whole.pending == {"add:0": "conv"} and whole.float_nodes == []
    ranges = {edge: q for edge, q in compressed.activations.items() if edge != "add:1"}
    network = IntegerNetwork(type(compressed)(compressed.weights, compressed.rest, ranges), model)
    assert network.pending == {} and network.float_nodes == ["add"]
    codes = {}
    network.see = lambda layer, seen, total: codes.update({layer.node.name: (seen, total)})
    network(inputs)
    layer = network.layers["conv"]
    y = codes["conv"][1] * layer.gain.float().reshape(1, -1, 1, 1) + layer.shift.float().reshape(1, -1, 1, 1)
    assert torch.equal(codes["last"][0], ranges["last"].encode(torch.relu(y + inputs)))


def test_an_unknown_policy_layer_is_named(tiny, inputs):
    with pytest.raises(GraphError, match="conv9.*conv1, conv2"):
        IntegerNetwork(compressed_8_bit(tiny.model(), inputs), tiny.model(), ("conv9",))


@pytest.mark.parametrize("pool, window, stride", [
    (lambda: nn.AvgPool2d(2), 2, 2), (lambda: nn.AvgPool2d(3, 2), 3, 2), (lambda: nn.AvgPool2d(3, 1, padding=1), 3, 1),
    (lambda: nn.AdaptiveAvgPool2d(4), 2, 2), (lambda: nn.AdaptiveAvgPool2d(1), 8, 8)])
def test_average_pools_sum_integers(inputs, pool, window, stride):
    model = build(lambda: nn.Conv2d(3, 2, 3, padding=1), pool, lambda: nn.Conv2d(2, 2, 1))
    compressed = compressed_8_bit(model, inputs)
    q, nxt = compressed.activations["1"], compressed.activations["2"]
    network = IntegerNetwork(compressed, model)
    found = {}
    network.see = lambda layer, codes, total: found.update({layer.node.name: (layer, codes, total)})
    network(inputs)
    layer, _, total = found["0"]
    shape = (1, -1, 1, 1)
    y = total.float() * (layer.gain / q.scale).float().reshape(shape) + (
        layer.shift / q.scale + q.zero).float().reshape(shape)
    codes = torch.round(y).clamp(*q.code_range).long() - q.zero
    if stride == 1:
        codes = nn.functional.pad(codes, (1, 1, 1, 1))
    sums = codes.unfold(2, window, stride).unfold(3, window, stride).sum((-1, -2))
    step = torch.tensor(q.scale / window**2 / nxt.scale, dtype=torch.float64).float()
    want = torch.round(sums.float() * step + float(nxt.zero)).clamp(*nxt.code_range)
    assert torch.equal(found["2"][1], want)


@pytest.mark.parametrize("layer", [
    lambda: nn.AdaptiveAvgPool2d(4), lambda: nn.AdaptiveAvgPool2d((3, 7)),  # 6 x 6 -> 4 x 4: windows of 2 and of 3
    lambda: nn.AvgPool2d(3, 2, padding=1, count_include_pad=False), lambda: nn.AvgPool2d(4, 3, ceil_mode=True),
    lambda: nn.AvgPool2d(3, 2, padding=1), lambda: nn.AdaptiveAvgPool2d((3, 2)),
    lambda: nn.AdaptiveAvgPool2d((None, 1)),
    lambda: nn.AvgPool2d(3, 1, divisor_override=7), lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"),
    lambda: nn.Conv2d(2, 2, 3, padding=(2, 1), padding_mode="circular")])
def test_pools_and_pads_of_all_kinds_equal_the_reference(inputs, layer):
    model = build(lambda: nn.Conv2d(3, 2, 3), layer, lambda: nn.Conv2d(2, 2, 1))
    network = IntegerNetwork(compressed_8_bit(model, inputs), model)
    assert torch.equal(network(inputs), torch.from_numpy(ReferenceRun(network, inputs).real("2")))
    want = model(inputs).detach()
    assert float((network(inputs) - want).abs().max()) < 0.1 * float(want.abs().max())


class Dropped(nn.Module):
    """A dropout between a conv and the add that takes its accumulators; a value that an add reads twice."""

    def __init__(self):
        super().__init__()
        self.conv1, self.drop, self.conv2 = nn.Conv2d(3, 3, 3, padding=1), nn.Dropout(0.5), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        x = self.drop(self.conv1(x)) + x
        return self.conv2(x + x)


def test_dropout_before_an_add(inputs):
    model = build(Dropped)[0]
    compressed = compressed_8_bit(model, inputs)
    network = IntegerNetwork(compressed, model)
    assert network.pending and network.float_nodes == []
    want = model(inputs).detach()
    assert (network(inputs) - want).abs().max() < 0.05 * want.abs().max()


def test_sixteen_bit_tables_are_named_and_close(tiny, inputs):
    model = tiny.model()
    plain = compressed_8_bit(model, inputs)
    values = torch.tensor([0, 1.0, -1.0, 0.002, -0.0005])
    tensor = CompressedTensor.of(torch.randint(0, 5, model.fc.weight.shape), Codebook(values), 3)
    compressed = type(plain)({**plain.weights, "fc": tensor}, plain.rest, plain.activations)
    network = IntegerNetwork(compressed, model)
    assert network.layers["fc"].weight.width == 16 and network.layers["conv2"].weight.width == 8
    want = apply(compressed, model)(inputs)
    assert (network(inputs) - want).abs().max() < 0.1 * want.abs().max()


def test_narrow_signed_activations(tiny, inputs):
    model = tiny.model()
    compressed = compressed_8_bit(model, inputs)
    ranges = dict(compressed.activations)
    ranges["conv1"] = ActivationQuantizer(0.5, 0, 4, signed=True)
    codes = {}
    network = IntegerNetwork(type(compressed)(compressed.weights, compressed.rest, ranges), model)
    network.see = lambda layer, x, total: codes.update({layer.node.name: x})
    network(inputs * 4)
    assert codes["conv1"].min() == -8 and codes["conv1"].max() == 7
