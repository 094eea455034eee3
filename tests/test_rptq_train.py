"""The trained form: codes and prices against their definitions, the steering, the size at the end, contexts."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from methods import rptq_train
from methods.core.budget import Budget
from methods.core.errors import BudgetError, CompressWarning, ConfigError
from methods.core.file.storage import encode, to_bytes
from methods.core.fit.rates import LAM
from methods.core.graph.build import apply, weight_layers
from methods.core.graph.fold import fold_batchnorm
from methods.core.train.recipe import Distill, Recipe
from methods.core.train.task import Task
from methods.rptq_train.rated import RateAware, Rated, zero_bits
from tests.perceptron import Plain, entropy

SHORT = rptq_train.Config(recipe=Recipe(epochs=2, lr=0.01), sensitivity_inputs=16, calibration_inputs=48)


def dense_bytes(model):
    return 4 * sum(value.numel() for value in model.state_dict().values() if value.is_floating_point())


def compress(tiny, ratio, model=None, **config):
    return rptq_train.compress(tiny.model() if model is None else model, tiny.task(), Budget(size_ratio=ratio),
                               replace(SHORT, **config), torch.Generator().manual_seed(0))


def price(weight, lam, step=1.0, **kwargs):
    quantizer = Rated(weight, step, **kwargs)
    quantizer.price(weight)
    quantizer.charge(lam)
    return quantizer.codes(weight)


def test_without_a_price_codes_are_the_nearest():
    weight = torch.randn(50, 40) * 3
    assert torch.equal(price(weight, 0.0, contexts=False), weight.round())
    quantizer = Rated(weight, 0.5, contexts=False)
    assert torch.equal(quantizer(weight), (weight / 0.5).round() * 0.5)


def test_codes_minimise_error_and_bits():
    weight = torch.randn(200, 50, generator=torch.Generator().manual_seed(0)) * 1.5
    near, top = weight.abs().round().long(), 20
    share = (torch.bincount(near.reshape(-1), minlength=top).double() + 0.05) / (near.numel() + 0.05 * top)
    bits = -share.log2() + (torch.arange(top) > 0)
    bits = torch.where(share > 2 / near.numel(), bits, torch.inf)  # where there are hardly any codes lengths jump
    best = ((weight.abs()[..., None] - torch.arange(top)) ** 2 + LAM * bits).argmin(2) * weight.sign()
    found = price(weight, LAM, contexts=False)
    assert float((found != best).float().mean()) < 1e-3 and float((found == 0).float().mean()) > float(
        (near == 0).float().mean())


def test_the_gradient_goes_straight_to_every_weight():
    weight = nn.Parameter(torch.tensor([[0.2, 1.4, -3.2]]))
    (Rated(weight.detach(), 1.0, contexts=False)(weight) * torch.tensor([[1.0, 2.0, 3.0]])).sum().backward()
    assert weight.grad.tolist() == [[1.0, 2.0, 3.0]]


def test_context_prices_are_products_of_densities():
    kept = torch.zeros(4, 8, 5, dtype=torch.bool)
    kept[0], kept[1, :4], kept[2, 0, 0] = True, True, True
    zero, other = zero_bits(kept)
    assert torch.allclose(2**-zero + 2**-other, torch.ones(4, 8)) and bool((other >= zero - 1e-6).all())
    row, column, all_ = kept[1].float().mean(), kept[:, 3].float().mean(), kept.float().mean()
    assert float(2**-other[1, 3]) == pytest.approx(min(float(row * column / all_), 0.5), rel=0.1)
    assert float(other[3, 7]) > 5 > 1.01 > float(other[0, 0])  # a dead row is dear


def test_unused_units_die_in_contexts():
    weight = torch.zeros(40, 40)
    weight[:20, :20] = torch.randn(20, 20, generator=torch.Generator().manual_seed(0)) * 4
    weight[30, 30] = 0.7
    assert float(price(weight, LAM, contexts=True)[30, 30]) == 0 != float(weight[30, 30].round())
    strong = weight.clone()
    strong[30, 30] = 3.0
    assert float(price(strong, LAM, contexts=True)[30, 30]) == 3


@pytest.mark.parametrize("contexts, ratio", [(False, 0.07), (True, 0.03)])
def test_the_steering_reaches_the_size_and_the_file_has_it(tiny, tmp_path, contexts, ratio):
    torch.manual_seed(1)
    model = Plain()
    made = compress(tiny, ratio, model, contexts=contexts, start=1.5, falling=0.25,
                    recipe=Recipe(epochs=60, lr=0.01))
    limit = ratio * dense_bytes(model)
    assert (0.7 if contexts else 0.96) * limit <= len(to_bytes(made)[0]) <= limit  # units die
    if not contexts:
        split = encode(made, tmp_path / "a.jc")
        assert made.notes["entropy_bits"] / 8 == pytest.approx(split.codes + split.positions, rel=0.02)
        bits = sum(tensor.codes.numel() * entropy(tensor.codes.numpy()) for tensor in made.weights.values())
        assert 0.95 * bits / 8 < split.codes + split.positions < 1.02 * bits / 8  # classes of rows may cost less
    else:
        assert made.topology.widths["a"][0] < 112


def test_the_size_is_met_even_where_the_training_is_too_short(tiny):
    for ratio in (0.12, 0.2):
        size = len(to_bytes(compress(tiny, ratio))[0])
        assert 0.85 * ratio * dense_bytes(tiny.net()) <= size <= ratio * dense_bytes(tiny.net())


def test_the_file_holds_the_codes_that_were_trained(tiny, monkeypatch):
    """Weights gather at the thresholds: these must be the same to the bit, though the file could be larger."""
    outputs, inputs = [], tiny.task().calibration_inputs(50)

    def watched(student, *given, _train=rptq_train.train, **more):
        history = _train(student, *given, **more)
        with torch.no_grad():
            outputs.append(student(inputs))
        return history

    monkeypatch.setattr(rptq_train, "train", watched)
    made = compress(tiny, 0.6, recipe=Recipe(epochs=8, lr=0.05), c=0.2)
    with torch.no_grad():
        found = apply(made, tiny.model())(inputs)
    assert len(to_bytes(made)[0]) < 0.55 * dense_bytes(tiny.net())
    assert torch.allclose(found, outputs[0], atol=0.02 * float(outputs[0].abs().max()))


def test_a_file_that_is_too_large_loses_the_codes_nearest_to_their_threshold(tiny):
    model = Plain()
    with RateAware(model, dict.fromkeys(weight_layers(model), 0.02), 1e4, 0, False) as hooks:
        edge = float(hooks.quantizers["a"].edges[0])
    ending = rptq_train.Ending(model, Plain(), hooks, SHORT, 0.1)
    whole, size = ending.at(0.0)
    assert ending.fitted(size) is not None and len(to_bytes(ending.fitted(size))[0]) == size
    made = ending.fitted(int(0.95 * size))
    assert 0.985 * 0.95 * size <= len(to_bytes(made)[0]) <= 0.95 * size
    above = {name: (layer.weight.detach().abs() / 0.02) for name, layer in weight_layers(model).items()}
    lost = {name: (whole.weights[name].codes != 0) & (made.weights[name].codes == 0) for name in above}
    kept = {name: made.weights[name].codes != 0 for name in above}
    assert all(torch.equal(made.weights[n].codes[kept[n]], whole.weights[n].codes[kept[n]]) for n in above)
    assert 0 < int(lost["a"].sum()) < 0.2 * int(kept["a"].sum())
    assert float(above["a"][lost["a"]].max()) <= float(above["a"][kept["a"]].min()) + 1e-6 and edge > 0
    with pytest.raises(BudgetError, match="no file of at most 10 bytes"):
        ending.fitted(10)


def test_prices_stay_at_the_end_and_lam_only_rises(tiny):
    model = Plain()
    with RateAware(model, dict.fromkeys(weight_layers(model), 0.01), 1e4, 0, False, settling=1) as hooks:
        hooks.steps = 1
        bits, lam = hooks.quantizers["a"].bits.clone(), hooks.lam
        with torch.no_grad():
            hooks.behind("a").mul_(0.3)
        hooks.goal = 1e9
        hooks.refresh()
        assert hooks.lam == lam and torch.equal(hooks.quantizers["a"].bits, bits)
        hooks.goal = hooks.entropy / 2
        hooks.refresh()
        assert hooks.lam == pytest.approx(1.1 * lam) and torch.equal(hooks.quantizers["a"].bits, bits)
        edges = torch.arange(len(bits) - 1) + 0.5 + hooks.lam / 2 * bits.diff().clamp_min(0)
        assert torch.allclose(hooks.quantizers["a"].edges, edges.cummax(0).values)
        hooks.steps = 0
        hooks.refresh()
        assert not torch.equal(hooks.quantizers["a"].bits, bits)


@pytest.mark.parametrize("lam", [0.1, 3.0])
def test_a_rare_zero_stays_a_zero(lam):
    """Nine of ten weights are +-1: a 0 is dear. Were its threshold to fall for that, there would soon be none, and the
    steps that follow the batch norm would grow with every look."""
    weight = torch.ones(40, 50)
    weight[:, ::2] = -1
    weight[:, ::10] = 0.3
    quantizer = Rated(weight, 1.0, False)
    for _ in range(10):
        quantizer.price(weight)
        quantizer.charge(lam)
    assert torch.equal(quantizer.codes(weight) == 0, weight == 0.3)


@pytest.mark.parametrize("contexts", [False, True])
def test_damping_brings_weights_nearer_to_what_their_codes_stand_for(contexts):
    """Eight steps of lr 0.01 at damping 2: 0.16 of the way, at every eighth step; without damping not at all."""
    for damping, way in ((2.0, 0.16), (0.0, 0.0), (100.0, 1.0)):
        model = Plain()
        with RateAware(model, dict.fromkeys(weight_layers(model), 0.01), 1e4, 0, contexts, damping=damping) as hooks:
            weight = hooks.behind("a")
            before, decoded = weight.detach().clone(), model.a.weight.detach().clone()
            for _ in range(7):
                hooks.after_step(model, 0.01)
            assert torch.equal(weight, before)
            hooks.after_step(model, 0.01)
            assert torch.allclose(weight, before + way * (decoded - before), atol=1e-7) and weight.requires_grad


def test_the_goal_follows_the_real_file(tiny):
    model = Plain()
    with RateAware(model, dict.fromkeys(weight_layers(model), 0.01), 1e4, 0, False, weigh=lambda hooks: 3000,
                   limit=2000.0) as hooks:
        hooks.after_epoch(model, 0)
        assert hooks.goal == pytest.approx(hooks.entropy * 2 / 3)


def test_a_bare_copy_has_the_weights_behind_the_codes(tiny):
    model = tiny.model()
    with RateAware(model, dict.fromkeys(weight_layers(model), 0.05), 1e4, 10, False) as hooks:
        with torch.no_grad():
            hooks.behind("conv2").add_(0.01)
            model.bn1.running_mean.add_(1)
        bare = hooks.bare()
        assert torch.equal(bare.conv2.weight, hooks.behind("conv2"))
        assert torch.equal(bare.bn1.running_mean, model.bn1.running_mean)
        assert torch.equal(model.conv1.weight, hooks.quantizers["conv1"](hooks.behind("conv1")))  # as it was


def test_steps_are_those_of_the_folded_weight_at_the_start_and_stay(tiny):
    """u = |w| / s with s = s_l / |gamma / sigma|: the folded |w| / s_l. A batch norm that moves later does not move
    them, else sigma and the step follow each other without end."""
    model = tiny.model()
    with torch.no_grad():
        model.bn1.weight[0] *= -1
    folded, _ = fold_batchnorm(model)
    wanted = (folded.conv1.weight.detach().abs() / 0.05).round()
    with RateAware(model, dict.fromkeys(weight_layers(model), 0.05), 1e4, 10, False) as hooks:
        hooks.quantizers["conv1"].charge(0.0)
        before = hooks.quantizers["conv1"].step.clone()
        assert float((hooks.quantizers["conv1"].codes(hooks.behind("conv1")).abs() != wanted).float().mean()) < 0.01
        with torch.no_grad():
            model.bn1.weight[2] *= 3
            model.bn1.running_var *= 7
        hooks.refresh()
        assert torch.equal(hooks.quantizers["conv1"].step, before)
        assert hooks.quantizers["fc"].step.unique().tolist() == pytest.approx([0.05])


def test_the_file_is_the_trained_network_with_its_batch_norms(tiny):
    """Batch norms that have moved since the start, one of them mirrored: folded weight = code times the scale."""
    student, skeleton = tiny.model(), tiny.model()
    with RateAware(student, dict.fromkeys(weight_layers(student), 0.02), 1e4, 0, False) as hooks:
        with torch.no_grad():
            student.bn1.weight[0] *= -1
            student.bn1.weight[1] = 0
            student.bn2.running_var *= 5
        hooks.refresh(steer=False)
        inputs = tiny.task().calibration_inputs(20)
        with torch.no_grad():
            outputs = student(inputs)
    ending = rptq_train.Ending(student, skeleton, hooks, replace(SHORT, bias_bits=32), 1.0)
    made = ending.store(ending.codes())
    with torch.no_grad():
        assert torch.allclose(apply(made, skeleton)(inputs), outputs, atol=1e-5 * float(outputs.abs().max()))
    assert made.topology.folded == {"conv1": "bn1", "conv2": "bn2", "conv3": "bn3"}
    assert made.weights["conv1"].grid.scale.shape == (8,) and made.weights["fc"].grid.scale.ndim == 0
    halves = rptq_train.Ending(student, skeleton, hooks, SHORT, 1.0).store(ending.codes())
    scale = halves.weights["conv2"].grid.scale
    assert torch.equal(scale.half().float(), scale) or torch.equal(scale.bfloat16().float(), scale)


def test_the_wanted_size_falls_and_stays():
    layer = nn.Sequential(nn.Linear(20, 20))
    hooks = RateAware(layer, {"0": 0.01}, 100.0, 50, False)
    with hooks:
        seen = []
        for hooks.steps in (0, 25, 50, 90):
            seen.append(hooks.wanted())
    assert seen[0] == hooks.start > 1000 and seen[2] == seen[3] == pytest.approx(100)
    assert seen[1] == pytest.approx(math.sqrt(seen[0] * 100))
    assert type(layer[0].weight) is nn.Parameter


def test_mistakes(tiny):
    for config, message in (({"c": 0.0}, "above 0"), ({"falling": 1.5}, "together are at most 1"),
                            ({"settling": 0.6}, "at most 1"), ({"holding": 1.5}, "holding = 1.5: allowed is a share"),
                            ({"c": 0.1, "start": 3.0}, "start = 3.0 does nothing: it looks for c"),
                            ({"damping": -1.0}, "damping = -1.0: allowed"), ({"bias_bits": 8}, "16, 32")):
        with pytest.raises(ConfigError, match=message):
            replace(SHORT, **config)
    with pytest.raises(BudgetError, match="needs the budget field 'size_ratio'"):
        rptq_train.compress(tiny.model(), tiny.task(), Budget(), SHORT, torch.Generator())
    with pytest.raises(BudgetError, match="size_ratio = 0.01 .*allowed are numbers of 0"):
        compress(tiny, 0.01)
    with pytest.raises(ConfigError, match="c = 50: every code of this network is 0"):
        compress(tiny, 0.2, c=50.0)


def test_a_task_that_cannot_be_trained_on_is_refused_before_anything_is_measured(tiny, monkeypatch):
    monkeypatch.setattr(rptq_train, "begin", lambda *_: pytest.fail("sensitivities come first"))
    task = replace(tiny.task(), train=None, calibration=tiny.task().train)
    with pytest.raises(ConfigError, match="no training batches"):
        rptq_train.compress(tiny.model(), task, Budget(size_ratio=0.2), SHORT, torch.Generator().manual_seed(0))


def test_frozen_weights_do_not_stop_it(tiny):
    model = tiny.model()
    model.conv1.weight.requires_grad_(False)
    made = compress(tiny, 0.2, model=model)
    assert len(to_bytes(made)[0]) <= 0.2 * dense_bytes(model) and not model.conv1.weight.requires_grad


def test_a_layer_that_lost_every_code_is_said():
    """A budget of a few codes, which one layer takes from the other."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
    batches = [(torch.rand(32, 64), torch.arange(32) % 4) for _ in range(4)]
    config = replace(SHORT, recipe=Recipe(epochs=6, lr=0.02))
    with pytest.warns(CompressWarning, match=r"no code is left in 0.*: a longer training, a lower rate or a larger"):
        rptq_train.compress(network, Task.from_loader(batches, batches), Budget(size_ratio=256 / dense_bytes(network)),
                            config, torch.Generator().manual_seed(0))


