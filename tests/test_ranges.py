"""Range rules against their definitions, and the goldens of normal data with and without outliers."""

import numpy as np
import pytest
import torch

from methods.core.errors import CompressError, ConfigError
from methods.core.fit.calibrate import calibrate
from methods.core.fit.ranges import BINS, OBSERVERS, START, divergence, find_observer


def seen(name, batches, bits=8):
    observer = find_observer(name)(bits)
    for batch in batches:
        observer.update(batch)
    return observer.range()


def normal(outliers=False):
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    return torch.cat([x, torch.tensor([40.0, -40.0, 40.0])]) if outliers else x


def test_minmax_is_the_extremes_in_any_order():
    parts = list(torch.tensor([3.0, -1.0, 2.0, 7.0, -4.0, 0.5]).split(2))
    assert seen("minmax", parts) == seen("minmax", parts[::-1]) == (-4.0, 7.0)


def test_moving_average_by_hand():
    low, high = seen("moving_average", [torch.tensor([-1.0, 2.0]), torch.tensor([-3.0, 12.0])])
    assert low == pytest.approx(-1 - 0.02) and high == pytest.approx(2 + 0.1)
    same = [torch.tensor([-1.5, 2.5])] * 5
    assert seen("moving_average", same) == (-1.5, 2.5)


def test_percentile_clips_at_most_its_share():
    x = normal()
    low, high = seen("percentile", x.split(30_000))
    assert float((x.abs() > high).float().mean()) <= 1e-4 and high < float(x.abs().max())
    below = high - float(x.abs().max()) * 2 / BINS  # one bin less clips more than the share
    assert float((x.abs() > below).float().mean()) > 1e-4 and low == -high


@pytest.mark.parametrize("bits, clip", [(8, 3.93), (4, 2.48), (2, 1.23)])
def test_squared_error_on_normal_data(bits, clip):
    assert seen("mse", [normal()], bits)[1] == pytest.approx(clip, rel=0.06)


def test_squared_error_follows_outliers_and_divergence_clips_them():
    assert 3.7 < seen("kl", [normal()])[1] < 4.75  # 4.27 of another sample
    assert seen("kl", [normal(outliers=True)])[1] < 6
    assert seen("mse", [normal(outliers=True)])[1] > 20
    assert seen("kl", [normal().clamp_min(0)])[1] > 3.7  # half of it exactly 0, as after a ReLU


def test_squared_error_is_the_least_by_exhaustive_search():
    x = normal()[:5000].abs()
    chosen = seen("mse", [x], 4)[1]

    def loss(clip):
        step = clip / 15  # unsigned: 16 levels
        return float((x - (x / step).round().clamp(0, 15) * step).square().sum())

    assert loss(chosen) <= 1.01 * min(loss(c) for c in np.linspace(0.3, float(x.max()), 400))
    assert loss(chosen) < loss(float(x.max()))


def test_divergence_by_a_plain_loop():
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 9, 60).astype(float)
    counts[[3, 17, 40]] = 0
    for i, levels in ((20, 4), (37, 8), (60, 16)):
        p, q = counts[:i].copy(), np.zeros(i)
        p[-1] += counts[i:].sum()
        for g in range(levels):
            inside = [k for k in range(i) if k * levels // i == g]
            filled = [k for k in inside if counts[k] > 0]
            for k in filled:
                q[k] = counts[inside].sum() / len(filled)
        p, q = p / p.sum(), q / q.sum()
        expected = sum(a * np.log(a / b) if b > 0 else np.inf for a, b in zip(p, q, strict=True) if a > 0)
        assert divergence(counts, i, levels) == pytest.approx(expected)


@pytest.mark.parametrize("name", OBSERVERS)
def test_every_rule_scales_with_its_input(name):
    x = normal()[:20_000]
    one, big = seen(name, [x]), seen(name, [8 * x])
    assert big == pytest.approx([8 * end for end in one], rel=1e-4)


@pytest.mark.parametrize("name", OBSERVERS)
def test_non_negative_data_keep_their_zero_and_constants_work(name):
    low, high = seen(name, [normal().abs(), 3 * normal()[:100].abs()])
    assert low >= 0 and high > 0
    assert seen(name, [torch.zeros(10)] * 2) == (0.0, 0.0)
    assert seen(name, [torch.full((500,), 2.5)])[1] == pytest.approx(2.5, rel=2 / START)


def test_the_histogram_doubles_without_losing_counts():
    observer = find_observer("percentile")(8)
    for peak in (1.0, 3.0, 17.0):
        observer.update(torch.linspace(0, peak, 1000))
    assert observer.counts.sum() == 3000 and observer.reach == 32.0


def test_unknown_rules_and_broken_activations():
    with pytest.raises(ConfigError, match="minmax, moving_average, percentile, kl, mse"):
        find_observer("entropy")
    broken = torch.ones(4, 1, 4, 4)
    broken[0, 0, 0, 0] = float("nan")
    plain, net = torch.ones(300, 1, 4, 4), torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1))
    for name in OBSERVERS:
        for inputs in (broken, torch.cat([broken, plain]), torch.cat([plain, broken])):
            with pytest.raises(CompressError, match="not finite"):
                calibrate(net, inputs, 8, name)


def test_counts_beyond_those_of_float32():
    x = torch.full((2**24 + 1000,), 0.25)
    x[0] = 1.0
    seen = OBSERVERS["mse"](8)
    seen.update(x)
    assert seen.counts.sum() == len(x)
