"""Folding batch norm: outputs equal the unfolded network, zeros and codes stay."""

import pytest
import torch
from torch import nn

from methods.core.artifact import Affine, Codebook, CompressedTensor
from methods.core.errors import CompressError
from methods.core.fit.quantize import find_scheme, quantize
from methods.core.graph.build import apply, assemble, weight_layers
from methods.core.graph.fold import fold_batchnorm, fold_codes, norm_ratio, norms_after, scale_channels


def stir(model: nn.Module, seed: int = 0) -> nn.Module:
    """Batch norms with statistics and factors of both signs, one factor exactly 0."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.running_mean.copy_(torch.randn(module.num_features, generator=draw))
                module.running_var.copy_(torch.rand(module.num_features, generator=draw) + 0.2)
                module.weight.copy_(torch.randn(module.num_features, generator=draw))
                module.bias.copy_(torch.randn(module.num_features, generator=draw))
                module.weight[1] = 0
    return model.eval()


def test_folded_network_computes_the_same(tiny):
    model = stir(tiny.model())
    before = tiny.fingerprint(model)
    folded, topology = fold_batchnorm(model)
    x = tiny.Batches(48, 5).inputs
    with torch.no_grad():
        assert torch.allclose(folded(x), model(x), atol=1e-5)
    assert topology.folded == {"conv1": "bn1", "conv2": "bn2", "conv3": "bn3"} == norms_after(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert tiny.same(tiny.fingerprint(model), before)


def test_the_definition_in_float64(tiny):
    model = stir(tiny.model())
    folded, _ = fold_batchnorm(model)
    for layer, norm in (("conv1", "bn1"), ("conv2", "bn2")):
        old, new, bn = (m.get_submodule(n) for m, n in ((model, layer), (folded, layer), (model, norm)))
        for c in range(8):
            factor = float(bn.weight[c].detach()) / (float(bn.running_var[c]) + bn.eps) ** 0.5
            assert torch.equal(new.weight[c], (old.weight[c].double() * factor).float())
            bias = 0.0 if old.bias is None else float(old.bias[c].detach())
            wanted = (bias - float(bn.running_mean[c])) * factor + float(bn.bias[c].detach())
            assert float(new.bias[c].detach()) == pytest.approx(wanted, rel=1e-6, abs=1e-7)


def test_zeros_stay_zeros(tiny):
    model = stir(tiny.model())
    mask = torch.rand(8, 8, 3, 3, generator=torch.Generator().manual_seed(1)) < 0.4
    with torch.no_grad():
        model.conv2.weight.mul_(mask)
    weight = fold_batchnorm(model)[0].conv2.weight
    alive = torch.arange(8) != 1  # channel 1 has the factor 0
    assert torch.equal((weight != 0)[alive], mask[alive]) and not bool((weight[1] != 0).any())


def test_linear_and_batchnorm_without_affine():
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4, affine=False), nn.ReLU(), nn.Linear(4, 2))
    model(torch.randn(50, 3))  # running statistics
    model.eval()
    folded, topology = fold_batchnorm(model)
    x = torch.randn(10, 3)
    assert topology.folded == {"0": "1"} and torch.allclose(folded(x), model(x), atol=1e-6)


class Shared(nn.Module):
    """A convolution whose output is read twice, and a batch norm that follows no convolution."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.first = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.BatchNorm2d(2)

    def forward(self, x):
        y = self.conv(self.first(x))
        return self.bn(y) + y


def test_a_batchnorm_is_folded_only_where_it_is_the_sole_reader():
    model = stir(Shared())
    folded, topology = fold_batchnorm(model)
    assert topology.folded == {} and tiny_equal(folded, model)


def tiny_equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_a_batchnorm_without_statistics_stays():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1, track_running_stats=False))
    folded, topology = fold_batchnorm(model)
    assert topology.folded == {} and tiny_equal(folded, model)


# --- folding behind the quantizer ---------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("per_channel", [True, False])
def test_folded_codes_are_the_codes_of_the_folded_weights(tiny, scheme, per_channel):
    model = stir(tiny.model())
    fit = find_scheme(scheme)
    codes = {name: quantize(layer.weight, fit(layer.weight, 4, per_channel), 4)
             for name, layer in weight_layers(model).items()}
    folded, weights, topology = fold_codes(model, codes)
    quantized = tiny.model()
    quantized.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, tensor in codes.items():
            quantized.get_submodule(name).weight.copy_(tensor.decode())
    x = tiny.Batches(48, 5).inputs
    network = apply(assemble(folded, weights, topology=topology), tiny.net())
    with torch.no_grad():
        assert torch.allclose(network(x), quantized.eval()(x), atol=1e-4)
    for name, tensor in weights.items():
        ratio = norm_ratio(model.get_submodule(topology.folded[name])) if name in topology.folded else torch.ones(4)
        exact = codes[name].decode().double() * ratio.reshape(-1, *[1] * (tensor.codes.ndim - 1))
        assert torch.allclose(tensor.decode().double(), exact, rtol=3e-7, atol=0)
        assert torch.equal(tensor.mask, codes[name].mask & (exact != 0)) and tensor.bits == 4


def test_mirrored_and_dead_channels():
    codes = torch.tensor([[0, 3, 15], [0, 3, 15], [0, 3, 15], [0, 3, 15]])
    grid = Affine(torch.full((4,), 0.5), torch.full((4,), 3, dtype=torch.int32), signed=False)
    factor = torch.tensor([2.0, -2.0, 0.0, 1e-60], dtype=torch.float64)
    out = scale_channels(CompressedTensor.of(codes, grid, 4), factor)
    assert out.decode().tolist() == [[-3, 0, 12], [3, 0, -12], [0, 0, 0], [0, 0, 0]]
    assert out.grid.zero.tolist() == [3, 12, 3, 3] and out.mask.sum() == 4


def test_a_codebook_cannot_take_a_factor_per_channel():
    tensor = CompressedTensor.of(torch.tensor([[0, 1]]), Codebook(torch.tensor([0.0, 1.0])), 1)
    with pytest.raises(CompressError, match="not into Codebook"):
        scale_channels(tensor, torch.ones(1, dtype=torch.float64))
