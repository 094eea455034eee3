"""CLIP-Q's search: expected improvement and the process behind it, what is evaluated, and what is chosen."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import nn

from benchmarks.accounting import tensor_bits
from methods import clip_q
from methods.clip_q import Config, Theta, compress, encode, partition, stored_bits
from methods.core.budget import Budget
from methods.core.errors import BudgetError, ConfigError
from methods.core.file.storage import to_bytes
from methods.core.fit import bayes
from methods.core.train.finetune import Recipe
from methods.core.train.run import NullRun

LAYERS = ("conv1", "conv2", "conv3", "fc")
SHORT = Recipe(epochs=1, lr=0.02)
SEARCHED = Config(lam=0.3, evaluations=6, initial=4, probe=0, held_out_inputs=30, finetune=Recipe(epochs=0, lr=0.1))
GRID = np.array([(p, b / 8) for p in clip_q.P_GRID for b in clip_q.BITS_GRID])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def quantized(weight, p, bits):
    codes, levels = partition(weight, Theta(p, bits))
    return levels[codes]


# --- Bayesian optimization ------------------------------------------------------------------------------------


def test_expected_improvement_is_its_integral():
    x, y = GRID[::60], np.sin(5 * GRID[::60, 0]) + GRID[::60, 1]
    process = bayes.fit_process(x, y, 0)
    gain = bayes.gaussian_ei(GRID, process, y.min(), xi=0.0)
    assert bool((gain >= 0).all()) and float(gain[::60].max()) < 2e-3 * np.ptp(y)  # nothing to gain at what is known
    assert np.allclose(process.predict(x), y, atol=1e-2 * np.ptp(y))  # the process interpolates
    mean, std = process.predict(GRID, return_std=True)
    for i in (3, 200, 430):
        low, high = mean[i] - 12 * std[i], min(y.min(), mean[i] + 12 * std[i])
        want = integrate.quad(lambda f, i=i: (y.min() - f) * stats.norm.pdf(f, mean[i], std[i]), low, high)[0] \
            if high > low else 0.0
        assert gain[i] == pytest.approx(want, rel=1e-4, abs=1e-9)


def test_bayes_finds_the_minimum_of_a_quadratic():
    regrets = {"bayes": [], "random": []}
    for seed in range(3):
        centre = np.random.default_rng(seed).uniform([0, 0.25], [0.98, 1])
        values = ((GRID - centre) ** 2 * [1, 3]).sum(1)
        for search, found in regrets.items():
            best, seen = bayes.minimize(GRID, lambda i, values=values: float(values[i]), 20, 5, seed, search)
            assert len({i for i, _ in seen}) == len(seen) == 20 and best == min(seen, key=lambda s: s[1])[0]
            found.append(values[best] - values.min())
            if search == "bayes":
                cell = np.abs(GRID[best] - GRID[values.argmin()])
                assert cell[0] <= 0.01 + 1e-9 and cell[1] <= 1 / 8
    assert np.mean(regrets["bayes"]) < np.mean(regrets["random"])


@pytest.mark.parametrize("broken", [0.7, 1.0])
def test_errors_that_are_infinite_are_no_hindrance(broken):
    """Networks that a setting destroys: more than half of the first ones, so that their median is infinite, too."""
    values = (GRID[:, 0] - 0.3) ** 2 + (GRID[:, 1] - 0.5) ** 2
    values[GRID[:, 0] > 1 - broken] = np.inf if broken < 1 else np.nan
    values[0] = np.inf
    best, seen = bayes.minimize(GRID, lambda i: float(values[i]), 14, 8, 0)
    index = [i for i, _ in seen]
    assert len(set(index)) == 14 and not np.isfinite(values[index[:8]]).sum() >= 4
    if broken < 1:
        assert values[best] == values[index].min() < 0.01
    assert bayes.capped(np.array([3.0, np.inf, 1.0, np.inf, 2.0, np.nan])).tolist() == [2, 2, 1, 2, 2, 2]


def test_the_next_point_has_the_greatest_expected_improvement_on_values_cut_at_their_median():
    """By the formula, on a process through the cut values; neither the least mean nor uncut values lead there."""
    values, seed = np.sin(7 * GRID[:, 0]) + 3 * (GRID[:, 1] - 0.6) ** 2 + 40.0 * (GRID[:, 0] > 0.8), 5
    seen = bayes.bayesian(GRID, lambda i: float(values[i]), 9, 8, seed)
    first, chosen = [i for i, _ in seen[:8]], seen[8][0]

    def predicted(y):
        mean, std = bayes.fit_process(GRID[first], y, seed).predict(GRID, return_std=True)
        z = (y.min() - mean) / std
        gain = (y.min() - mean) * stats.norm.cdf(z) + std * stats.norm.pdf(z)
        gain[first], mean[first] = -np.inf, np.inf
        return gain, mean

    y = values[first]
    assert y.max() > 30  # one of the first points is very bad
    gain, mean = predicted(np.minimum(y, np.median(y)))
    assert gain[chosen] == pytest.approx(gain.max(), rel=1e-6)
    assert gain[int(mean.argmin())] < 0.9 * gain.max()
    assert gain[int(predicted(y)[0].argmax())] < 0.9 * gain.max()


def test_few_points_are_all_evaluated():
    points = np.array([(0.5, b / 8) for b in range(2, 9)])
    for search in ("bayes", "random"):
        best, seen = bayes.minimize(points, lambda i: (i - 4.0) ** 2, 30, 5, 0, search)
        assert sorted(i for i, _ in seen) == list(range(7)) and best == 4
    with pytest.raises(ConfigError, match="bayes, random"):
        bayes.minimize(points, float, 3, 1, 0, "grid")


# --- the search ---------------------------------------------------------------------------------------------


def test_the_bits_that_are_counted_are_those_of_the_encoder(tiny):
    for name, layer in clip_q.weight_layers(tiny.model()).items():
        for theta, index_bits in itertools.product((Theta(0.0, 2), Theta(0.5, 4), Theta(0.97, 3)), (2, 5)):
            tensor = encode(name, layer.weight, theta, "A")
            wanted = tensor_bits(tensor, index_bits)["prune_quantize"]
            assert stored_bits(tensor.decode(), theta.bits, index_bits) == wanted


def test_the_trace_holds_what_was_measured(tiny, monkeypatch):
    minimized = []
    monkeypatch.setattr(clip_q, "minimize", lambda *given: minimized.append(bayes.minimize(*given)))
    out = compress(tiny.model(), tiny.task(), Budget(), SEARCHED, seeded())
    theta, trace = out.notes["theta"], out.notes["trace"]
    total, trial = 32 * (216 + 576 + 864 + 48), tiny.model()
    task = tiny.task()
    inputs, targets = (torch.cat(part)[:30] for part in zip(*task.held_out.epoch(None), strict=True))
    for name, (_, evaluated) in zip(LAYERS, minimized, strict=True):  # with what was chosen before, and nothing after
        weight = trial.get_submodule(name).weight
        shadow = weight.detach().clone()
        assert len(trace[name]) == 6 and theta[name] in [{"p": t["p"], "bits": t["bits"]} for t in trace[name]]
        objective = {}
        for seen in trace[name]:
            choice = Theta(seen["p"], seen["bits"])
            with torch.no_grad():
                weight.copy_(quantized(shadow, *choice))
                wrong = int((trial(inputs).argmax(1) != targets).sum())
            assert seen["error"] == pytest.approx(wrong / 30)
            stored = tensor_bits(encode(name, shadow, choice, "A"), 5)["prune_quantize"]
            assert seen["saved"] == pytest.approx((32 * shadow.numel() - stored) / total)
            assert seen["saved"] < 32 * shadow.numel() / total and type(seen["bits"]) is int
            objective[choice] = wrong / 30 - 0.3 * (32 * shadow.numel() - stored) / total
            assert seen["objective"] == pytest.approx(objective[choice])
        assert [value for _, value in evaluated] == [seen["objective"] for seen in trace[name]]
        best = Theta(**theta[name])
        assert objective[best] == pytest.approx(min(objective.values()))
        with torch.no_grad():
            weight.copy_(quantized(shadow, *best))
        assert torch.equal(out.weights[name].decode(), weight)  # no epoch of fine-tuning here


def test_the_search_counts_with_its_own_split_and_index(tiny):
    model, config = tiny.model(), dataclasses.replace(SEARCHED, split="B", index_bits=3)
    out = compress(model, tiny.task(), Budget(), config, seeded())
    total = 32 * sum(getattr(model, name).weight.numel() for name in LAYERS)
    for name in LAYERS:
        weight = getattr(model, name).weight.detach()
        for seen in out.notes["trace"][name]:
            codes, levels = partition(weight, Theta(seen["p"], seen["bits"]), "B")
            stored = stored_bits(levels[codes], seen["bits"], 3)
            assert seen["saved"] == pytest.approx((32 * weight.numel() - stored) / total)


def test_a_larger_lambda_never_gives_a_larger_layer(tiny):
    spaces = {"fc": [Theta(p, b) for p in (0.0, 0.3, 0.6, 0.9) for b in (2, 4, 8)]}
    sizes = []
    for lam in (0.0, 0.5, 2.0, 8.0, 100.0):
        config = Config(search="random", lam=lam, evaluations=100, probe=0)
        model = tiny.model()
        theta, trace = clip_q.search_theta(model, tiny.task(), spaces, config, seeded(), NullRun())
        assert len(trace["fc"]) == 12 and len(model.fc.weight.unique()) <= 2 ** theta["fc"].bits
        sizes.append(stored_bits(model.fc.weight, theta["fc"].bits, 5))
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]


def test_a_search_is_reproducible_and_resumes_to_the_same_bytes(tiny):
    config = Config(lam=0.3, evaluations=5, initial=3, probe=2, finetune=SHORT)
    wanted, counted = compress(tiny.model(), tiny.task(), Budget(), config, seeded()), tiny.Run()
    models = [tiny.model() for _ in range(7)]
    torch.manual_seed(7)
    before = torch.get_rng_state()
    again = compress(models.pop(), tiny.task(), Budget(), config, seeded(), run=counted)
    assert to_bytes(again)[0] == to_bytes(wanted)[0]
    assert [what for name, what in counted.calls if name == "/search"] == (["report"] * 5 + ["save"]) * 4
    for calls in (0, 8, len(counted.calls) - 1):
        states = {}
        with pytest.raises(tiny.Interrupted):
            compress(models.pop(), tiny.task(), Budget(), config, seeded(), run=tiny.Run(states, calls))
        again = compress(models.pop(), tiny.task(), Budget(), config, seeded(), run=tiny.Run(states))
        assert to_bytes(again)[0] == to_bytes(wanted)[0] and tiny.same(dict(again.notes), dict(wanted.notes))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_evaluation_sees_the_network_after_a_few_minibatches(tiny, monkeypatch):
    """From the same weights each time; the chosen theta's minibatches are kept for the layers after it."""
    started, recipes, errors = [], [], iter(np.linspace(0.9, 0.1, 100))
    fine_tune = clip_q.train

    def watched(model, task, recipe, generator, **more):
        started.append({name: value.clone() for name, value in model.state_dict().items()})
        recipes.append((len(task.train), recipe.epochs, recipe.schedule, recipe.lr))
        return fine_tune(model, task, recipe, generator, **more)

    monkeypatch.setattr(clip_q, "train", watched)
    monkeypatch.setattr(clip_q.Task, "error", lambda self, model: next(errors))
    config = dataclasses.replace(SEARCHED, evaluations=3, initial=3, probe=2, finetune=Recipe(0, 0.05, schedule="step"))
    compress(tiny.model(), tiny.task(), Budget(), config, seeded())
    assert recipes == [(2, 1, "constant", 0.05)] * 16 + [(len(tiny.task().train), 0, "step", 0.05)]
    for layer in range(4):  # three evaluations and the minibatches of the chosen theta
        four = started[4 * layer:4 * layer + 4]
        assert all(tiny.same(four[0], other) for other in four[1:])
    assert not torch.equal(started[4]["fc.weight"], started[0]["fc.weight"])
    assert not torch.equal(started[8]["fc.weight"], started[4]["fc.weight"])


