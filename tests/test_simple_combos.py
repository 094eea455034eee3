"""Prune-then-quantize and quantize-then-prune: the tests of simple_combos.md, section 6, on the whole method."""

import pytest
import torch
from torch import nn

from methods import data_of
from methods import prune_then_quantize as pq
from methods import quantize_then_prune as qp
from methods.core.artifact import Affine
from methods.core.budget import Budget
from methods.core.errors import BudgetError, CompressError, ConfigError, GraphError
from methods.core.file.storage import to_bytes
from methods.core.fit.calibrate import calibrate
from methods.core.fit.prune import keep_count
from methods.core.fit.quantize import fit_symmetric, quantize
from methods.core.graph.build import apply, weight_layers
from methods.core.graph.fold import fold_batchnorm
from methods.core.train.finetune import Recipe
from methods.core.train.task import Task

BOTH = pytest.mark.parametrize("method", [pq, qp], ids=["pq", "qp"])
SCHEMES = pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
SHORT = Recipe(epochs=1, lr=0.01)


def compress(method, model, task, density, bits, **config):
    return method.compress(model, task, Budget(density=density, bits=bits), method.Config(**config),
                           torch.Generator().manual_seed(0))


def sparsity(tensor) -> float:
    return float((tensor.decode() == 0).double().mean())


@BOTH
@SCHEMES
@pytest.mark.parametrize("bits", [4, 8])
def test_pruned_codes_are_the_zero_point_and_sparsity_never_falls(tiny, method, scheme, bits):
    out = compress(method, tiny.model(), tiny.task(), 0.4, bits, scheme=scheme)
    for tensor in out.weights.values():
        n = tensor.mask.numel()
        assert torch.equal(tensor.codes[~tensor.mask], tensor.grid.zero_codes(tensor.codes)[~tensor.mask])
        assert sparsity(tensor) >= (n - keep_count(n, 0.4)) / n
        if scheme == "asymmetric":  # the zero-point trap: a code 0 is no zero
            assert float((tensor.codes == 0).double().mean()) < 0.3 < sparsity(tensor)


@BOTH
@SCHEMES
def test_nothing_pruned_is_post_training_quantization(tiny, method, scheme):
    model = tiny.model()
    out, fit = compress(method, model, tiny.task(), 1.0, 8, scheme=scheme), method.find_scheme(scheme)
    folded, topology = fold_batchnorm(model)
    assert out.topology.folded == topology.folded
    for name, layer in weight_layers(folded).items():
        plain = quantize(layer.weight, fit(layer.weight, 8), 8)
        assert torch.allclose(out.weights[name].grid.scale, plain.grid.scale, rtol=1e-6)
        gap = (out.weights[name].decode() - plain.decode()).abs().flatten(1) / plain.grid.scale[:, None]
        assert float(gap.max()) < 1.01 and float((gap > 0.5).float().mean()) < 0.01  # one step, at rounding ties
        assert torch.equal(out.rest[f"{name}.bias"], layer.bias)


@BOTH
def test_one_grid_for_a_layer_or_one_for_each_channel(tiny, method):
    scales = [compress(method, tiny.model(), tiny.task(), 0.5, 4, per_channel=each).weights["fc"].grid.scale.unique()
              for each in (False, True)]
    assert len(scales[0]) == 1 and len(scales[1]) == 4


@BOTH
def test_the_range_method_is_the_one_asked_for(tiny, method):
    model, task = tiny.model(), tiny.task()
    out = compress(method, model, task, 0.5, 4, range_method="mse", activation_bits=4)
    assert out.activations == calibrate(apply(out, model), task.calibration_inputs(1024), 4, "mse")


def test_both_orders_agree_where_nothing_is_pruned(tiny):
    one, two = (compress(method, tiny.model(), tiny.task(), 1.0, 4) for method in (pq, qp))
    assert tiny.same(one.state_dict(), two.state_dict()) and one.activations == two.activations


