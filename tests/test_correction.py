"""What trimming moves is corrected: batch norm by the differential of a batch, biases by the means of outputs."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from methods import Budget, Task, apply, prune_then_quantize
from methods.core.errors import CompressError
from methods.core.file.storage import file_bytes
from methods.core.fit.batchnorm import statistics_on
from methods.core.fit.correction import INPUTS, corrected, correction_of, has_norms
from methods.core.fit.quantize import fit_symmetric, quantize
from methods.core.fit.trim import trimmed, without_smallest
from methods.core.graph.build import assemble
from methods.core.graph.weights import weight_layers


def coded(model, bits=4):
    return assemble(model, {name: quantize(layer.weight, fit_symmetric(layer.weight, bits), bits)
                            for name, layer in weight_layers(model).items()})


def folded(tiny):
    """A network whose batch norms are in its biases."""
    found = prune_then_quantize.compress(tiny.model(), tiny.task(), Budget(density=0.5, bits=4),
                                         prune_then_quantize.Config(),
                                         torch.Generator().manual_seed(0))
    assert not any("running" in name for name in found.rest)
    return found


def outputs(network, x):
    """{layer: what it puts out} of convolutions and linear layers."""
    found = {}
    hooks = [layer.register_forward_hook(lambda layer, args, out, name=name: found.__setitem__(name, out.detach()))
             for name, layer in weight_layers(network).items()]
    network.eval()(x)
    for hook in hooks:
        hook.remove()
    return found


def test_nothing_gone_nothing_moved(tiny):
    x = torch.randn(64, *tiny.shape)
    for whole in (coded(tiny.model()), folded(tiny)):
        same = corrected(whole, whole, tiny.model(), x)
        assert all(torch.allclose(same.rest[name], value, atol=1e-5) for name, value in whole.rest.items())
        assert list(same.rest) == list(whole.rest) and all(same.rest[n].dtype == v.dtype for n, v in whole.rest.items())


def test_batch_norm_takes_the_difference():
    """One layer, by its definition: m, u of W x and of W~ x on the batch."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).eval()
    model[1].running_mean.copy_(torch.randn(4))
    model[1].running_var.copy_(torch.rand(4) + 0.5)
    whole, x = coded(model, 8), torch.randn(50, 6) + 1
    less = without_smallest(whole, 0.3)
    found = corrected(less, whole, model, x).rest
    before, after = (apply(one, model)[0](x).detach().double() for one in (whole, less))
    v = model[1].running_var.double() + 1e-5
    u, w = (y.var(0, unbiased=False) + 1e-5 for y in (before, after))
    assert not torch.allclose(before.mean(0), after.mean(0), atol=1e-3)
    assert torch.allclose(found["1.running_mean"].double(),
                          model[1].running_mean + (after.mean(0) - before.mean(0)) * (v / u).sqrt(), atol=1e-5)
    assert torch.allclose(found["1.running_var"].double(), v * w / u - 1e-5, atol=1e-5)


def test_biases_give_every_layer_its_means_back(tiny):
    """Layer by layer in order: behind a corrected layer the inputs of the next one are the corrected ones."""
    whole, x = folded(tiny), torch.randn(64, *tiny.shape)
    less = without_smallest(whole, 0.3)
    wanted = outputs(apply(whole, tiny.model()), x)
    lost, now = (outputs(apply(one, tiny.model()), x) for one in (less, corrected(less, whole, tiny.model(), x)))

    def means(out):
        return out.double().mean((0, *range(2, out.ndim)))

    assert any(not torch.allclose(means(wanted[name]), means(lost[name]), atol=1e-3) for name in wanted)
    for name in wanted:
        assert torch.allclose(means(wanted[name]), means(now[name]), atol=1e-5), name


class Tokens(nn.Module):
    """A linear layer on positions [N, T, C], one that runs twice, one without bias; no batch norm."""

    def __init__(self):
        super().__init__()
        self.each, self.twice, self.bare = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3, bias=False)

    def forward(self, x):
        return self.bare(self.twice(self.twice(self.each(x)).relu()).mean(1))


def test_linear_layers_on_positions_and_layers_that_run_twice():
    torch.manual_seed(0)
    model, x = Tokens().eval(), torch.randn(20, 7, 5) + 1
    whole = coded(model)
    less = without_smallest(whole, 0.2)
    now = corrected(less, whole, model, x)
    before, after = (apply(one, model).each(x).detach().double().mean((0, 1)) for one in (whole, now))
    assert torch.allclose(before, after, atol=1e-5)
    assert torch.equal(now.rest["twice.bias"], less.rest["twice.bias"]) and "bare.bias" not in now.rest