def test_what_the_budget_fixes_is_not_searched(tiny):
    spaces = clip_q.open_choices(tiny.model(), Budget(bits=3), "bayes")
    assert all({t.bits for t in space} == {3} and len(space) == 99 for space in spaces.values())
    spaces = clip_q.open_choices(tiny.model(), Budget(density={**dict.fromkeys(LAYERS, 0.25), "fc": 1}), "random")
    assert {t.p for t in spaces["conv1"]} == {0.75} and {t.bits for t in spaces["fc"]} == set(range(2, 9))
    assert len(clip_q.open_choices(tiny.model(), Budget(), "bayes")["fc"]) == 99 * 7
    with pytest.raises(BudgetError, match="nothing to choose"):
        clip_q.open_choices(tiny.model(), Budget(density=0.5, bits=4), "bayes")
    with pytest.raises(BudgetError, match="needs the budget field 'bits'"):
        clip_q.open_choices(tiny.model(), Budget(density=0.5), "uniform")
    with pytest.raises(BudgetError, match="2 or more"):
        clip_q.open_choices(tiny.model(), Budget(density=0.5, bits=1), "uniform")
    with pytest.raises(BudgetError, match="no Conv2d"):
        clip_q.open_choices(nn.Sequential(nn.ReLU()), Budget(), "bayes")


def test_a_search_does_not_start_without_training_batches(tiny, monkeypatch):
    monkeypatch.setattr(clip_q, "search_theta", lambda *_: pytest.fail("it searched"))
    with pytest.raises(ConfigError, match="holds no training batches"):
        compress(tiny.model(), dataclasses.replace(tiny.task(), train=None), Budget(), SEARCHED, seeded())
