"""The integer kernels beside ONNX Runtime's QLinearConv and QLinearAdd, on factors that are hard to round.

ONNX Runtime     conv  rne(f32(acc + bias32) * m) + zero            add  rne(fma(a, ra, fma(b, rb, -zeros))) + zero
here             conv  rne(f32(acc) * m + f32(bias / s + zero))     add  rne((f32(a * m0) + b) + f32(c * m1))

The same where there is neither bias nor output zero point and, for the add, products of code and factor are exact.
Elsewhere sums near a half are rounded differently, by one code. Integers (acc) always agree.
"""

import numpy as np
import pytest
import torch
from torch import nn

from methods.core.artifact import ActivationQuantizer, Affine, CompressedModel, CompressedTensor
from methods.engine.exact import IntegerNetwork
from methods.engine.export.check import EXACT_SUMS
from methods.engine.fast import FastNetwork

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


def onnx_run(op, inputs, domain="", constants=(), **attributes):
    """One operation on numpy arrays, in ONNX Runtime on one thread; weights have to be `constants` (indices of inputs)
    of the network, for it to multiply them without sums that saturate."""
    names = [f"i{i}" for i in range(len(inputs))]
    values = [onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
              for name, array in zip(names, inputs, strict=True)]
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.UINT8, None)
    node = onnx.helper.make_node(op, names, ["y"], domain=domain, **attributes)
    parts = [onnx.numpy_helper.from_array(inputs[i], names[i]) for i in constants]
    given = {name: array for i, (name, array) in enumerate(zip(names, inputs, strict=True)) if i not in constants}
    graph = onnx.helper.make_graph([node], "one", [value for value in values if value.name in given], [out], parts)
    model = onnx.helper.make_model(graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 13),
                                                                       onnx.helper.make_opsetid("com.microsoft", 1)])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry(*EXACT_SUMS)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, given)[0]


def near_ties(count, power):
    """Float32 numbers near 2^-k / odd, k from `power` on: at them, and one unit in the last place beside them."""
    generator = torch.Generator().manual_seed(power)
    factors = 2.0 ** -torch.randint(power, power + 3, (count,), generator=generator) / (
        2 * torch.randint(0, 4, (count,), generator=generator) + 1)
    return torch.nextafter(factors, torch.tensor([0.0, 1.0])[torch.randint(0, 2, (count,), generator=generator)])


def codes_of(network_class, model, compressed, x):
    """{node: uint8 codes} of the values that are read under one quantizer."""
    network, found = network_class(compressed, model), {}
    network = network.exact if getattr(network, "unsupported", "") else network
    step = network._step

    def watched(node, given, values):
        forms = step(node, given, values)
        for form, value in forms.items():
            if isinstance(form, ActivationQuantizer):
                found[node.name] = value.to(torch.uint8).clone()
        return forms

    network._step = watched
    network(x)
    return found


CONVS = {"3x3": (lambda: nn.Conv2d(32, 48, 3, padding=1), 10), "stride": (lambda: nn.Conv2d(32, 48, 3, 2), 10),
         "1x1": (lambda: nn.Conv2d(32, 48, 1), 8), "grouped": (lambda: nn.Conv2d(32, 48, 3, groups=2), 9),
         "depthwise": (lambda: nn.Conv2d(32, 32, 3, padding=1, groups=32), 7)}


