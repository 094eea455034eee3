"""What SPARQ leaves alone, what it refuses, and its tables of rows."""

import pytest
import torch
from torch import nn

from benchmarks import networks
from benchmarks.jobs import CONFIGS, prepare, read_table
from methods.core.errors import BudgetError, CompressError, ConfigError, GraphError
from methods.engine.exact import IntegerNetwork
from methods.engine.reference import ReferenceRun
from methods.sparq import Config

from .sparq_networks import chain, compress, draw, layer_of


def test_layers_with_signed_inputs_are_left_alone():
    model = chain()
    model[5] = nn.Identity()
    made = compress(model, draw(8))
    assert made.notes["left_alone"] == {"6": "its input may be negative"} and list(made.windows) == ["3"]
    assert made.activations["6"].zero > 0 and made.weights["6"].bits == 8  # ranges as of the first and the last
    lenet = networks.build("lenet5_caffe", 10, 1)  # no ReLU between its convolutions
    with pytest.raises(GraphError, match="conv2: its input may be negative, ip1"):
        compress(lenet, torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0)))


def reflecting():
    return nn.Sequential(*chain()[:3], nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"), *chain()[4:])


@pytest.mark.parametrize("make, why", [(lambda: chain(4, groups=2), "it has 2 groups"),
                                       (reflecting, "it pads with reflect")])
def test_layers_with_groups_or_other_padding_are_left_alone(make, why):
    model = make()
    made = compress(model, draw(8))
    assert made.notes["left_alone"] == {"3": why} and "3" not in made.windows and made.windows
    network, x = IntegerNetwork(made, model), draw(8)
    assert network.float_nodes == [] and torch.equal(network(x), torch.from_numpy(
        ReferenceRun(network, x).real(network.graph.output)))


def test_positive_inputs_without_a_zero_are_taken():
    layer = layer_of()
    layer.watch(torch.rand(2, 3, 2, 2) + 1)
    assert layer.quantizer().zero == 0


@pytest.mark.parametrize("change, message", [
    (lambda: chain()[-2:], r"the last of 1 as they are, .*there are none"),
    (lambda: nn.Sequential(*chain()[:2], *chain()[3:5], *chain()[-2:]), "2: its input may be negative")])
def test_networks_it_cannot_take(change, message):
    with pytest.raises(GraphError, match=message):
        compress(change(), draw(8))


@pytest.mark.parametrize("settings, message", [
    ({"windows": "4opt"}, "windows = '4opt': allowed are none, 5opt"), ({"activation_bits": 4}, "windows = 'none'"),
    ({"activation_bits": 0}, "allowed is 1"), ({"windows": "none", "activation_bits": 9}, "allowed is 1..8"),
    ({"excluded_bits": 1}, "excluded_bits = 1: allowed is 2..8 or none"), ({"calibration_inputs": 0}, "at least 1"),
    ({"recalibrations": 3}, "recalibrations = 3: allowed are 0, 1, 2")])
def test_settings_outside_what_is_allowed(settings, message):
    with pytest.raises(ConfigError, match=message):
        Config(**settings)


@pytest.mark.parametrize("bits", [1, 9, {"0": 8, "3": 1, "6": 8, "9": 8}])
def test_bits_outside_what_is_allowed(bits):
    with pytest.raises(BudgetError, match="sparq allows 2..8"):
        compress(chain(), draw(8), bits=bits)


def test_activations_that_overflow_are_named():
    model = chain()
    model[4].weight.data.fill_(3e38)
    with pytest.raises(CompressError, match="'6' are not finite"):
        compress(model, 1e30 * draw(8), Config(recalibrations=0))


@pytest.mark.parametrize("name, network", [("sparq_tables", "resnet56"), ("sparq_tables_resnet18", "resnet18")])
def test_the_rows_of_the_tables(name, network):
    table, found = read_table(CONFIGS / f"{name}.toml"), set()
    for job in table.rows:
        _, _, config = prepare(job)
        assert not job.paper and job.network == network and job.float_policy in ((), ("conv1", "fc"))
        found.add((config.windows, config.rounding, config.paired))
    assert {(window, rounding, paired) for window in ("5opt", "3opt", "2opt") for rounding in (True, False)
            for paired in (True, False)} | {("6opt", True, True), ("7opt", True, True)} <= found