def test_sixteen_bits_are_pruning_alone(tiny):
    model = tiny.model()
    out = compress(pq, model, tiny.task(), 0.3, 16)
    folded, _ = fold_batchnorm(model)
    for name, layer in weight_layers(model).items():
        bar = layer.weight.detach().abs().reshape(-1).sort().values[-keep_count(layer.weight.numel(), 0.3)]
        pruned = folded.get_submodule(name).weight.detach() * (layer.weight.abs() >= bar)
        assert torch.allclose(out.weights[name].decode(), pruned, atol=float(pruned.abs().max()) / 2**15)


@BOTH
def test_activations_are_calibrated_on_the_finished_network(tiny, method):
    model, task = tiny.model(), tiny.task()
    out = compress(method, model, task, 0.2, 4, calibration_inputs=50, activation_bits=6)
    assert out.activations == calibrate(apply(out, model), task.calibration_inputs(50), 6)
    assert out.activations != calibrate(model, task.calibration_inputs(50), 6) and out.ranges_by == "method"


@BOTH
@SCHEMES
def test_after_training_the_count_still_holds(tiny, method, scheme):
    trained = {"retrain": SHORT, "aware": SHORT} if method is pq else {"aware": SHORT}
    out = compress(method, tiny.model(), tiny.task(), 0.3, 4, scheme=scheme, **trained)
    plain = compress(method, tiny.model(), tiny.task(), 0.3, 4, scheme=scheme)
    for name, tensor in out.weights.items():
        assert tensor.kept <= keep_count(tensor.mask.numel(), 0.3), name
    assert all(not tiny.same(out.weights[n].decode(), plain.weights[n].decode()) for n in ("conv1", "conv2", "conv3"))


def test_one_density_over_the_network_or_one_per_layer(tiny):
    out = compress(pq, tiny.model(), tiny.task(), 0.3, 16, scope="global")
    total = sum(tensor.mask.numel() for tensor in out.weights.values())
    assert sum(tensor.kept for tensor in out.weights.values()) == keep_count(total, 0.3)
    given = {"conv1": 1.0, "conv2": 0.1, "conv3": 0.25, "fc": 0.5}
    for method in (pq, qp):
        bits = {**dict.fromkeys(given, 4), "fc": 8}
        out = compress(method, tiny.model(), tiny.task(), given, bits)
        assert {name: tensor.bits for name, tensor in out.weights.items()} == bits
        for name, tensor in out.weights.items():
            assert tensor.kept <= keep_count(tensor.mask.numel(), given[name]), name
    with pytest.raises(ConfigError, match="takes one density"):
        compress(pq, tiny.model(), tiny.task(), given, 4, scope="global")


# --- the ranking of quantize-then-prune -------------------------------------------------------------------


def test_saliency_is_in_units_of_the_weight_not_of_the_code():
    weight = torch.rand(2, 50, generator=torch.Generator().manual_seed(0)) + 0.5
    weight[1] /= 100  # the same codes on a scale of a hundredth
    tensor = quantize(weight, fit_symmetric(weight, 8), 8)
    mask = qp.keep_salient(tensor, weight, 50)
    assert mask[0].all() and not mask[1].any()
    codes = tensor.codes.abs().reshape(-1)
    by_code = codes >= codes.sort().values[-50]  # the naive ranking mixes the channels
    assert 15 < int(by_code[:50].sum()) < 35


def test_saliency_counts_from_the_zero_point():
    weight = torch.tensor([[-1.0, -0.9, 0.0, 0.1, 2.0]])
    tensor = quantize(weight, Affine(torch.tensor([0.1]), torch.tensor([10], dtype=torch.int32), signed=False), 5)
    assert tensor.codes.tolist() == [[0, 1, 10, 11, 30]]
    assert qp.keep_salient(tensor, weight, 3).tolist() == [[True, True, False, False, True]]


