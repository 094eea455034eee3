"""Activation ranges: what was seen, by the definition, and nothing that was not."""

import pytest
import torch
from torch import nn

from methods.core.artifact import ActivationQuantizer
from methods.core.errors import CompressError, ConfigError
from methods.core.fit.calibrate import BATCH, calibrate, quantizer_of
from methods.core.graph.graph import trace


def test_ranges_are_the_extremes_of_what_each_edge_reads(tiny):
    model, inputs = tiny.model(), tiny.Batches(BATCH + 30, 3).inputs  # more than one batch
    read = {}

    def see(node, values, output):
        read.update(zip(node.edges(), (value.detach().clone() for value in values), strict=False))

    trace(model).run(inputs, see)
    found = calibrate(model, inputs)
    assert set(found) == {"conv1", "conv2", "add:1", "conv3", "pool2", "fc"}  # add:0 is taken in conv2's accumulators
    for edge, quantizer in found.items():
        low, high = min(float(read[edge].min()), 0.0), max(float(read[edge].max()), 0.0)
        assert quantizer.scale == pytest.approx((high - low) / 255, rel=1e-5)
        assert quantizer.zero == round(-low / quantizer.scale) and (quantizer.bits, quantizer.signed) == (8, False)
    assert found["conv1"].zero > 50 and found["conv2"].zero == 0  # raw pictures; behind a ReLU
    assert found["conv2"] == found["add:1"]  # one tensor, two readers, one form


def test_in_place_addition_and_relu_do_not_disturb_the_ranges():
    class Block(nn.Module):
        def __init__(self, inplace):
            super().__init__()
            self.a, self.b, self.inplace = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), inplace
            self.relu, self.pool = nn.ReLU(inplace=inplace), nn.AdaptiveAvgPool2d(1)

        def forward(self, x):
            y = self.relu(self.a(x))
            if self.inplace:
                x += y
            else:
                x = x + y
            return self.pool(self.b(x))

    plain, inplace = Block(False), Block(True)
    inplace.load_state_dict(plain.state_dict())
    inputs = torch.randn(20, 3, 4, 4)
    before = inputs.clone()
    assert calibrate(plain, inputs) == calibrate(inplace, inputs) and torch.equal(inputs, before)


def test_evaluation_mode_without_gradients_and_the_model_as_it_was(tiny):
    model = tiny.model().train()
    before = tiny.fingerprint(model)
    inputs = tiny.Batches(24, 3).inputs
    assert calibrate(model, inputs) == calibrate(tiny.model().eval(), inputs)  # neither dropout nor batch statistics
    assert tiny.same(tiny.fingerprint(model), before)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 16])
@pytest.mark.parametrize("low, high", [(0.0, 5.0), (-3.0, 0.0), (-1.0, 2.0), (1.0, 4.0), (-4.0, -1.0), (0.0, 0.0)])
def test_zero_is_a_code_and_the_range_is_covered(bits, low, high):
    quantizer = quantizer_of(low, high, bits)
    x = torch.linspace(low, high, 101)
    codes = quantizer.encode(x)
    assert float(quantizer.decode(quantizer.encode(torch.zeros(1)))) == 0.0
    assert float(codes.min()) >= 0 and float(codes.max()) <= 2**bits - 1 and torch.equal(codes, codes.round())
    # Rounding the zero point moves the range by up to half a step.
    assert float((quantizer.decode(codes) - x).abs().max()) <= quantizer.scale * 1.001


def test_codes_round_half_to_even():
    quantizer = ActivationQuantizer(0.5, 3, 4)
    assert quantizer.encode(torch.tensor([-9.0, -0.25, 0.25, 0.75, 1.25, 99.0])).tolist() == [0, 3, 3, 5, 5, 15]
    signed = ActivationQuantizer(1.0, 0, 4, signed=True)
    assert signed.encode(torch.tensor([-99.0, 99.0])).tolist() == [-8, 7]


def test_what_cannot_be_calibrated_is_refused(tiny):
    model, inputs = tiny.model(), tiny.Batches(24, 3).inputs
    with pytest.raises(ConfigError, match="'histogram'.*minmax"):
        calibrate(model, inputs, method="histogram")
    for bits in (0, -1, 17):
        with pytest.raises(ConfigError, match="allowed is 1..16"):
            calibrate(model, inputs, bits)
    with pytest.raises(ConfigError, match="at least 1"):
        calibrate(model, inputs[:0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [0, BATCH + 1])
def test_activations_that_are_not_finite_are_refused(tiny, value, where):
    inputs = tiny.Batches(BATCH + 24, 3).inputs
    inputs[where, 0, 0, 0] = value
    with pytest.raises(CompressError, match="not finite"):
        calibrate(tiny.model(), inputs)
