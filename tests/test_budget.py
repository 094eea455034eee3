"""Budgets: ranges, required and foreign fields, and values per layer."""

import pytest

from methods.core.budget import Budget
from methods.core.errors import BudgetError

RATIOS = ("density", "channel_density", "data_ratio", "size_ratio")
LAYERS = ("conv1", "fc")


@pytest.mark.parametrize("name", RATIOS)
@pytest.mark.parametrize("value", [0, 0.0, -0.1, 1.0000001, 2, float("nan"), float("inf"), True, "0.5", [0.5]])
def test_ratios_outside_0_to_1_are_refused(name, value):
    with pytest.raises(BudgetError, match=rf"budget {name} = .*allowed is a number in \(0, 1\]"):
        Budget(**{name: value})


@pytest.mark.parametrize("name", RATIOS)
@pytest.mark.parametrize("value", [1, 1.0, 1e-9, 0.5])
def test_ratios_in_0_to_1_are_taken(name, value):
    assert getattr(Budget(**{name: value}), name) == value


@pytest.mark.parametrize("value", [0, 17, -1, 2.5, float("nan"), float("inf"), True, "8"])
def test_widths_that_are_no_whole_number_of_bits(value):
    with pytest.raises(BudgetError, match=r"whole number of bits in 1\.\.16"):
        Budget(bits=value)
    with pytest.raises(BudgetError, match=r"budget bits\['fc'\]"):
        Budget(bits={"conv1": 4, "fc": value})


def test_widths_from_1_to_16():
    assert [Budget(bits=b).bits for b in (1, 16, 4.0)] == [1, 16, 4.0]


def test_a_value_per_layer_is_checked_by_layer():
    assert Budget(density={"conv1": 0.5, "fc": 1}).density == {"conv1": 0.5, "fc": 1}
    with pytest.raises(BudgetError, match=r"budget density\['fc'\] = 0:"):
        Budget(density={"conv1": 0.5, "fc": 0})


@pytest.mark.parametrize("name", ["data_ratio", "size_ratio"])
def test_ratios_of_the_whole_network_take_one_number(name):
    with pytest.raises(BudgetError, match="one number for the whole network"):
        Budget(**{name: {"fc": 0.5}})


def test_a_method_refuses_what_it_cannot_honour_and_asks_for_what_it_needs():
    budget = Budget(density=0.5, bits=4)
    budget.require("m", "density", "bits")
    budget.require("m", "density", optional=("bits",))
    Budget(density=0.5).require("m", "density", optional=("bits",))
    with pytest.raises(BudgetError, match="m cannot honour the budget field 'bits'; it takes: density, size_ratio"):
        budget.require("m", "density", optional=("size_ratio",))
    with pytest.raises(BudgetError, match="m needs the budget field 'size_ratio'"):
        budget.require("m", "density", "bits", "size_ratio")


@pytest.mark.parametrize("needed, optional", [(("density", "bits"), ()), ((), ("bits",)), ((), ())])
def test_a_size_that_a_method_does_not_take_names_the_way_in(needed, optional):
    """Before any field that is lacking, which that way would choose."""
    with pytest.raises(BudgetError) as caught:
        Budget(size_ratio=0.1).require("m", *needed, optional=optional)
    said = str(caught.value)
    assert "'size_ratio' (compress_to_size(m, model, task, budget, config, generator) can)" in said
    assert said.endswith(f"it takes: {', '.join(needed + optional) or 'none'}") and "\n" not in said
    Budget(size_ratio=0.1).require("m", optional=("size_ratio",))


def test_per_layer():
    assert Budget(density=0.5).per_layer("density", LAYERS) == {"conv1": 0.5, "fc": 0.5}
    assert Budget().per_layer("bits", LAYERS) == {"conv1": None, "fc": None}
    given = Budget(bits={"fc": 2, "conv1": 8}).per_layer("bits", iter(LAYERS))
    assert list(given.items()) == [("conv1", 8), ("fc", 2)]  # in the network's order
    with pytest.raises(BudgetError, match=r"unknown layers \['fc1'\]; the network has: conv1, fc"):
        Budget(bits={"fc": 2, "conv1": 8, "fc1": 2}).per_layer("bits", LAYERS)
    with pytest.raises(BudgetError, match="no Conv2d and no Linear"):
        Budget(density=0.5).per_layer("density", [])


LEFT = [  # forms in which conv1 is worked on and fc is left alone
    ({"conv1": 4}, 0.5), ({"conv1": 4, "fc": None}, 0.5), ({"conv1": 4, "fc": 32}, 0.5), ({"*": 4, "fc": None}, 0.5),
    (4, {"conv1": 0.5}), (4, {"*": 0.5, "fc": None}), ({"conv1": 4}, {"conv1": 0.5}), ({"conv1": 4}, {"*": 0.5}),
    ({"conv1": 4, "fc": 8}, {"conv1": 0.5, "fc": None}), ({"*": 32, "conv1": 4}, 0.5)]


@pytest.mark.parametrize("bits, density", LEFT)
def test_a_layer_is_left_alone_in_every_form(bits, density):
    budget = Budget(bits=bits, density=density)
    assert budget.per_layer("bits", LAYERS) == {"conv1": 4} and budget.per_layer("density", LAYERS) == {"conv1": 0.5}
    with pytest.raises(BudgetError, match="m works on all layers together: it cannot leave fc alone"):
        budget.every_layer("bits", LAYERS, "m")


def test_a_default_and_its_exceptions():
    budget = Budget(density={"*": 0.1, "fc": 1.0}, bits={"*": 4, "fc": 8})
    assert budget.per_layer("density", LAYERS) == {"conv1": 0.1, "fc": 1.0}
    assert budget.every_layer("bits", LAYERS, "m") == {"conv1": 4, "fc": 8}
    assert Budget(bits={"conv1": 4}).per_layer("density", LAYERS) == {"conv1": None}  # no limit, and fc left alone
    assert Budget(channel_density={"fc": 0.5}, bits={"conv1": 4}).per_layer("channel_density", LAYERS) == {"fc": 0.5}


def test_a_budget_that_leaves_everything_alone_is_refused():
    for given in ({}, {"*": None}, {"conv1": None, "fc": None}):
        with pytest.raises(BudgetError, match="leaves every layer alone: conv1, fc"):
            Budget(density=given).per_layer("density", LAYERS)
    with pytest.raises(BudgetError, match="leaves every layer alone"):
        Budget(density={"conv1": 0.5}, bits={"fc": 4}).per_layer("bits", LAYERS)
    for wrong in ({"bits": 32}, {"bits": {"fc": 33}}, {"density": {"fc": 32}}, {"density": {"*": 0}}):
        with pytest.raises(BudgetError, match="allowed is"):
            Budget(**wrong)


def test_layers_can_be_left_by_name():
    assert Budget(density=0.1, bits={"conv1": 4}).leaving(["fc"]) == Budget(
        density={"*": 0.1, "fc": None}, bits={"conv1": 4, "fc": None})
    assert Budget(density=0.1).leaving([]).per_layer("density", LAYERS) == {"conv1": 0.1, "fc": 0.1}
    with pytest.raises(BudgetError, match="no layers to leave alone"):
        Budget(data_ratio=0.1).leaving(["fc"])
