"""Made-up inputs: the spectrum and moments of the noise, sizes, and what distillation is after."""

import pytest
import torch
from torch import nn

from benchmarks import networks
from methods.core.errors import CompressError
from methods.core.fit.images import PIXELS, distill_images, input_shape, mismatch, noise_images
from methods.core.graph.graph import trace


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_noise_has_the_moments_and_the_spectrum_that_it_says():
    images = noise_images(400, (3, 32, 32), seeded())
    assert images.dtype == torch.float32 and torch.equal(images, noise_images(400, (3, 32, 32), seeded()))
    flat = images.transpose(0, 1).flatten(1)
    assert torch.allclose(flat.mean(1), torch.zeros(3), atol=1e-5)
    assert torch.allclose(flat.var(1), torch.full((3,), 0.9**2 + 0.45**2), rtol=0.1)
    assert torch.allclose(flat.corrcoef()[0, 1:], torch.full((2,), 0.8), atol=0.03)
    power = torch.fft.fft2(images).abs().square().mean((0, 1))
    assert 10 < float(power[0, 2] / power[0, 8]) < 25  # amplitude 1 / f: power falls 16 times over two octaves


@pytest.mark.parametrize(("network", "channels", "shape"), [
    ("lenet5_caffe", 1, (1, 28, 28)), ("resnet20", 3, (3, 32, 32))])
def test_the_size_of_an_input_is_found_from_the_network(network, channels, shape):
    model = networks.build(network, 10, channels)
    assert input_shape(model) == shape
    assert next(model.parameters()).device.type == "cpu"


def test_networks_that_read_no_such_image_are_refused_in_one_line():
    with pytest.raises(CompressError, match="does not start with a convolution"):
        input_shape(nn.Sequential(nn.Flatten(), nn.Linear(10, 2)))
    with pytest.raises(CompressError, match="does not run on square images of 20 pixels a side"):
        input_shape(networks.build("lenet5_caffe", 10, 1), 20)
    with pytest.raises(CompressError, match="has no batch norm"):
        distill_images(networks.build("lenet5_caffe", 10, 1), 2, 1, (1, 28, 28), seeded())


def test_the_mismatch_is_the_one_that_is_written_down():
    norm = nn.BatchNorm2d(2, eps=0.0)
    norm.running_mean.copy_(torch.tensor([1.0, 0.0]))
    norm.running_var.copy_(torch.tensor([4.0, 1.0]))
    x = torch.tensor([[3.0, 0.0], [5.0, 6.0]])[:, :, None, None]  # means 4, 3; deviations 1, 3
    assert abs(float(mismatch(x, norm)) - ((9 / 4 + 0.25) + (9 + 4)) / 2) < 1e-6


def test_distilled_images_suit_the_norms_and_resume_to_the_same_bytes(tiny):
    model = tiny.model()
    before = tiny.fingerprint(model)

    def total(images):
        terms = []

        def see(node, inputs, output):
            if node.op == "bn":
                terms.append(mismatch(inputs[0], node.module))

        with torch.no_grad():
            trace(model).run(images, see)
        return float(sum(terms))

    images = distill_images(model, 24, 20, (3, 8, 8), seeded())
    assert total(images) < 0.3 * total(noise_images(24, (3, 8, 8), seeded()))
    assert PIXELS[0] <= float(images.min()) and float(images.max()) <= PIXELS[1]
    assert tiny.same(tiny.fingerprint(model), before)
    states = {}
    with pytest.raises(tiny.Interrupted):
        distill_images(model, 24, 20, (3, 8, 8), seeded(), run=tiny.Run(states, 16))
    assert states and torch.equal(distill_images(model, 24, 20, (3, 8, 8), seeded(), run=tiny.Run(states)), images)
