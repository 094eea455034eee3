"""Knapsacks against enumeration, against their guarantees, and against the worked examples of the specification."""

import itertools

import pytest
import torch

from methods.annc.knapsack import choose_options, keep_worthiest
from methods.core.errors import BudgetError

BITS = range(1, 9)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def layers(seed, sizes=(3, 4, 2), costs=(1, 2, 3, 5)):
    g = seeded(seed)
    drawn = [costs[int(torch.randint(len(costs), (), generator=g))] for _ in sizes]
    return [torch.randn(n, generator=g) for n in sizes], drawn


def worth(weights, masks):
    return sum(float((w.double() ** 2)[m].sum()) for w, m in zip(weights, masks, strict=True))


def cost(masks, costs):
    return sum(int(m.sum()) * c for m, c in zip(masks, costs, strict=True))


def optimum(weights, costs, limit):
    """The best worth over all subsets."""
    items = [(float(x.double() ** 2), c) for w, c in zip(weights, costs, strict=True) for x in w]
    best = 0.0
    for chosen in itertools.product((0, 1), repeat=len(items)):
        if sum(take * c for take, (_, c) in zip(chosen, items, strict=True)) <= limit:
            best = max(best, sum(take * value for take, (value, _) in zip(chosen, items, strict=True)))
    return best


# --- weights ------------------------------------------------------------------------------------------------


def test_the_worked_example():
    a, b = torch.tensor([3.0, -1.0, 0.5]), torch.tensor([2.0, 1.5])
    masks = keep_worthiest([a, b], [2, 4], 8)  # scores 4.5 .5 .125 and 1 .5625: prefix {3, 2}, cost 6
    assert [m.tolist() for m in masks] == [[True, False, False], [True, False]]
    masks = keep_worthiest([a, b], [2, 4], 8, fill=True)  # 1.5 does not fit, -1 does: 14, the optimum
    assert [m.tolist() for m in masks] == [[True, True, False], [True, False]]
    assert worth([a, b], masks) == 14.0 == optimum([a, b], [2, 4], 8)


