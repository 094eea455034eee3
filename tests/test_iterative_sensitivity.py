"""Iterative sensitivity: every step is the cheapest of all, the count of operations, and both orders."""

from dataclasses import replace

import pytest
import torch

from benchmarks.settings import build
from methods import iterative_sensitivity as method
from methods.core.budget import Budget
from methods.core.errors import BudgetError, ConfigError
from methods.core.graph.fold import fold_batchnorm


def made(tiny, **config):
    config = build(method.Config, {"calibration_inputs": 48, **config})
    return method.compress(tiny.model(), tiny.task(), Budget(), config, torch.Generator())


def network(tiny):
    return method.Rounded(fold_batchnorm(tiny.model())[0], tiny.task().calibration_inputs(48), "minmax")


MACS = {"conv1": 8 * 27 * 64, "conv2": 8 * 72 * 64, "conv3": 12 * 72 * 4, "fc": 48}


def test_bops_are_macs_times_both_widths(tiny):
    net = network(tiny)
    assert net.macs == MACS
    bits = net.start()
    assert bits["input", "conv1"] == 8 and bits["input", "conv2"] == 16 and bits["weight", "fc"] == 16
    by_hand = sum(n * 16 * (8 if name == "conv1" else 16) for name, n in MACS.items())
    assert net.bops(bits) == pytest.approx(100 * by_hand / (1024 * sum(MACS.values())))


def test_wide_widths_are_the_network(tiny):
    net, x = network(tiny).eval(), tiny.Batches(24, 9).inputs
    net.set(net.start())
    with torch.no_grad():
        assert torch.allclose(net(x), tiny.model()(x), atol=0.1)
        narrow = {tensor: net.least(tensor) for tensor in net.start()}
        net.set(narrow)
        assert not torch.allclose(net(x), tiny.model()(x), atol=0.1)
        assert all(len(layer.unique()) <= 3 for layer in net.inner.conv2.weight)


def test_every_step_is_the_cheapest_for_what_it_saves(tiny):
    out = made(tiny, bops_percent=4.0)
    net, task = network(tiny), tiny.task()
    bits = net.start()
    course = out.notes["course"]
    assert course and course[-1][3] <= 4.0 < course[-2][3]
    for what, name, width, bops, error in course:
        net.set(bits)
        before, cost = task.error(net), {}
        for tensor in bits:
            if bits[tensor] == net.least(tensor):
                continue
            lowered = {**bits, tensor: bits[tensor] // 2}
            net.set(lowered)
            cost[tensor] = (task.error(net) - before) / (net.bops(bits) - net.bops(lowered))
        assert cost[what, name] == min(cost.values()) and width == bits[what, name] // 2
        bits[what, name] = width
        net.set(bits)
        assert net.bops(bits) == bops and task.error(net) == error
    assert {name: tensor.bits for name, tensor in out.weights.items()} == {name: bits["weight", name] for name in MACS}
    assert {name: out.activations[name].bits for name in MACS} == {name: bits["input", name] for name in MACS}


def test_once_lowers_in_the_order_of_loss(tiny):
    course = made(tiny, bops_percent=3.0, order="once").notes["course"]
    errors = [step[-1] for step in course]
    assert errors == sorted(errors) and {step[2] for step in course} <= {4, 8} and course[-1][3] <= 3.0 < course[-2][3]


@pytest.mark.parametrize("order", method.ORDERS)
def test_interrupted_it_goes_on(order, tiny, monkeypatch):
    states, config = {}, method.Config(bops_percent=4.0, order=order, calibration_inputs=48)
    measured, error = [], method.Steps.error
    monkeypatch.setattr(method.Steps, "error", lambda steps, bits: measured.append(bits) or error(steps, bits))

    def run(**options):
        measured.clear()
        found = method.compress(tiny.model(), tiny.task(), Budget(), config, torch.Generator(),
                                run=tiny.Run(states, **options))
        return found.notes, len(measured)

    with pytest.raises(tiny.Interrupted):
        run(limit=4)
    notes, after = run()
    states.clear()
    assert (notes, after < run()[1]) == (run()[0], True)


def test_labels_are_held_out_ones_and_are_said_to_be_seen(tiny):
    """Without them there is nothing to choose by; training batches are not asked for."""
    config = method.Config(bops_percent=4.0, calibration_inputs=48)
    whole = tiny.task()
    out = [method.compress(tiny.model(), task, Budget(), config, torch.Generator()).notes
           for task in (whole, whole.seen_as(method.DATA))]
    assert out[0] == out[1] and method.DATA == "held_out"
    mixed = replace(whole, held_out=tiny.Batches(48, 2))
    mixed.held_out.targets = mixed.held_out.targets.roll(1)
    assert method.compress(tiny.model(), mixed, Budget(), config, torch.Generator()).notes != out[0]


@pytest.mark.parametrize("config, kind, message", [
    ({"bops_percent": 0.3}, BudgetError, "bops_percent = 0.3: the narrowest widths take "),
    ({"bops_percent": 1.0, "order": "once"}, BudgetError, "order = 'once' ends at 4 bits everywhere"),
    ({"bops_percent": 0.0}, ConfigError, "bops_percent = 0.0"), ({"order": "random"}, ConfigError, "allowed are each")])
def test_mistakes_are_one_line(config, kind, message, tiny):
    with pytest.raises(kind, match=message) as caught:
        made(tiny, **config)
    assert "\n" not in str(caught.value)