def test_ties_are_broken_by_the_float_weight_then_by_position():
    weight = torch.tensor([[0.9, 1.1, -1.2, 1.1, 0.2, -0.3]])
    tensor = quantize(weight, Affine(torch.tensor([1.0]), torch.tensor([0], dtype=torch.int32)), 2)
    assert tensor.codes.abs().tolist() == [[1, 1, 1, 1, 0, 0]]
    order = [2, 1, 3, 0, 5, 4]
    for count in range(7):
        assert qp.keep_salient(tensor, weight, count).reshape(-1).nonzero()[:, 0].tolist() == sorted(order[:count])


def test_pruning_codes_costs_more_than_coding_survivors(tiny):
    """Section 3.5: the two orders are alike at 8 bits; at few bits codes already rounded to 0 misguide the ranking."""
    model = tiny.model()
    dense = fold_batchnorm(model)[0].conv3.weight.detach()
    error = {(method, bits): float((compress(method, model, tiny.task(), 0.7, bits).weights["conv3"].decode() - dense)
                                   .square().sum()) for method in (pq, qp) for bits in (8, 3)}
    assert error[qp, 8] == pytest.approx(error[pq, 8], rel=0.05) and error[qp, 3] > 1.2 * error[pq, 3]


# --- user mistakes ------------------------------------------------------------------------------------------


def forbidden(tiny):
    class Batches(tiny.Batches):
        def epoch(self, generator):
            raise AssertionError("trained or calibrated before the settings were checked")

    return Task(Batches(24, 0), Batches(24, 1))


@pytest.mark.parametrize("settings, error", [
    ({"scheme": "uniform"}, "symmetric, asymmetric"), ({"scope": "layer"}, "'local', 'global'"),
    ({"bits": 1}, "at least 2"), ({"activation_bits": 0}, r"allowed is 1\.\.16"),
    ({"calibration_inputs": 0}, "at least 1")])
def test_settings_are_refused_before_any_training(tiny, settings, error):
    with pytest.raises(ConfigError, match=error):
        compress(pq, tiny.model(), forbidden(tiny), 0.5, retrain=SHORT, **{"bits": 4} | settings)
    if "scope" not in settings:
        with pytest.raises(ConfigError, match=error):
            compress(qp, tiny.model(), forbidden(tiny), 0.5, aware=SHORT, **{"bits": 4} | settings)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x, y):
        return self.conv(x) + y


@BOTH
def test_networks_that_cannot_be_compressed_are_refused_before_any_training(tiny, method):
    for model, error, message in (
            (Two(), GraphError, "one input tensor here; forward of Two takes x, y"),
            (nn.Sequential(nn.ReLU()), BudgetError, "no Conv2d and no Linear"),
            (nn.Sequential(nn.Conv2d(3, 4, 1)).double(), CompressError, "float64")):
        with pytest.raises(error, match=message):
            compress(method, model, forbidden(tiny), 0.5, 4, aware=SHORT)


@pytest.mark.parametrize("method, config, data", [
    (pq, {}, "calibration"), (pq, {"rounding": "gptq"}, "calibration"), (pq, {"widths": "sensitivity"}, "held_out"),
    (pq, {"rates": "sensitivity"}, "held_out"), (pq, {"retrain": SHORT}, "train"), (pq, {"aware": SHORT}, "train"),
    (qp, {}, "calibration"), (qp, {"aware": SHORT}, "train")])
def test_it_sees_no_more_than_its_settings_need(tiny, method, config, data):
    """And runs on just that."""
    assert data_of(method, method.Config(**config)) == data
    model = tiny.model()
    whole, less = (compress(method, model, task, 0.5, 4, calibration_inputs=24, **config)
                   for task in (tiny.task(), tiny.task().seen_as(data)))
    assert to_bytes(whole)[0] == to_bytes(less)[0]


@pytest.mark.parametrize("rounding", ["nearest", "gptq", "descent"])
def test_inputs_that_are_not_finite_are_refused(tiny, rounding):
    """One NaN among the inputs: no rounding may look for codes in what follows from it."""
    task = tiny.task()
    task.train.inputs[5, 1, 2, 3] = float("nan")
    with pytest.raises(CompressError, match="not finite.*look at the calibration inputs$"):
        compress(pq, tiny.model(), task, 0.5, 4, rounding=rounding)