@pytest.mark.parametrize("seed", range(12))
def test_guarantees_against_all_subsets(seed):
    weights, costs = layers(seed)
    items = sorted(((float(x) ** 2 / c, float(x) ** 2, c) for w, c in zip(weights, costs, strict=True) for x in w),
                   reverse=True)
    for limit in range(1, 30, 3):
        masks, filled = (keep_worthiest(weights, costs, limit, fill=fill) for fill in (False, True))
        best = optimum(weights, costs, limit)
        spent, prefix = 0, []
        for _, value, c in items:
            if spent + c > limit:
                break
            spent, prefix = spent + c, [*prefix, value]
        assert worth(weights, masks) == pytest.approx(sum(prefix)) and cost(masks, costs) == spent
        left_out = items[len(prefix)][1] if len(prefix) < len(items) else 0.0
        assert sum(prefix) <= best * (1 + 1e-9) <= (sum(prefix) + left_out) * (1 + 2e-9)
        skipped, total = 0, 0.0
        for _, value, c in items:
            if skipped + c <= limit:
                skipped, total = skipped + c, total + value
        assert worth(weights, filled) == pytest.approx(total) and cost(filled, costs) == skipped


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("each", [1, 3])
def test_equal_costs_are_solved_exactly(seed, each):
    weights, _ = layers(seed)
    for limit in range(0, 9 * each + 2):
        masks = keep_worthiest(weights, [each] * 3, limit)
        assert sum(int(m.sum()) for m in masks) == min(limit // each, 9)  # k weights, not k - 1
        assert worth(weights, masks) == pytest.approx(optimum(weights, [each] * 3, limit))


def test_ties_and_neighbouring_floats():
    first = torch.tensor([1.0, 2.0, 1.0, 1.0])
    assert keep_worthiest([first, first], [3, 3], 12)[0].tolist() == [True, True, True, False]
    assert keep_worthiest([first, first], [3, 3], 12)[1].tolist() == [False, True, False, False]
    big = torch.tensor([1.0, 1.0 + 2**-23, 1e-30, 2e-30])  # squares tie, or underflow
    assert keep_worthiest([big], [1], 1)[0].tolist() == [False, True, False, False]
    assert keep_worthiest([big], [7], 21)[0].tolist() == [True, True, False, True]


@pytest.mark.parametrize("seed", range(4))
def test_support_properties(seed):
    weights, costs = layers(seed, (40, 25, 60))
    before = None
    for limit in range(0, 400, 23):
        masks = keep_worthiest(weights, costs, limit)
        assert cost(masks, costs) <= limit
        assert before is None or all(bool((m | ~b).all()) for m, b in zip(masks, before, strict=True))  # nested
        before = masks
        scaled = keep_worthiest([w * 64 for w in weights], costs, limit)
        assert all(map(torch.equal, scaled, masks))
        dearer = keep_worthiest(weights, [2 * costs[0], *costs[1:]], limit)
        assert int(dearer[0].sum()) <= int(masks[0].sum())
        kept = [w * m for w, m in zip(weights, masks, strict=True)]
        again = keep_worthiest(kept, costs, limit)
        assert all(bool((a | (k == 0)).all()) for a, k in zip(again, kept, strict=True))  # idempotent
    order = torch.randperm(60, generator=seeded(seed))
    moved = keep_worthiest([*weights[:2], weights[2][order]], costs, 200)
    assert torch.equal(moved[2], keep_worthiest(weights, costs, 200)[2][order])


def test_shapes_are_kept_and_channels_last_order_does_not_matter():
    w = torch.randn(4, 3, 5, 5, generator=seeded(0))
    mask = keep_worthiest([w, w[0]], [2, 1], 90)[0]
    assert mask.shape == w.shape
    assert torch.equal(keep_worthiest([w.contiguous(memory_format=torch.channels_last), w[0]], [2, 1], 90)[0], mask)


@pytest.mark.parametrize("fill", [False, True])
def test_largest_of_every_layer_come_first(fill):
    weights = [torch.tensor([5.0, 6.0, 7.0]), torch.tensor([0.1, 0.3, 0.2]), torch.zeros(2)]
    masks = keep_worthiest(weights, [1, 2, 4], 8, at_least=1, fill=fill)
    assert [m.tolist() for m in masks] == [[False, True, True], [False, True, False], [True, False]]
    with pytest.raises(BudgetError, match="cost 7: the limit is 6"):
        keep_worthiest(weights, [1, 2, 4], 6, at_least=1)


def test_running_cost_is_a_whole_number():
    n = 2**15
    weights = [torch.ones(n), torch.full((1,), 2.0**14)]
    masks = keep_worthiest(weights, [1, 2**24], 2**24 + n - 1)  # 2^24 first; a float32 sum would stay there
    assert [int(m.sum()) for m in masks] == [n - 1, 1]


# --- options ------------------------------------------------------------------------------------------------


def all_choices(costs, losses, limit):
    """Loss of the best choice that fits, by enumeration."""
    found = [sum(d[o] for d, o in zip(losses, options, strict=True))
             for options in itertools.product(*(range(len(c)) for c in costs))
             if sum(c[o] for c, o in zip(costs, options, strict=True)) <= limit]
    return min(found)


def best_by_cost(costs, losses, limit):
    """The same by dynamic programming over whole costs."""
    best = [0.0] + [float("inf")] * limit
    for c, d in zip(costs, losses, strict=True):
        best = [min((best[spent - cost] + loss for cost, loss in zip(c, d, strict=True) if cost <= spent),
                    default=float("inf")) for spent in range(limit + 1)]
        best = [min(best[:spent + 1]) for spent in range(limit + 1)]
    return best[limit]


def relaxed(costs, losses, limit):
    """Loss of the linear relaxation: the largest Lagrangian bound, piecewise linear with kinks at slopes."""
    slopes = {max((d[i] - d[j]) / (c[j] - c[i]), 0.0) for c, d in zip(costs, losses, strict=True)
              for i in range(len(c)) for j in range(len(c)) if c[j] > c[i]} | {0.0}
    return max(sum(min(x + s * y for x, y in zip(d, c, strict=True)) for c, d in zip(costs, losses, strict=True))
               - s * limit for s in slopes)


def test_the_worked_example_of_bits():
    kept, losses = (10, 4), [[10, 4, 1, 0.9], [6, 5, 1, 0.5]]
    costs = [[b * k for b in (1, 2, 3, 4)] for k in kept]
    assert choose_options(costs, losses, 40) == [1, 3]  # bits (2, 4): 4.5 for 36, which is the optimum
    assert all_choices(costs, losses, 40) == 4.5
    assert choose_options(costs, losses, 14) == [0, 0]
    with pytest.raises(BudgetError, match="cost 14: the limit is 13"):
        choose_options(costs, losses, 13)
    assert choose_options(costs, losses, 10**6) == [3, 3]


@pytest.mark.parametrize("seed", range(40))
def test_options_fit_and_are_near_the_optimum(seed):
    g = seeded(seed)
    groups, options = int(torch.randint(2, 6, (), generator=g)), len(BITS) if seed % 2 else 3
    kept = torch.randint(1, 12, (groups,), generator=g).tolist()
    costs = [[b * k for b in range(1, options + 1)] for k in kept]
    losses = torch.rand(groups, options, generator=g).mul(4).sort(1, descending=seed % 4 < 3).values.tolist()
    floor, ceiling = sum(c[0] for c in costs), sum(c[-1] for c in costs)
    for limit in range(floor, ceiling + 3, max((ceiling - floor) // 7, 1)):
        chosen = choose_options(costs, losses, limit)
        assert len(chosen) == groups
        assert sum(c[o] for c, o in zip(costs, chosen, strict=True)) <= limit
        loss = sum(d[o] for d, o in zip(losses, chosen, strict=True))
        best = best_by_cost(costs, losses, limit)
        if options == 3:
            assert best == pytest.approx(all_choices(costs, losses, limit))
        step = max(max(d) - min(d) for d in losses)
        assert best - 1e-9 <= loss <= relaxed(costs, losses, limit) + step + 1e-9


@pytest.mark.parametrize("seed", range(10))
def test_exact_at_every_step_of_the_hulls(seed):
    g = seeded(seed)
    kept = torch.randint(1, 6, (3,), generator=g).tolist()
    costs = [[b * k for b in range(1, 5)] for k in kept]
    losses = torch.rand(3, 4, generator=g).sort(1, descending=True).values.tolist()
    for limit in range(sum(kept), 4 * sum(kept) + 1):
        chosen = choose_options(costs, losses, limit)
        if sum(c[o] for c, o in zip(costs, chosen, strict=True)) == limit:
            slopes = [[(d[o] - d[j]) / (c[j] - c[o]) for j in range(4) if j != o]
                      for c, d, o in zip(costs, losses, chosen, strict=True)]
            ups = [max(s[o:], default=0.0) for s, o in zip(slopes, chosen, strict=True)]
            downs = [min(s[:o], default=float("inf")) for s, o in zip(slopes, chosen, strict=True)]
            if max(ups) <= min(downs):  # a price exists that makes this choice the best everywhere
                loss = sum(d[o] for d, o in zip(losses, chosen, strict=True))
                assert loss == pytest.approx(best_by_cost(costs, losses, limit))


def test_a_group_that_does_not_fit_is_closed_and_others_go_on():
    costs, losses = [[1, 10, 11], [1, 2]], [[100.0, 1.0, 0.99], [1.0, 0.0]]
    assert choose_options(costs, losses, 5) == [0, 1]  # the first step (10) is too dear: not its last one either
    assert choose_options(costs, losses, 12) == [1, 1]


def test_worse_options_are_never_chosen():
    costs, losses = [[1, 2, 3], [0, 0, 0]], [[1.0, 2.0, 0.5], [3.0, 1.0, 2.0]]
    assert choose_options(costs, losses, 2) == [0, 1]  # dearer and worse; free and best
    assert choose_options(costs, losses, 3) == [2, 1]
    assert choose_options([[0] * 8], [[0.0] * 8], 0) == [0]  # a layer without weights takes the narrowest


@pytest.mark.parametrize("fill", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_thousands_of_weights_in_one_order(seed, fill):
    """The greedy pass written out, with ties, over magnitudes of many orders: no shortcut may change what is kept."""
    g = seeded(seed)
    sizes, costs = (700, 1, 1200, 300), (3, 8, 2, 5)
    weights = [(torch.randn(n, generator=g) * 10 ** (6 * torch.rand(n, generator=g) - 3)).bfloat16().float()
               for n in sizes]
    items = sorted((-float(x) ** 2 / cost, layer, place)
                   for layer, (w, cost) in enumerate(zip(weights, costs, strict=True))
                   for place, x in enumerate(w.double()))
    for limit in (0, 1, 2, 7, 1000, 4321, sum(n * c for n, c in zip(sizes, costs, strict=True)) - 1, 10**6):
        kept, spent = set(), 0
        for _, layer, place in items:
            if spent + costs[layer] <= limit:
                spent += costs[layer]
                kept.add((layer, place))
            elif not fill:
                break
        masks = keep_worthiest(weights, costs, limit, fill=fill)
        assert {(layer, int(place)) for layer, mask in enumerate(masks) for place in mask.nonzero()} == kept
