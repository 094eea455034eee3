"""Which weights go where a file is a little too large: those that take least of their layers."""

import itertools

import pytest
import torch

from methods.core.artifact import Affine, CompressedTensor
from methods.core.fit.trim import without_smallest
from methods.core.graph.build import assemble


def affine(codes, bits=8):
    return CompressedTensor.of(codes, Affine(torch.tensor(0.1), torch.tensor(0, dtype=torch.int32)), bits)


def trimmed(model, share):
    """{layer: which of its kept weights are gone, [kept] bool}."""
    found = without_smallest(model, share)
    return {name: ~found.weights[name].mask[tensor.mask] for name, tensor in model.weights.items()}


def model_of(*codes):
    layers = torch.nn.Sequential(*(torch.nn.Linear(one.shape[1], one.shape[0], bias=False) for one in codes))
    return assemble(layers, {f"{i}": affine(one) for i, one in enumerate(codes)})


def test_the_weights_that_go_take_least_of_their_layers():
    """The shares of their layers' squares, summed over all layers, are the least of all choices: against the root mean
    square of its layer, a weight of the small layer would go before all of the large one."""
    codes = torch.tensor([[1, 2, 3], [0, 5, 10]]), torch.tensor([[0, 5], [6, 9]]).repeat(5, 1)
    model = model_of(*codes)
    places = [(i, value) for i, one in enumerate(codes) for value in one[one != 0].tolist()]
    squares = [sum(value ** 2 for j, value in places if j == i) for i in (0, 1)]
    for count in (1, 2, 4):
        gone = trimmed(model, (count + 0.1) / len(places))
        taken = [value ** 2 / squares[i] for i, one in enumerate(codes)
                 for value in one[one != 0][gone[f"{i}"]].tolist()]
        least = min(sum(value ** 2 / squares[i] for i, value in chosen)
                    for chosen in itertools.combinations(places, count))
        assert len(taken) == count and sum(taken) == pytest.approx(least)
    assert 0 < int(trimmed(model, 4.1 / len(places))["0"].sum()) < 3


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3])
def test_both_signs_of_a_layer_lose_the_same(share):
    """Also where one sign has the smaller levels; else what the layer puts out would move."""
    generator = torch.Generator().manual_seed(0)
    levels = torch.tensor([-1, -2, 3, 6])
    codes = levels[torch.multinomial(torch.tensor([0.4, 0.2, 0.2, 0.2]), 4000, True, generator=generator)]
    codes = codes.reshape(40, 100)
    values = codes[trimmed(model_of(codes), share)["0"].reshape(40, 100)]
    assert len(values) == int(share * 4000) and abs(int(values.sum())) <= 6
    assert set(values.tolist()) <= ({-1, 3} if share < 0.3 else {-1, -2, 3})


def test_among_equal_weights_no_place_is_preferred():
    codes = torch.where(torch.rand(50, 200, generator=torch.Generator().manual_seed(0)) < 0.5, 3, -3)
    gone = trimmed(model_of(codes), 0.2)["0"].reshape(50, 200)
    assert int(gone.sum()) == 2000 and 20 <= int(gone.sum(1).min()) and int(gone.sum(1).max()) <= 60
    assert torch.equal(gone, trimmed(model_of(codes), 0.2)["0"].reshape(50, 200))  # equal files for equal arguments


def test_a_layer_that_keeps_nothing_or_one_sign_only():
    one, none, negative = torch.tensor([[5, 7]]), torch.zeros(1, 2, dtype=torch.int64), torch.tensor([[-1, -9]])
    gone = trimmed(model_of(one, none, negative), 0.3)
    assert [value.tolist() for value in gone.values()] == [[False, False], [], [True, False]]
