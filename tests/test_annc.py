"""ANNC: the updates by their definitions, the stored layer, and fine-tuning."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from methods.annc import Config, JointHooks, compress
from methods.annc.codebooks import OnCodebook, Refresh, store
from methods.annc.knapsack import choose_options
from methods.core.budget import Budget
from methods.core.graph.build import weight_layers
from methods.core.train.finetune import Recipe

SHORT = Config(recipe=Recipe(epochs=3, lr=0.05), start_bits=3)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def weights_of(model):
    return {name: layer.weight for name, layer in weight_layers(model).items()}


def total(model):
    return sum(w.numel() for w in weights_of(model).values())


def spent(hooks):
    return sum(b * int((w != 0).sum()) for b, w in zip(hooks.bits, hooks.weights, strict=True))


def run(tiny, ratio=0.03, config=SHORT, **fields):
    return compress(tiny.model(), tiny.task(**fields), Budget(data_ratio=ratio), config, seeded())


# --- the updates --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [1e-9, 0.3, 1e9])
def test_the_proximal_pull_is_its_argmin(tiny, beta):
    """argmin_w |w - w'|^2 / 2 + beta / 2 |w - (V - Y)|^2, with beta = lr rho."""
    model = tiny.model()
    hooks = JointHooks(model, 10_000, replace(SHORT, rho=0.5))
    hooks.started = True
    for i, toward in enumerate(hooks.toward):
        toward.copy_(torch.randn(toward.shape, generator=seeded(i)))
    before = [w.detach().clone() for w in hooks.weights]
    hooks.after_step(model, beta / 0.5)
    for w, old, toward in zip(hooks.weights, before, hooks.toward, strict=True):
        gradient = (w.detach() - old).double() + beta * (w.detach() - toward).double()
        assert float(gradient.abs().max()) <= 1e-5 * (1 + beta)
        if beta != 0.3:
            assert torch.allclose(w, old if beta < 1 else toward, atol=1e-6)


def test_dual_is_the_sum_of_differences_and_the_copy_is_of_w_plus_y(tiny, monkeypatch):
    model = tiny.model()
    hooks = JointHooks(model, math.floor(0.04 * 32 * total(model)), SHORT)
    assert all(map(torch.equal, hooks.toward, hooks.weights)) and hooks.bits == [3] * 4  # V = W, Y = 0
    sums = [torch.zeros_like(w) for w in hooks.weights]
    for epoch in range(5):
        with torch.no_grad():
            for i, w in enumerate(hooks.weights):
                w.add_(0.05 * torch.randn(w.shape, generator=seeded(10 * epoch + i)))
        hooks.after_epoch(model, epoch)
        assert spent(hooks) <= hooks.limit
        for i, w in enumerate(hooks.weights):
            copied = hooks.toward[i] + hooks.dual[i]  # V
            values = copied[copied.abs() > 1e-6].round(decimals=5).unique()
            assert len(values) <= 2 ** hooks.bits[i]
            seen = w.detach() + sums[i]
            assert float((seen - copied).norm()) < float(seen.norm())  # V is near W + Y, dense as that is
            sums[i] += w.detach() - copied
            assert torch.allclose(hooks.dual[i], sums[i], atol=1e-5)
    assert epoch == 4 and any(bool((y[w == 0] != 0).any()) for y, w in zip(hooks.dual, hooks.weights, strict=True))


def test_weights_on_the_budget_and_on_few_values_stay(tiny):
    model = tiny.model()
    with torch.no_grad():
        for w in weights_of(model).values():
            w.copy_(0.5 * w.sign() * (torch.rand(w.shape, generator=seeded()) < 0.2))
    hooks = JointHooks(model, 32 * total(model), SHORT)
    before = [w.detach().clone() for w in hooks.weights]
    for epoch in range(3):
        hooks.update(epoch)
        assert all(map(torch.equal, hooks.weights, before)) and not any(bool(y.any()) for y in hooks.dual)
        assert all(map(torch.equal, hooks.toward, before)) and hooks.gap == 0.0


def test_bits_follow_from_a_knapsack_of_distortions(tiny):
    """The same knapsack on distortions computed here, by definition, with |W|_0 as the cost of a bit."""
    model = tiny.model()
    hooks = JointHooks(model, 4000, SHORT)
    hooks.project()
    kept = hooks.count_kept()
    seen = [w.detach() for w in hooks.weights]
    codebooks = hooks.quantize(seen, 0)
    assert spent(hooks) <= 4000
    losses = []
    for i, x in enumerate(seen):
        alone = JointHooks(model, 10**9, SHORT)
        row = []
        for bits in range(1, 9):
            alone.bits = [bits] * 4
            alone.config = replace(SHORT, bits_epochs=0)
            points = torch.from_numpy(alone.quantize(seen, 0)[i])
            row.append(float((x.double().reshape(-1, 1) - points).abs().amin(1).square().sum()))
        losses.append(row)
        assert len(codebooks[i]) <= 2 ** hooks.bits[i] + 1 and 0.0 in codebooks[i]
    costs = [[b * k for b in range(1, 9)] for k in kept]
    assert hooks.bits == [1 + option for option in choose_options(costs, losses, 4000)]
    assert len(set(hooks.bits)) > 1 and spent(hooks) > 3200  # neither uniform nor idle
    with torch.no_grad():
        hooks.weights[1].zero_()
    hooks.quantize(seen, 1)  # W + Y is not 0, but |W|_0 is: it costs nothing, and gets the narrowest width
    assert hooks.bits[1] == 1


