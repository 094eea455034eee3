"""Criteria and schedules: exact counts, orders stated by hand, and the groups of layers that share channels."""

import itertools
import math

import pytest
import torch
from torch import nn

from methods.core.errors import ConfigError
from methods.core.fit.criteria import CRITERIA, choose, find_criterion, per_channel, score_weight
from methods.core.fit.schedules import SCHEDULES, density_at
from methods.core.graph.coupled import find_groups
from methods.core.graph.graph import trace


@pytest.mark.parametrize("density", [1.0, 0.9, 0.5, 0.07])
def test_level_prunes_the_whole_part_of_the_share_and_the_smallest(density):
    weight = torch.randn(10, 10)
    mask = choose({"w": score_weight("level", weight)}, {"w": density}, "local")["w"]
    assert int((~mask).sum()) == int(round((1 - density) * 100, 9))
    if not mask.all():
        assert weight[~mask].abs().max() <= weight[mask].abs().min()
    assert torch.equal(mask, choose({"w": score_weight("level", -weight)}, {"w": density}, "local")["w"])


def test_l1_and_l2_differ_in_their_order():
    weight = torch.tensor([[1.0, 0, 0, 0], [0.4, 0.4, 0.4, 0.4]])
    l1, l2 = (score_weight(name, weight) for name in ("l1", "l2"))
    assert torch.allclose(l1, torch.tensor([1.0, 1.6]).double()) and torch.allclose(l2, torch.tensor([1, 0.8]).double())


@pytest.mark.parametrize("criterion", ["l1", "l2"])
def test_a_filter_that_grows_is_never_pruned_earlier(criterion):
    weight = torch.randn(8, 3, 3, 3)
    for i in range(8):
        larger = weight.clone()
        larger[i] *= 1.7
        ranks = [int((score_weight(criterion, w) < score_weight(criterion, w)[i]).sum()) for w in (weight, larger)]
        assert ranks[1] >= ranks[0]


def test_fpgm_takes_the_mean_filter_first_and_does_not_see_a_shift():
    weight = torch.randn(7, 2, 3, 3).double()
    weight = torch.cat([weight, weight.mean(0, keepdim=True)])
    scores = score_weight("fpgm", weight)
    by_hand = torch.stack([sum((a - b).flatten().norm() for b in weight) for a in weight])
    assert torch.allclose(scores, by_hand) and int(scores.argmin()) == 7
    masks = [choose({"w": score_weight("fpgm", w)}, {"w": 0.5}, "local")["w"] for w in (weight, weight + 3.0)]
    assert torch.equal(*masks)


def test_scores_of_a_channel_are_sums():
    scores = torch.rand(4, 3, 2, 2)
    assert torch.allclose(per_channel(scores)[2], scores[2].sum())