def test_less_is_lost_than_without(tiny):
    """What it is for: outputs nearer to those of the network with all its weights."""
    task = tiny.task()
    for whole in (coded(tiny.model(), 3), folded(tiny)):
        less = without_smallest(whole, 0.1)
        now = correction_of(whole, tiny.model(), task, 0)(less)
        x = torch.cat([inputs for inputs, _ in task.held_out.epoch(None)])
        want, lost, kept = (apply(one, tiny.model())(x).detach() for one in (whole, less, now))
        assert (kept - want).square().mean() < 0.7 * (lost - want).square().mean()
        assert all(torch.equal(less.weights[n].codes, now.weights[n].codes) for n in less.weights)


def test_equal_arguments_give_equal_bytes(tiny):
    whole = coded(tiny.model(), 3)
    less = without_smallest(whole, 0.1)
    task = SimpleNamespace(training_inputs=lambda n, generator: torch.randn(n, *tiny.shape, generator=generator))
    one, two, other = (correction_of(whole, tiny.model(), task, seed)(less) for seed in (0, 0, 1))
    assert tiny.same(one.rest, two.rest) and not tiny.same(one.rest, other.rest) and INPUTS == 512


def test_without_a_task_or_with_inputs_of_two_tensors_nothing_is_corrected(tiny):
    whole = coded(tiny.model(), 3)
    less = without_smallest(whole, 0.1)
    pairs = Task.from_loader([((torch.randn(4, 3, 8, 8), torch.randn(4, 2)), torch.arange(4))], [])
    assert correction_of(whole, tiny.model(), None, 0)(less) is less
    assert correction_of(whole, tiny.model(), pairs, 0)(less) is less


class Opaque(nn.Module):
    """Control flow on values, which torch.fx cannot follow; a norm without statistics; one that runs twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.plain = nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, x):
        x = self.norm(self.conv(x))
        if x.sum() > -1e9:
            x = self.norm(self.conv(x.relu()))
        return self.plain(x).flatten(1)


def test_networks_that_cannot_be_traced():
    torch.manual_seed(0)
    model, x = Opaque().eval(), torch.randn(16, 3, 6, 6)
    whole = coded(model)
    less = without_smallest(whole, 0.2)
    assert has_norms(whole, model)
    now = corrected(less, whole, model, x)
    assert not torch.equal(now.rest["norm.running_mean"], less.rest["norm.running_mean"])
    (name,), ((mean, variance),) = statistics_on(model, x).keys(), statistics_on(model, x).values()
    one = model.conv(x).detach()
    other = model.conv(torch.nn.functional.batch_norm(one, None, None, model.norm.weight, model.norm.bias, True).relu())
    assert name == "norm"  # the mean over its two calls
    assert torch.allclose(mean.float(), (one.mean((0, 2, 3)) + other.mean((0, 2, 3))).detach() / 2, atol=1e-5)
    assert torch.allclose(variance.float(), sum(y.var((0, 2, 3), unbiased=False) for y in (one, other)).detach() / 2,
                          atol=1e-5)
    with pytest.raises(CompressError, match="no batch norm runs in Linear"):
        statistics_on(nn.Linear(2, 2), torch.ones(2, 2))


@pytest.mark.parametrize("more", [0, 40])
def test_a_correction_that_takes_bytes_leaves_a_file_that_fits(tiny, more):
    """`trimmed` goes on until the corrected file fits, too."""
    whole = coded(tiny.model())
    limit = int(0.97 * file_bytes(whole))
    added = {"note": torch.arange(more, dtype=torch.float32).sin()} if more else {}
    grown = []

    def correct(less):
        grown.append(less)
        return replace(less, rest={**less.rest, **added})

    found, size, share = trimmed(whole, limit, 0.5, correct=correct)
    assert size == file_bytes(found) <= limit and 0 < share < 0.5 and len(grown) == (2 if more else 1)
    assert size >= 0.95 * limit
    found, size, share = trimmed(whole, file_bytes(whole) // 20, 0.1, correct=correct)
    assert share == 0.1 and size > file_bytes(whole) // 20
