"""ANNC: the updates by their definitions, the budget at every moment, the options, and fine-tuning."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks.jobs import CONFIGS, prepare, read_table
from benchmarks.kernels.network import IntegerNetwork
from benchmarks.measure import with_ranges
from methods import annc
from methods.annc import Config, JointHooks, OnCodebook, Refresh, compress, store
from methods.core.budget import Budget
from methods.core.build import apply, weight_layers
from methods.core.errors import BudgetError, ConfigError
from methods.core.finetune import Recipe
from methods.core.knapsack import choose_options

LAYERS = ("conv1", "conv2", "conv3", "fc")
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


# --- training -----------------------------------------------------------------------------------------------


@pytest.fixture
def watched(monkeypatch):
    """(what, density, bits x kept, W) after every step's pull and after every epoch."""
    seen = []

    class Watched(JointHooks):
        def after_step(self, model, lr):
            super().after_step(model, lr)
            seen.append(("step", spent(self), self.limit, [w.detach().clone() for w in self.weights]))

        def after_epoch(self, model, epoch):
            super().after_epoch(model, epoch)
            seen.append(("epoch", spent(self), self.limit, [w.detach().clone() for w in self.weights]))

    monkeypatch.setattr(annc, "JointHooks", Watched)
    return seen


def test_when_weights_are_on_the_budget(tiny, watched):
    out = run(tiny)
    steps = len(tiny.task().train)
    assert [what for what, *_ in watched] == (["step"] * steps + ["epoch"]) * 3
    for i, (what, bits, limit, _) in enumerate(watched):
        dense = what == "step" and i > 0
        assert (bits > limit) == dense, i  # after the first minibatch and every epoch; dense, without a mask, between
    before, after = watched[-steps - 2][3], watched[-1][3]
    assert any(bool(((a != 0) & (b == 0)).any()) for a, b in zip(after, before, strict=True))  # zeros come back
    for (name, tensor), w in zip(out.weights.items(), after, strict=True):
        assert not bool((tensor.mask & (w == 0)).any()), name
        assert len(tensor.decode()[tensor.mask].unique()) <= 2**tensor.bits
    assert sum(t.kept * t.bits for t in out.weights.values()) <= out.notes["limit"]


def test_the_result_is_a_fresh_codebook_of_the_last_weights(tiny, watched):
    out = run(tiny)
    for (name, tensor), w in zip(out.weights.items(), watched[-1][3], strict=True):
        again = store(w, out.notes["bits"][name], True)
        assert torch.equal(again.decode(), tensor.decode()) and again.bits == tensor.bits
    trace = out.notes["trace"][0]
    assert len(trace) == 3 and trace[-1]["bits"] == list(out.notes["bits"].values())
    assert trace[-1]["kept"] == [int((w != 0).sum()) for w in watched[-1][3]] and out.notes["empty"] == []
    assert all(0 <= entry["gap"] < 3 for entry in trace)


@pytest.mark.parametrize("ratio", [0.003, 0.01, 0.05, 0.2, 0.24, 1.0])
def test_the_budget_is_kept_whatever_it_is(tiny, ratio):
    for config in (SHORT, replace(SHORT, fill=True, at_least=4)):
        out = run(tiny, ratio, replace(config, recipe=Recipe(epochs=1, lr=0.02)))
        bits = sum(t.kept * t.bits for t in out.weights.values())
        assert bits <= math.floor(ratio * 32 * total(tiny.net())) and bits > 0
    if ratio == 1.0:
        assert all(out.weights[name].bits >= 7 for name in LAYERS[:3])  # 48 weights are exact in 6 bits
        assert all(t.density > 0.9 for t in out.weights.values())


def test_no_epochs_and_channels_last(tiny):
    config = replace(SHORT, recipe=Recipe(epochs=0, lr=0.1))
    outs = [run(tiny, 0.03, config, channels_last=last) for last in (False, True)]
    for name in LAYERS:
        assert torch.equal(outs[0].weights[name].decode(), outs[1].weights[name].decode())
    assert sum(t.kept for t in outs[0].weights.values()) == math.floor(0.03 * 32 * total(tiny.net())) // 3
    assert run(tiny, 0.03, SHORT, channels_last=True).notes["limit"] == outs[0].notes["limit"]
    out = run(tiny, 0.05, replace(config, mode="quantize"))
    assert sum(t.mask.numel() * t.bits for t in out.weights.values()) <= 0.05 * 32 * total(tiny.net())


def test_reserved_weights_of_a_dead_layer_fit_later(tiny):
    model = tiny.model()
    with torch.no_grad():
        model.conv2.weight.zero_()
    hooks = JointHooks(model, 600, replace(SHORT, at_least=40))
    hooks.update(0)
    with torch.no_grad():
        model.conv2.weight.normal_(generator=seeded())
    for epoch in range(2):
        hooks.update(epoch)  # would raise, had the others taken what 40 weights of conv2 need
        assert spent(hooks) <= 600 and min(hooks.count_kept()) >= 40


def test_fixed_widths_and_widths_fixed_later(tiny):
    fixed = run(tiny, config=replace(SHORT, bits_epochs=0, start_bits=2))
    assert {t.bits for t in fixed.weights.values()} == {2}
    later = run(tiny, config=replace(SHORT, bits_epochs=1))
    free = run(tiny)
    bits = [entry["bits"] for entry in later.notes["trace"][0]]
    assert bits[0] == bits[1] == bits[2] == free.notes["trace"][0][0]["bits"]
    narrow = run(tiny, config=replace(SHORT, least_bits=2, most_bits=3))
    assert {t.bits for t in narrow.weights.values()} <= {2, 3}