def test_a_global_ranking_is_one_and_leaves_no_layer_empty():
    scores = {"a": torch.tensor([9.0, 8.0, 7.0]), "b": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    masks = choose(scores, dict.fromkeys("ab", 3 / 7), "global")
    assert masks["a"].tolist() == [True, True, False] and masks["b"].tolist() == [False, False, False, True]
    negative = choose({"a": -scores["a"], "b": -scores["b"]}, dict.fromkeys("ab", 0.01), "global")
    assert negative["a"].tolist() == [False, False, True] and int(negative["b"].sum()) == 1
    with pytest.raises(ConfigError, match="global' takes one density"):
        choose(scores, {"a": 0.5, "b": 0.4}, "global")
    with pytest.raises(ConfigError, match="scope = 'all': allowed are local, global"):
        choose(scores, dict.fromkeys("ab", 0.5), "all")


@pytest.mark.parametrize("floor", [0.0, 0.2, 0.7, 1.0])
def test_a_floor_is_kept_of_each_before_all_are_ranked(floor):
    generator = torch.Generator().manual_seed(0)
    scores = {"a": torch.rand(40, generator=generator), "b": torch.rand(3, 20, generator=generator) - 5,
              "c": torch.rand(7, generator=generator) - 9, "d": torch.rand(4, generator=generator) - 10}
    masks = choose(scores, dict.fromkeys("abcd", 0.3), "global", floor)
    least = {name: max(math.ceil(round(0.3 * floor * s.numel(), 9)), 1) for name, s in scores.items()}
    assert sum(int(mask.sum()) for mask in masks.values()) == max(34, sum(least.values()))  # 0.3 of 111
    assert all(int(masks[name].sum()) >= n for name, n in least.items())
    for name, s in scores.items():  # the best of each, and where more than the floor is kept, none better is left out
        assert s[masks[name]].min() >= s[~masks[name]].max()
        if int(masks[name].sum()) > least[name]:
            assert all(s[masks[name]].min() >= other[~masks[key]].max() for key, other in scores.items())


def test_pairs_without_sense_are_refused():
    fine = [(name, granularity) for name, one in CRITERIA.items() for granularity in one.granularities]
    assert len(fine) == 13 and all(find_criterion(*pair) for pair in fine)
    with pytest.raises(ConfigError, match="fpgm' ranks no single weight: allowed are level, taylor, movement, random"):
        find_criterion("fpgm", "weight")
    with pytest.raises(ConfigError, match="level' ranks no single channel: allowed are l1, l2, fpgm, slim"):
        find_criterion("level", "channel")
    with pytest.raises(ConfigError, match="criterion = 'big'"):
        find_criterion("big", "weight")
    with pytest.raises(ConfigError, match="granularity = 'filter'"):
        find_criterion("level", "filter")


def test_agp_of_ten_updates():
    wanted = [.271, .488, .657, .784, .875, .936, .973, .992, .999, 1.0]
    assert [round(1 - density_at("agp", 0.0, t, 10), 3) for t in range(1, 11)] == wanted


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_fall_to_the_goal_exactly(name):
    path = [density_at(name, 0.3, t, 7) for t in range(1, 8)]
    assert path[-1] == 0.3 and all(a >= b for a, b in itertools.pairwise(path))
    assert density_at(name, 0.3, 1, 1) == 0.3
    with pytest.raises(ConfigError, match="update 8 of 7"):
        density_at(name, 0.3, 8, 7)


def test_linear_and_geometric_by_their_definitions():
    assert density_at("linear", 0.2, 3, 4) == pytest.approx(1 - 0.8 * 3 / 4)
    assert density_at("geometric", 0.2, 3, 4) == pytest.approx(0.2 ** (3 / 4))
    assert density_at("lottery", 0.8**5, 2, 5) == pytest.approx(0.8**2)  # a fifth of what is left in every round
    with pytest.raises(ConfigError, match="schedule = 'cosine': allowed are one_shot"):
        density_at("cosine", 0.5, 1, 2)


class Depthwise(nn.Module):
    """A residual addition of a depthwise branch, then a classifier over flattened maps."""

    def __init__(self):
        super().__init__()
        self.a, self.deep = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.free, self.last, self.fc = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 1), nn.Linear(4 * 9, 2)

    def forward(self, x):
        x = torch.relu(self.a(x))
        x = x + self.last(torch.relu(self.free(self.deep(x))))
        return self.fc(torch.flatten(x, 1))


def test_groups_of_layers_that_share_channels(tiny):
    found = [(group.size, sorted(group.members)) for group in find_groups(trace(tiny.net()))]
    assert found == [(8, ["conv1", "conv2"]), (12, ["conv3"])]
    found = [(group.size, sorted(group.members)) for group in find_groups(trace(Depthwise()))]
    assert sorted(found) == [(4, ["a", "deep", "last"]), (6, ["free"])]
    for group in find_groups(trace(Depthwise())):
        assert all(torch.equal(places, torch.arange(group.size)) for places in group.members.values())


class Softened(nn.Module):
    """A value that an unknown operation reads whole."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.b(torch.cumsum(self.a(x), 1))


def test_channels_that_something_needs_are_in_no_group():
    assert find_groups(trace(Softened())) == []
