"""Dead codes in rate-aware training are gone for good, nobody counts them, and no output changes; zeros may be held."""

import copy

import pytest
import torch

from methods import rptq_train
from methods.core.file.storage import to_bytes
from methods.core.graph.build import weight_layers
from methods.rptq_train.rated import RateAware, Rated
from tests.perceptron import Plain, entropy


def test_dead_units_are_gone_before_the_file_is_weighed(tiny):
    """A unit that no later layer reads: with its weights still there, the file would be larger by their codes."""
    student = Plain()
    with torch.no_grad():
        student.b.weight[:, 50:] = 0
    with RateAware(student, dict.fromkeys(weight_layers(student), 0.01), 1e5, 0, False) as hooks:
        hooks.refresh(steer=False)
    made, size = rptq_train.Ending(student, Plain(), hooks, rptq_train.Config(), 1.0).at(0.0)
    assert made.topology.widths["a"][0] == 50 and made.weights["a"].codes.shape == (50, 192)
    assert size == len(to_bytes(made)[0])


def test_dead_codes_are_gone_for_good_and_nobody_counts_them():
    """Unit 50 and those after it are read by nobody, units 0 to 4 are constants that are read: taken into the bias."""
    student, inputs = Plain(), torch.randn(20, 192)
    with torch.no_grad():
        student.b.weight[:, 50:] = 0
        student.a.weight[:5], student.a.bias[:5] = 0, 0.7
    with RateAware(student, dict.fromkeys(weight_layers(student), 0.01), 1e5, 0, False, weigh=lambda hooks: 1000,
                   limit=900.0) as hooks:
        before = student(inputs)
        hooks.drop_dead()
        assert torch.allclose(student(inputs), before, atol=1e-5)
        hooks.after_epoch(student, 0)
        a, b = (hooks.quantizers[name].codes(hooks.behind(name)) for name in "ab")
        assert not a[50:].any() and not a[:5].any() and not b[:, :5].any() and a[5:50].any(1).all()
        held = [a[5:50].abs().numpy(), b[:, 5:50].abs().numpy()]
        signs = sum(int((values > 0).sum()) for values in held)
        assert hooks.entropy == pytest.approx(sum(v.size * entropy(v) for v in held) + signs, rel=1e-3)
        assert hooks.goal == pytest.approx(0.9 * hooks.entropy)
        with torch.no_grad():
            hooks.behind("a").add_(1), hooks.behind("b").add_(1)
        hooks.refresh()
        a, b = (hooks.quantizers[name].codes(hooks.behind(name)) for name in "ab")
        assert not a[50:].any() and not a[:5].any() and not b[:, 50:].any() and b[:, 5:50].all()


def test_dead_units_before_a_batch_norm_leave_the_outputs_as_they_are(tiny):
    student, inputs = tiny.model().eval(), tiny.task().calibration_inputs(20)
    with torch.no_grad():
        student.conv1.weight[:3] = 0
        student.bn1.bias[:3] = torch.tensor([-0.4, 0.0, 0.6])
    with RateAware(student, dict.fromkeys(weight_layers(student), 0.02), 1e4, 0, False) as hooks, torch.no_grad():
        before = student(inputs)
        hooks.drop_dead()
        assert torch.allclose(student(inputs), before, atol=1e-4 * float(before.abs().max()))
        assert not hooks.quantizers["conv2"].live[:, 0].any()


def test_a_resumed_training_remembers_what_is_dead():
    def hooked(model):
        return RateAware(model, dict.fromkeys(weight_layers(model), 0.01), 1e5, 0, False, weigh=lambda hooks: 1000,
                         limit=900.0)

    first = Plain()
    with torch.no_grad():
        first.b.weight[:, 50:] = 0
    second = copy.deepcopy(first)
    with hooked(first) as hooks:
        hooks.after_epoch(first, 0)
        state, weights = hooks.state(), first.state_dict()
        with hooked(second) as again:
            second.load_state_dict(weights)
            again.restore(state)
            assert not again.quantizers["a"].codes(torch.ones(112, 192))[50:].any()


@pytest.mark.parametrize("contexts", [False, True])
def test_zeros_that_are_held_stay_and_no_more_come(contexts):
    torch.manual_seed(0)
    weight = torch.randn(20, 30)
    quantizer = Rated(weight, 1.0, contexts)
    before = quantizer.codes(weight)
    quantizer.hold(weight)
    assert torch.equal(quantizer.codes(weight), before) and 0 < int((before == 0).sum()) < 600
    moved = torch.randn(20, 30) * 2
    after = quantizer.codes(moved)
    assert torch.equal(after != 0, before != 0)
    kept = before != 0
    assert torch.equal(after[kept], (moved.abs().add(0.5).floor().clamp_min(1) * moved.sign())[kept])


def test_zeros_are_held_from_the_step_that_was_asked_for():
    """At 3 of 6 steps; before, any weight may become one."""
    model, seen = Plain(), []
    with RateAware(model, dict.fromkeys(weight_layers(model), 0.05), 1e4, 0, False, holding=3) as hooks:
        for step in range(6):
            with torch.no_grad():
                weight = hooks.behind("a")
                weight.copy_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(step)))
            hooks.after_step(model, 0.0)
            seen.append(hooks.quantizers["a"].codes(hooks.behind("a")) != 0)
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    assert bool(seen[2].any()) and torch.equal(seen[2], seen[3]) and torch.equal(seen[3], seen[5])