def test_state_survives(tiny):
    model = tiny.model()
    hooks, other = (JointHooks(model, 3000, SHORT) for _ in range(2))
    hooks.after_step(model, 0.1)
    hooks.after_epoch(model, 0)
    assert not tiny.same(other.state(), hooks.state())
    other.restore(hooks.state())
    assert tiny.same(other.state(), hooks.state()) and other.started


# --- the stored layer ---------------------------------------------------------------------------------------


def test_a_stored_layer_has_2_to_the_b_values_beside_0():
    weight = torch.randn(8, 40, generator=seeded())
    weight[weight.abs() < 0.5] = 0.0
    for bits in (1, 2, 4):
        tensor = store(weight, bits, True)
        assert tensor.bits == bits and len(tensor.grid.values) == 2**bits and not tensor.grid.has_zero()
        assert not bool((tensor.mask & (weight == 0)).any())
        points = torch.cat([tensor.grid.values, torch.zeros(1)])
        near = (weight.reshape(-1, 1) - points).abs().amin(1).reshape(weight.shape)
        assert torch.allclose((weight - tensor.decode()).abs(), near, atol=1e-6)
        plain = store(weight, bits, False)
        assert len(plain.decode().unique()) <= 2**bits
    assert store(torch.zeros(3, 3), 2, True).kept == 0
    assert store(torch.tensor([[0.0, 2.0], [-1.0, 2.0]]), 1, True).decode().tolist() == [[0.0, 2.0], [-1.0, 2.0]]
    assert store(torch.full((2, 2), 3.0), 2, False).decode().tolist() == [[3.0, 3.0], [3.0, 3.0]]


# --- fine-tuning --------------------------------------------------------------------------------------------


def test_fine_tuning_keeps_zeros_and_widths(tiny):
    plain = run(tiny)
    config = replace(SHORT, finetune=Recipe(epochs=3, lr=0.01))
    model, tuned = tiny.model(), run(tiny, config=config)
    assert tuned.notes["bits"] == plain.notes["bits"] and tuned.notes["kept"] == plain.notes["kept"]
    changed = False
    for name, tensor in tuned.weights.items():
        assert tensor.bits == plain.weights[name].bits and len(tensor.grid.values) <= 2**tensor.bits
        changed = changed or not torch.equal(tensor.decode(), plain.weights[name].decode())
    assert changed and sum(t.kept * t.bits for t in tuned.weights.values()) <= tuned.notes["limit"]
    assert type(model.conv1) is nn.Conv2d
    quantized = run(tiny, 0.12, replace(config, mode="quantize"))
    assert all(len(t.decode().unique()) <= 2**t.bits for t in quantized.weights.values())


def test_codebooks_are_refreshed_20_times_an_epoch():
    class Layer(nn.Linear):
        calls = []

    layer = Layer(4, 4, bias=False)
    nn.utils.parametrize.register_parametrization(layer, "weight", OnCodebook(layer.weight, 1, True))
    book = layer.parametrizations.weight[0]
    book.refresh = lambda weight, iterations: layer.calls.append(iterations)
    for steps, times in ((40, 20), (7, 7)):
        hooks = Refresh([layer], steps, 2)
        layer.calls.clear()
        for _ in range(steps):
            hooks.after_step(None, 0.1)
        assert layer.calls == [5] * times
        hooks.after_epoch(None, 0)
        assert layer.calls[-1] == 100
        hooks.after_epoch(None, 1)
        assert layer.calls == [5] * times + [100]  # what was trained is what stays
    del book.refresh
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(2.0)
    before = book.points.clone()
    book.refresh(layer.parametrizations.weight.original, 5)
    assert float(book.points.abs().max()) > 1.5 * float(before.abs().max())


def test_both_passes_use_the_quantized_weight():
    layer = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.9, 0.0, 2.2], [1.1, -3.0, 1.8]]))
    nn.utils.parametrize.register_parametrization(layer, "weight", OnCodebook(layer.weight, 1, True))
    points = layer.parametrizations.weight[0].points
    assert len(points) == 3 and 0.0 in points.tolist()
    quantized = layer.weight.detach().clone()
    assert set(quantized.reshape(-1).tolist()) <= set(points.float().tolist()) and quantized[0, 1] == 0
    x = torch.tensor([[1.0, -2.0, 0.5]], requires_grad=True)
    out = layer(x)
    assert torch.allclose(out, x @ quantized.T)
    out.sum().backward()
    assert torch.allclose(x.grad, quantized.sum(0)[None])
    straight = torch.tensor([[1.0, 0.0, 0.5], [1.0, -2.0, 0.5]])  # nothing where the weight is pruned
    assert torch.equal(layer.parametrizations.weight.original.grad, straight)
