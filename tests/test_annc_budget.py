"""ANNC: the budget at every moment and in the result, the options, refusals, and the budgets of the rows."""

import math
from dataclasses import replace

import pytest
import torch

from benchmarks.jobs import CONFIGS, prepare, read_table
from benchmarks.measure import with_ranges
from methods import annc
from methods.annc import MODES, Config, JointHooks, compress, find_limits
from methods.annc.codebooks import store
from methods.core.budget import Budget
from methods.core.errors import BudgetError, ConfigError, TrainingDiverged
from methods.core.graph.build import apply, weight_layers
from methods.core.train.finetune import Recipe
from methods.engine.exact import IntegerNetwork

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
    assert trace[-1]["kept"] == [int((w != 0).sum()) for w in watched[-1][3]] and out.notes["empty_layers"] == []
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
    assert find_limits([100], 0.5, replace(SHORT, stages=(float("inf"), 4.0, 1.0))) == [3200, 3200, 1600]


def test_layers_left_empty_are_named_and_still_run(tiny):
    model = tiny.model()
    with torch.no_grad():
        model.conv2.weight.mul_(1e-3)
        model.conv2.weight.requires_grad_(False)
    config = replace(SHORT, recipe=Recipe(epochs=1, lr=0.05), rho=0.0)
    out = compress(model, tiny.task(), Budget(data_ratio=0.02), config, seeded())
    assert out.notes["empty_layers"] == ["conv2"] and out.weights["conv2"].kept == 0
    assert out.weights["conv2"].bits == 1  # costs nothing, and takes no other bits
    inputs = tiny.Batches(8, 3).inputs
    assert IntegerNetwork(with_ranges(out, tiny.net(), tiny.task()), tiny.net())(inputs).isfinite().all()
    kept = compress(model, tiny.task(), Budget(data_ratio=0.02), replace(config, at_least=5), seeded())
    assert kept.weights["conv2"].kept == 5 and kept.notes["empty_layers"] == []


def test_layers_that_only_their_codebook_empties_are_named(tiny):
    model = tiny.model()
    with torch.no_grad():
        model.conv2.weight.mul_(1e-6).requires_grad_(False)  # kept, as the budget allows, but 0 for the k-means
    config = replace(SHORT, recipe=Recipe(epochs=1, lr=0.05), rho=0.0)
    out = compress(model, tiny.task(), Budget(data_ratio=1.0), config, seeded())
    assert out.weights["conv2"].kept == 0 < out.notes["kept"]["conv2"] and out.notes["empty_layers"] == ["conv2"]


def with_effect(config, **fields):
    """`config` with those of `fields` that do something in its mode."""
    return replace(config, **{name: value for name, value in fields.items() if name not in config.idle()})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits_epochs", [None, 0, 1])
def test_the_budget_holds_after_every_update(tiny, mode, bits_epochs):
    """Whatever training does to the weights between two projections."""
    sizes = [w.numel() for w in weights_of(tiny.net()).values()]
    for seed, (share, fields) in enumerate([(0.003, {}), (0.02, {"fill": True, "at_least": 7}), (0.13, {"fill": True}),
                                            (0.5, {"most_bits": 4})]):
        config = with_effect(with_effect(replace(SHORT, mode=mode), bits_epochs=bits_epochs, rho=0.5), **fields)
        try:
            limit, = find_limits(sizes, share, config)
        except BudgetError:
            continue
        model = tiny.model()
        hooks = JointHooks(model, limit, config)
        hooks.after_step(model, 0.1)
        for epoch in range(3):
            with torch.no_grad():
                for i, w in enumerate(hooks.weights):
                    w.add_(10.0 ** (epoch - i) * torch.randn(w.shape, generator=seeded(seed + epoch)))
                hooks.weights[epoch].mul_(0.0)
            hooks.after_epoch(model, epoch)
            kept = sizes if mode == "quantize" else hooks.count_kept()
            assert sum(b * n for b, n in zip(hooks.bits, kept, strict=True)) <= limit
            if mode != "prune":
                stored = [store(w, b, mode == "joint") for w, b in zip(hooks.weights, hooks.bits, strict=True)]
                assert sum(t.kept * t.bits for t in stored) <= limit


def test_accuracy_survives(tiny):
    """At an eighth of the float bits the tiny network learns on: it may not lose what it knew."""
    config = replace(SHORT, recipe=Recipe(epochs=12, lr=0.02))
    out = run(tiny, 0.04, config)
    task = tiny.task()
    assert task.score(apply(out, tiny.net())) >= task.score(tiny.model()) - 5.0


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


def test_a_last_step_that_breaks_the_weights_is_reported(tiny):
    """The loss is finite there, and its gradient is not: only the weights show it."""
    task = replace(tiny.task(), train=tiny.Batches(24, 1), loss=lambda out, _: (out - out.detach()).abs().sqrt().sum())
    once, never = Recipe(epochs=1, lr=0.5), Recipe(epochs=0, lr=0.1)
    cases = [({"mode": mode, "recipe": once}, "a step of epoch 1") for mode in MODES]
    for fields, when in [*cases, ({"recipe": never, "finetune": once}, "epoch 1 of 1")]:
        with pytest.raises(TrainingDiverged, match=rf"after {when}: lower lr \(0.5\)"):
            compress(tiny.model(), task, Budget(data_ratio=0.1), replace(SHORT, **fields), seeded())


@pytest.mark.parametrize("fields", [{"mode": "both"}, {"start_bits": 9}, {"least_bits": 0}, {"rho": -1.0},
                                    {"stages": ()}, {"stages": (1.0, 2.0, 1.0)}, {"at_least": -1}, {"bits_epochs": -1},
                                    {"recipe": Recipe(epochs=1, lr=0.1, ema=0.9)},
                                    {"mode": "prune", "finetune": Recipe(epochs=1, lr=0.1)}])
def test_configs_are_refused_in_one_line(fields):
    with pytest.raises(ConfigError) as caught:
        Config(**fields)
    assert "\n" not in str(caught.value)


def test_a_limit_is_the_most_bits_within_the_ratio():
    sizes = [500, 25_000]
    dense = 32 * sum(sizes)
    asked = range(3, 4000)
    assert [find_limits(sizes, bits / dense, SHORT) for bits in asked] == [[bits] for bits in asked]
    assert any(math.floor(bits / dense * dense) < bits for bits in asked)  # which a product rounded down would miss
    for ratio in torch.rand(300, generator=seeded(), dtype=torch.float64).add(1e-5).clamp(max=1).tolist():
        limit, = find_limits(sizes, ratio, SHORT)
        assert limit / dense <= ratio < (limit + 1) / dense or limit == dense


def test_budgets_of_the_rows_are_the_published_ones():
    sizes = (500, 25_000, 400_000, 5_000)
    published = 3 * sum(math.ceil(0.0054 * n) for n in sizes)
    limits = {job.name: math.floor(prepare(job)[1].data_ratio * 32 * sum(sizes))
              for job in read_table(CONFIGS / "annc_lenet.toml").rows}
    assert limits == {"1975x": published, "1975x in two stages": published, "2120x": 6498, "2120x in stages": 6498,
                      "2120x in stages, live weights": 6498, "2120x in stages, live weights, distilled": 6498}
    assert published == 6975
    assert 32 * sum(sizes) // published == 1975 and 32 * sum(sizes) // 6498 == 2120