def test_a_training_that_loses_every_code_goes_on():
    model = Plain()
    with RateAware(model, dict.fromkeys(weight_layers(model), 100.0), 1e4, 0, False, weigh=lambda hooks: 1000,
                   limit=900.0) as hooks:
        hooks.after_epoch(model, 0)
        hooks.refresh()
        assert hooks.entropy == 0 < hooks.goal and 0 < hooks.lam < LAM


def test_a_network_that_is_one_layer(tiny):
    torch.manual_seed(0)
    layer, batches = nn.Linear(200, 10), [(torch.randn(32, 200), torch.arange(32) % 10) for _ in range(4)]
    made = rptq_train.compress(layer, Task.from_loader(batches, batches), Budget(size_ratio=0.1),
                               replace(SHORT, recipe=Recipe(epochs=3, lr=0.01)), torch.Generator().manual_seed(0))
    assert len(to_bytes(made)[0]) <= 0.1 * dense_bytes(layer) and apply(made, layer).weight.any()


def test_the_teacher_is_listened_to(tiny):
    inputs = tiny.Batches(60, 7).inputs
    recipes = [Recipe(epochs=12, lr=0.02, distill=distill) for distill in (Distill(2.0, 0.0), None)]
    students = [apply(compress(tiny, 0.25, recipe=recipe), tiny.net()) for recipe in recipes]
    with torch.no_grad():
        wanted = tiny.model().eval()(inputs).softmax(1)
        gap = [float((student(inputs).softmax(1) - wanted).square().mean()) for student in students]
    assert gap[0] < 0.8 * gap[1]