def conv_model(make, power, bias, zero_in, zero_out):
    """A conv with factors m = the scales of its weights, offsets round(bias) * m; and codes for it."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(make(), nn.Flatten(), nn.LazyLinear(2)).eval()
    x = torch.randint(0, 256, (4, 32, 12, 12), generator=generator)
    x[0] = 255
    model((x - zero_in).float())
    conv = model[0]
    w = torch.randint(-128, 128, conv.weight.shape, generator=generator)
    w[0], w[1] = 127, -128
    scale = near_ties(len(w), power)
    bias32 = torch.randint(-9999, 9999, conv.bias.shape, generator=generator) * bias
    conv.bias.data = (bias32.double() * scale.double()).float()
    weights = {"0": CompressedTensor.of(w, Affine(scale, torch.zeros(len(w), dtype=torch.int32)), 8)}
    rest = {name: value for name, value in model.state_dict().items() if name != "0.weight"}
    ranges = {"0": ActivationQuantizer(1.0, zero_in), "2": ActivationQuantizer(1.0, zero_out)}
    last = CompressedTensor.of(torch.ones_like(model[2].weight, dtype=torch.int32),
                               Affine(torch.tensor(1.0), torch.tensor(0, dtype=torch.int32)), 8)
    compressed = CompressedModel({**weights, "2": last}, {n: v for n, v in rest.items() if n != "2.weight"}, ranges)
    given = [x.to(torch.uint8).numpy(), np.float32(1), np.uint8(zero_in), w.to(torch.int8).numpy(), scale.numpy(),
             np.zeros(len(w), np.int8), np.float32(1), np.uint8(zero_out), bias32.to(torch.int32).numpy()]
    pads = [p for p in conv.padding] * 2
    found = onnx_run("QLinearConv", [np.asarray(array) for array in given], constants=(3, 5), group=conv.groups,
                     pads=pads, strides=list(conv.stride), kernel_shape=list(conv.kernel_size))
    return model, compressed, (x - zero_in).float(), torch.from_numpy(found)


@pytest.mark.parametrize("network", [IntegerNetwork, FastNetwork])
@pytest.mark.parametrize("zero_in", [0, 77])
@pytest.mark.parametrize("layer", CONVS)
def test_convs_are_equal(network, zero_in, layer):
    model, compressed, x, want = conv_model(*CONVS[layer], bias=0, zero_in=zero_in, zero_out=0)
    assert torch.equal(codes_of(network, model, compressed, x)["0"], want)
    assert 0.2 < ((want > 0) & (want < 255)).float().mean()


@pytest.mark.parametrize("network", [IntegerNetwork, FastNetwork])
@pytest.mark.parametrize("layer", ["3x3", "1x1", "grouped", "depthwise"])
def test_convs_with_bias_or_zero_point_are_one_code_apart(network, layer):
    """ONNX Runtime adds an int32 bias before the multiplication, and the zero point to the rounded code; here both
    are one float32 number that is added after it."""
    apart = 0
    for bias, zero in ((1, 0), (0, 100), (1, 100)):
        model, compressed, x, want = conv_model(*CONVS[layer], bias=bias, zero_in=3, zero_out=zero)
        found = codes_of(network, model, compressed, x)["0"]
        difference = (found.int() - want.int()).abs()
        apart += int((difference > 0).sum())
        assert difference.max() <= 1 and (difference > 0).float().mean() < 0.02
    assert apart > 0


class TwoBranches(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.last = nn.Conv2d(2, 4, 1), nn.Conv2d(2, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.last(torch.relu(self.one(x)) + torch.relu(self.two(x)))


def add_codes(network, scales):
    """Codes of two branches and of their sum, under quantizers of these scales (a, b, sum)."""
    model = TwoBranches().eval()
    generator = torch.Generator().manual_seed(1)
    one = Affine(torch.tensor(2.0**-7), torch.tensor(0, dtype=torch.int32))
    weights = {name: CompressedTensor.of(torch.randint(-128, 128, layer.weight.shape, generator=generator), one, 8)
               for name, layer in model.named_children()}
    a, b, total = (ActivationQuantizer(float(np.float32(scale))) for scale in scales)
    ranges = {"one": ActivationQuantizer(1.0), "two": ActivationQuantizer(1.0), "add:0": a, "add:1": b, "last": total}
    rest = {name: torch.randn(value.shape, generator=generator) for name, value in model.state_dict().items()
            if name.endswith("bias")}
    x = torch.randint(0, 256, (8, 2, 64, 64), generator=generator).float()
    found = codes_of(network, model, CompressedModel(weights, rest, ranges), x)
    return found["relu"], found["relu_1"], found["add"], (a, b, total)


def onnx_add(a, b, quantizers):
    arrays = [array for codes, q in zip((a, b), quantizers, strict=False)
              for array in (codes.numpy(), np.asarray(np.float32(q.scale)), np.asarray(np.uint8(0)))]
    arrays += [np.asarray(np.float32(quantizers[2].scale)), np.asarray(np.uint8(0))]
    return torch.from_numpy(onnx_run("QLinearAdd", arrays, "com.microsoft"))


@pytest.mark.parametrize("network", [IntegerNetwork, FastNetwork])
@pytest.mark.parametrize("scales", [(1, 1, 1), (1, 1, 2), (1.5, 0.5, 1), (95 / 256, 1.25, 1), (3, 1, 4)])
def test_adds_are_equal(network, scales):
    a, b, found, quantizers = add_codes(network, scales)
    assert torch.equal(found, onnx_add(a, b, quantizers)) and len(found.unique()) > 100


@pytest.mark.parametrize("scales, share", [((0.371, 0.593, 0.817), 0.01), ((1.5 + 2**-23, 0.7, 1), 0.1),
                                           ((1 / 3, 2 / 3, 1), 0.1)])
def test_adds_of_inexact_products_are_one_code_apart(scales, share):
    """ONNX Runtime fuses the first product with the sum where the CPU can; here every product is rounded, and the
    second factor has 16 bits: where the exact sums are ties (tenths, thirds), many codes differ."""
    a, b, found, quantizers = add_codes(IntegerNetwork, scales)
    difference = (found.int() - onnx_add(a, b, quantizers).int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < share
    assert torch.equal(add_codes(FastNetwork, scales)[2], found)