def test_prune_only(tiny):
    out = run(tiny, 0.1, replace(SHORT, mode="prune"))
    assert out.weights == {} and "bits" not in out.notes
    kept = sum(int((out.rest[f"{name}.weight"] != 0).sum()) for name in LAYERS)
    assert kept == math.floor(0.1 * 32 * total(tiny.net())) // 32 == sum(out.notes["kept"].values())


def test_quantize_only(tiny):
    out = run(tiny, 0.12, replace(SHORT, mode="quantize"))
    assert sum(t.mask.numel() * t.bits for t in out.weights.values()) <= 0.12 * 32 * total(tiny.net())
    for tensor in out.weights.values():
        assert tensor.density > 0.99 and len(tensor.grid.values) <= 2**tensor.bits


def test_stages_tighten_the_budget(tiny, watched):
    out = run(tiny, 0.03, replace(SHORT, stages=(4.0, 2.0, 1.0), recipe=Recipe(epochs=1, lr=0.05)))
    limits = [limit for what, _, limit, _ in watched if what == "epoch"]
    assert limits == [math.floor(f * 0.03 * 32 * total(tiny.net())) for f in (4.0, 2.0, 1.0)]
    assert len(out.notes["trace"]) == 3 and out.notes["limit"] == limits[-1]


def test_layers_left_empty_are_named_and_still_run(tiny):
    model = tiny.model()
    with torch.no_grad():
        model.conv2.weight.mul_(1e-3)
        model.conv2.weight.requires_grad_(False)
    config = replace(SHORT, recipe=Recipe(epochs=1, lr=0.05), rho=0.0)
    out = compress(model, tiny.task(), Budget(data_ratio=0.02), config, seeded())
    assert out.notes["empty"] == ["conv2"] and out.weights["conv2"].kept == 0
    assert out.weights["conv2"].bits == 1  # costs nothing, and takes no other bits
    inputs = tiny.Batches(8, 3).inputs
    assert IntegerNetwork(with_ranges(out, tiny.net(), tiny.task()), tiny.net())(inputs).isfinite().all()
    kept = compress(model, tiny.task(), Budget(data_ratio=0.02), replace(config, at_least=5), seeded())
    assert kept.weights["conv2"].kept == 5 and kept.notes["empty"] == []


def test_accuracy_survives(tiny):
    """At an eighth of the float bits the tiny network learns on: it may not lose what it knew."""
    config = replace(SHORT, recipe=Recipe(epochs=12, lr=0.02))
    out = run(tiny, 0.04, config)
    task = tiny.task()
    assert task.score(apply(out, tiny.net())) >= task.score(tiny.model()) - 5.0


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
        hooks = Refresh([layer], steps)
        layer.calls.clear()
        for _ in range(steps):
            hooks.after_step(None, 0.1)
        assert layer.calls == [5] * times
        hooks.after_epoch(None, 0)
        assert layer.calls[-1] == 100
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


# --- refusals and rows --------------------------------------------------------------------------------------


def test_what_no_choice_can_meet_is_refused_before_training(tiny):
    one = 1 / (32 * total(tiny.net()))
    nowhere = tiny.Run(limit=0)  # raises at the first report, save or load

    def ask(bits, **fields):
        config = replace(SHORT, **fields)
        compress(tiny.model(), tiny.task(), Budget(data_ratio=bits * one), config, seeded(), run=nowhere)

    for bits, fields, needs in ((2.5, {}, 3), (31.5, {"mode": "prune"}, 32), (11.5, {"at_least": 1}, 12),
                                (total(tiny.net()) - 0.5, {"mode": "quantize"}, total(tiny.net())),
                                (2 * total(tiny.net()), {"mode": "quantize", "bits_epochs": 0}, 3 * total(tiny.net()))):
        with pytest.raises(BudgetError, match=f"annc needs {needs} "):
            ask(bits, **fields)
        with pytest.raises(tiny.Interrupted):
            ask(needs + 0.5, **fields)


@pytest.mark.parametrize("fields", [{"mode": "both"}, {"start_bits": 9}, {"least_bits": 0}, {"rho": -1.0},
                                    {"stages": ()}, {"stages": (1.0, 2.0, 1.0)}, {"at_least": -1}, {"bits_epochs": -1},
                                    {"recipe": Recipe(epochs=1, lr=0.1, ema=0.9)}])
def test_configs_are_refused_in_one_line(fields):
    with pytest.raises(ConfigError) as caught:
        Config(**fields)
    assert "\n" not in str(caught.value)


def test_budgets_of_the_rows_are_the_published_ones():
    sizes = (500, 25_000, 400_000, 5_000)
    published = 3 * sum(math.ceil(0.0054 * n) for n in sizes)
    limits = {job.name: math.floor(prepare(job)[1].data_ratio * 32 * sum(sizes))
              for job in read_table(CONFIGS / "annc_lenet.toml").rows}
    assert limits == {"1975x": published, "2120x": 6498} and published == 6975
    assert 32 * sum(sizes) // published == 1975 and 32 * sum(sizes) // 6498 == 2120
