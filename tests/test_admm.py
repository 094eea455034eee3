"""ADMM: the three steps by their definitions, pruning, refusals, and the arithmetic of the printed row."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks.jobs import CONFIGS, prepare, read_table
from methods import admm
from methods.admm import Config, Training, compress, prune
from methods.admm.hooks import AdmmHooks
from methods.core.budget import Budget
from methods.core.errors import BudgetError, ConfigError, TrainingDiverged
from methods.core.fit.project import project_sparse
from methods.core.fit.prune import keep_count
from methods.core.graph.build import weight_layers
from methods.core.train.finetune import Recipe
from methods.core.train.run import NullRun

LAYERS = ("conv1", "conv2", "conv3", "fc")
EPOCH = Recipe(epochs=1, lr=0.02)
SHORT = Config(rho=(0.1,), prune_iterations=2, prune=EPOCH, retrain=EPOCH, quantize_rho=(0.1,), quantize_iterations=1,
               quantize=EPOCH, fix_rounds=2, fix=EPOCH)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def few(count):
    return lambda name, values: project_sparse(values, count)


def one_layer(values):
    layer = nn.Linear(values.shape[1], values.shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(values)
    return layer


def hooks_on(layer, project, rho):
    weights = {"w": layer.weight}
    return AdmmHooks(weights, project, {"w": torch.ones_like(layer.weight, dtype=torch.bool)}, rho)


def training(tiny, model, config=SHORT):
    return Training(model, tiny.task(), config, seeded(), NullRun(), {})


def weights_of(model):
    return {name: layer.weight for name, layer in weight_layers(model).items()}


# --- the three steps ----------------------------------------------------------------------------------------


def test_the_pull_is_the_gradient_of_the_squared_penalty():
    layer = one_layer(torch.randn(4, 6, generator=seeded()))
    hooks = hooks_on(layer, few(5), 0.7)
    for _ in range(2):  # also with a dual that is not 0
        hooks.update(1.0)
        with torch.no_grad():
            layer.weight.add_(0.1 * torch.randn(4, 6, generator=seeded(1)))
    z, u = hooks.z["w"], hooks.u["w"]
    assert float(u.norm()) > 0.1
    penalty = 0.35 * ((layer.weight - z + u) ** 2).sum()
    wanted, = torch.autograd.grad(penalty, layer.weight)
    layer.weight.grad = torch.full((4, 6), 3.0)  # of the loss
    hooks.after_backward(nn.Sequential(layer), 0.1)
    assert torch.allclose(layer.weight.grad, 3.0 + wanted, atol=1e-6)


def test_dual_is_the_sum_of_residuals():
    layer = one_layer(torch.randn(5, 8, generator=seeded()))
    hooks, total = hooks_on(layer, few(9), 0.1), torch.zeros(5, 8)
    assert torch.equal(hooks.z["w"], project_sparse(layer.weight.detach(), 9)) and not hooks.u["w"].any()
    for k in range(6):
        with torch.no_grad():
            layer.weight.add_(0.3 * torch.randn(5, 8, generator=seeded(k)))
        wanted = project_sparse(layer.weight.detach() + total, 9)  # Z from W + U, before U moves
        hooks.update(1.0)
        assert torch.allclose(hooks.z["w"], wanted, atol=1e-6)
        total += layer.weight.detach() - hooks.z["w"]
        assert torch.allclose(hooks.u["w"], total, atol=1e-5)
        residual = float(((layer.weight - hooks.z["w"]).norm() / layer.weight.norm()).detach())
        assert hooks.residuals["w"][k] == pytest.approx(residual, rel=1e-5)


def test_a_feasible_constant_stays():
    values = project_sparse(torch.randn(3, 7, generator=seeded()), 6)
    layer = one_layer(values)
    hooks = hooks_on(layer, few(6), 0.1)
    for _ in range(3):
        hooks.update(1.3)
        assert torch.equal(hooks.z["w"], values) and not hooks.u["w"].any() and not any(hooks.residuals["w"])


def test_growth_rescales_the_dual():
    layer = one_layer(torch.randn(3, 7, generator=seeded()))
    plain, grown = hooks_on(layer, few(4), 0.2), hooks_on(layer, few(4), 0.2)
    plain.update(1.0)
    grown.update(1.3)
    assert grown.rho == pytest.approx(0.26)
    assert torch.allclose(grown.rho * grown.u["w"], plain.rho * plain.u["w"])  # the unscaled dual is the same
    assert torch.allclose(grown.toward["w"], grown.z["w"] - grown.u["w"])


@pytest.mark.parametrize("rho", [0.5, 2.0])
def test_admm_solves_a_convex_problem(rho):
    """f(W) = |W - A|^2 / 2 with exact W-steps: the answer is the top-k of A."""
    a = torch.tensor([[2.0, -1.7, 0.3, 0.2], [-0.4, 1.5, 0.1, -0.25]])
    layer = one_layer(a)
    hooks = hooks_on(layer, few(3), rho)
    for _ in range(60):
        with torch.no_grad():
            layer.weight.copy_((a + rho * hooks.toward["w"]) / (1 + rho))
        hooks.update(1.0)
    assert torch.allclose(layer.weight.detach(), project_sparse(a, 3), atol=1e-4)


def test_state_survives(tiny):
    layer = one_layer(torch.randn(4, 6, generator=seeded()))
    hooks = hooks_on(layer, few(5), 0.7)
    hooks.update(1.3)
    other = hooks_on(layer, few(5), 0.7)
    other.restore(hooks.state())
    assert tiny.same(other.state(), hooks.state()) and tiny.same(other.toward, hooks.toward)


# --- pruning ------------------------------------------------------------------------------------------------


def test_counts_are_per_layer_and_pruned_weights_stay_zero(tiny):
    density = {"conv1": 0.5, "conv2": 0.07, "conv3": 0.2, "fc": 1.0}
    model = tiny.model()
    heavy = Recipe(epochs=8, lr=0.02, momentum=0.9, weight_decay=0.05)
    masks = prune(weights_of(model), density, training(tiny, model, replace(SHORT, retrain=heavy)))
    for name, weight in weights_of(model).items():
        assert int(masks[name].sum()) == keep_count(weight.numel(), density[name])
        assert torch.equal(weight[~masks[name]], torch.zeros(int((~masks[name]).sum())))


def test_hard_pruning_takes_the_weights_themselves(tiny, monkeypatch):
    seen = {}

    def watch(model, task, recipe, generator, *, hooks=None, run=None):
        if isinstance(hooks, AdmmHooks):
            with torch.no_grad():
                for i, weight in enumerate(hooks.weights.values()):
                    weight.add_(0.2 * torch.randn(weight.shape, generator=seeded(i)))
        else:
            seen.update({name: w.detach().clone() for name, w in weights_of(model).items()})
            seen["before"] = before

    monkeypatch.setattr(admm, "train", watch)
    model = tiny.model()
    before, update = {}, AdmmHooks.update

    def remember(self, growth):
        update(self, growth)
        before.update({name: w.detach().clone() for name, w in self.weights.items()})

    monkeypatch.setattr(AdmmHooks, "update", remember)
    prune(weights_of(model), dict.fromkeys(LAYERS, 0.2), training(tiny, model))
    for name in LAYERS:
        w = seen["before"][name]
        assert torch.equal(seen[name], project_sparse(w, keep_count(w.numel(), 0.2)))


def stages(case):
    """Names of the stages that saved a state, in order, with the number of epochs of each."""
    order = []
    for name, what in case.calls:
        if what == "save":
            order.append(name)
    return {name: order.count(name) for name in dict.fromkeys(order)}


def test_the_learning_rate_starts_anew_in_every_iteration(tiny):
    run = tiny.Run()
    config = replace(SHORT, rho=(0.01, 0.1), prune_iterations=2, prune=Recipe(epochs=2, lr=0.01), steps=(2.0, 1.0))
    out = compress(tiny.model(), tiny.task(), Budget(density=0.3, bits=3), config, seeded(), run=run)
    ran = stages(run)
    one = {"/prune {0} 1.1": 2, "/prune {0} 1.2": 2, "/prune {0} 2.1": 2, "/prune {0} 2.2": 2, "/retrain {0}": 1}
    wanted = {key.format(s): epochs for s in (1, 2) for key, epochs in one.items()}
    assert ran == wanted | {"/quantize 1.1": 1, "/fix 1": 1, "/fix 2": 1}
    assert list(out.notes["residuals"]) == ["prune 1.1", "prune 1.2", "prune 2.1", "prune 2.2", "quantize.1"]
    for stage, trace in out.notes["residuals"].items():
        assert set(trace) == set(LAYERS)
        for values in trace.values():
            assert len(values) == (1 if "quantize" in stage else 2) and all(0 <= v < 10 for v in values)


def test_steps_are_nested_and_finished_layers_feel_no_pull(tiny, monkeypatch):
    seen = []
    plain = admm.train

    def watch(model, task, recipe, generator, *, hooks=None, run=None):
        if isinstance(hooks, AdmmHooks):
            seen.append((set(hooks.weights), {n: m.clone() for n, m in hooks.masks.items()}))
        return plain(model, task, recipe, generator, hooks=hooks, run=run)

    monkeypatch.setattr(admm, "train", watch)
    model = tiny.model()
    density = {"conv1": 1.0, "conv2": 0.1, "conv3": 0.2, "fc": 0.6}
    config = replace(SHORT, steps=(4.0, 2.0, 1.0), prune_iterations=1)
    masks = prune(weights_of(model), density, training(tiny, model, config))
    assert [names for names, _ in seen] == [{"conv2", "conv3"}, {"conv2", "conv3"}, {"conv2", "conv3", "fc"}]
    kept = [{n: int(m.sum()) for n, m in masks.items()} for _, masks in seen]
    n = {name: w.numel() for name, w in weights_of(model).items()}
    assert kept[1] == {**n, "conv2": keep_count(n["conv2"], 0.4), "conv3": keep_count(n["conv3"], 0.8)}
    assert all(bool((seen[2][1][name] | ~masks[name]).all()) for name in LAYERS)


def test_admm_makes_pruning_hurt_less(tiny):
    """Projection after ADMM against projection of the same training without the pull, before any retraining."""
    losses = {}
    data = tiny.task().train
    for rho in (0.3, 1e-12):
        model = tiny.model()
        model.drop.p = 0.0
        config = replace(SHORT, rho=(rho,), prune_iterations=3, prune=Recipe(epochs=10, lr=0.02),
                         retrain=Recipe(epochs=0, lr=0.1))
        prune(weights_of(model), dict.fromkeys(LAYERS, 0.2), training(tiny, model, config))
        with torch.no_grad():  # batch statistics: the running ones are those of before the projection
            losses[rho] = float(nn.functional.cross_entropy(model.train()(data.inputs), data.targets))
    assert losses[0.3] < 0.8 * losses[1e-12]


def test_without_bits_weights_stay_float(tiny):
    out = compress(tiny.model(), tiny.task(), Budget(density=0.25), Config(
        rho=(0.1,), prune_iterations=2, prune=EPOCH, retrain=EPOCH), seeded())
    assert out.weights == {}
    for name in LAYERS:
        weight = out.rest[f"{name}.weight"]
        assert int((weight != 0).sum()) == keep_count(weight.numel(), 0.25) and len(weight[weight != 0].unique()) > 9


# --- the printed row, and refusals --------------------------------------------------------------------------


def test_counts_of_the_rows_agree_with_the_printed_totals():
    sizes = {"conv1": 500, "conv2": 25_000, "ip1": 400_000, "ip2": 5_000}
    rows = {job.name: prepare(job)[1] for job in read_table(CONFIGS / "admm_lenet.toml").rows}
    kept = {name: {layer: keep_count(n, rows[name].density[layer]) for layer, n in sizes.items()} for name in rows}
    assert kept["71.2x pruning"] == {"conv1": 100, "conv2": 2000, "ip1": 3600, "ip2": 350}
    assert sum(sizes.values()) / sum(kept["71.2x pruning"].values()) == pytest.approx(71.2, abs=0.05)
    for name in ("1910x levels", "1910x clusters"):
        assert sum(kept[name].values()) == 2569 and kept[name]["ip1"] == 496
        bits = sum(count * rows[name].bits[layer] for layer, count in kept[name].items())
        assert 32 * sum(sizes.values()) / bits == pytest.approx(1910, abs=0.5)


@pytest.mark.parametrize("fields", [{"grid": "affine"}, {"steps": ()}, {"steps": (1.0, 2.0)}, {"steps": (2.0,)},
                                    {"rho": (0.0,)}, {"rho_growth": float("inf")}, {"fix_fraction": 0.0},
                                    {"fix_rounds": -1}, {"prune_iterations": -1}])
def test_configs_are_refused_in_one_line(fields):
    with pytest.raises(ConfigError) as caught:
        Config(**fields)
    assert "\n" not in str(caught.value)


def test_budgets_are_refused(tiny):
    with pytest.raises(BudgetError, match="names unknown layers"):
        compress(tiny.model(), tiny.task(), Budget(density={"conv9": 0.5}, bits=3), SHORT, seeded())
    with pytest.raises(BudgetError, match="needs the budget field 'density'"):
        compress(tiny.model(), tiny.task(), Budget(bits=3), SHORT, seeded())


@pytest.mark.parametrize("stage", ["prune 1 1.1", "retrain 1", "quantize 1.1", "fix 1", "tie"])
def test_a_last_step_that_breaks_the_weights_is_reported(tiny, stage):
    """The loss is finite there, and its gradient is not: only the weights show it."""
    kind, recipe = stage.split()[0], replace(EPOCH, lr=0.5)
    idle = {name: replace(EPOCH, epochs=0) for name in ("prune", "retrain", "quantize", "fix")}
    grid = {"grid": "clusters", "fix_rounds": Config.fix_rounds} if kind == "tie" else {}
    config = replace(SHORT, **grid, **{**idle, "fix" if kind == "tie" else kind: recipe})
    task = replace(tiny.task(), train=tiny.Batches(24, 1), loss=lambda out, _: (out - out.detach()).abs().sqrt().sum())
    with pytest.raises(TrainingDiverged, match=r"after epoch 1 of 1: lower lr \(0.5\)"):
        compress(tiny.model(), task, Budget(density=0.3, bits=3), config, seeded())
