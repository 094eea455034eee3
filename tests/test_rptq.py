"""RPTQ: steps, the search for a size and for an agreement, the file against the entropy, other networks."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from methods import rptq
from methods.core.artifact import Affine, CompressedModel, CompressedTensor
from methods.core.budget import Budget
from methods.core.errors import BudgetError, CompressError, ConfigError
from methods.core.file.storage import to_bytes
from methods.core.fit.rates import entropy_bits
from methods.core.fit.sensitivity import sensitivities
from methods.core.graph.build import apply
from methods.core.train.task import Task
from methods.rptq.search import Bracket, Trial, search_size

SHORT = rptq.Config(sensitivity_inputs=16, calibration_inputs=48, check_inputs=48, points=20.0)


def dense_bytes(model):
    return 4 * sum(value.numel() for value in model.state_dict().values() if value.is_floating_point())


def calibration_only(tiny):
    task = tiny.task()
    return replace(task, train=None, calibration=task.train)


def compress(tiny, budget=None, model=None, seed=0, **config):
    return rptq.compress(tiny.model() if model is None else model, calibration_only(tiny),
                         Budget() if budget is None else budget, replace(SHORT, **config),
                         torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rounding", ["nearest", "gptq", "descent"])
@pytest.mark.parametrize("ratio", [0.13, 0.2, 0.28])
def test_the_file_uses_the_budget_and_never_more(tiny, ratio, rounding):
    made = compress(tiny, Budget(size_ratio=ratio), rounding=rounding)
    limit = ratio * dense_bytes(tiny.net())
    assert 0.97 * limit <= len(to_bytes(made)[0]) <= limit
    assert all(tensor.grid.scale.ndim == 0 for tensor in made.weights.values())


def test_more_bytes_are_a_better_network(tiny):
    inputs = tiny.Batches(60, 7).inputs
    with torch.no_grad():
        wanted = tiny.model()(inputs)
        errors = [float((apply(compress(tiny, Budget(size_ratio=r)), tiny.net())(inputs) - wanted).square().mean())
                  for r in (0.13, 0.2, 0.3)]
    assert errors[0] > errors[1] > errors[2]


def test_a_budget_beyond_the_finest_codes_gives_those(tiny):
    made = compress(tiny, Budget(size_ratio=1.0))
    assert len(to_bytes(made)[0]) < dense_bytes(tiny.net())
    assert max(tensor.bits for tensor in made.weights.values()) == 16


def test_a_budget_that_no_code_fits_is_refused_at_once(tiny):
    class Never:
        weights: dict = {}
        coarsest, finest = 1.0, 0.1

        def least_bytes(self):
            return 100

    with pytest.raises(BudgetError, match=r"size_ratio = 0.05 allows 50 bytes.*takes 100: .* of 0\.101 or more$"):
        search_size(Never(), 0.05, 1000, None)
    with pytest.raises(BudgetError, match=r"size_ratio = 1 .* takes 100: no size_ratio allows as many$"):
        search_size(Never(), 1.0, 100, None)
    with pytest.raises(BudgetError, match=r"size_ratio = 0.01 .*allowed are numbers of 0\.\d+ or more$"):
        compress(tiny, Budget(size_ratio=0.01))


@pytest.mark.parametrize("rounding", ["nearest", "gptq", "descent"])
def test_at_the_coarsest_step_nothing_is_left(rounding):
    """Correlated inputs: the errors that GPTQ hands on add up beyond the largest weight. So any file that is larger
    than that of zeros can be met."""
    torch.manual_seed(0)
    network, inputs = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)), torch.rand(64, 64)
    config = replace(SHORT, rounding=rounding)
    quantizer = rptq.Quantizer(network, inputs, config, torch.Generator().manual_seed(0))
    coarsest = quantizer.trial(quantizer.coarsest)
    assert not any(bool(tensor.codes.any()) for tensor in coarsest.compressed.weights.values())
    dense, least = dense_bytes(network), quantizer.least_bytes()
    for limit in (least + 12, least + 60):
        made = rptq.compress(network, Task.from_inputs(inputs), Budget(size_ratio=(limit + 0.5) / dense), config,
                             torch.Generator().manual_seed(0))
        assert len(to_bytes(made)[0]) <= limit


def test_frozen_weights_are_felt_and_stay_frozen(tiny):
    model = tiny.model().requires_grad_(False)
    made = compress(tiny, Budget(size_ratio=0.2), model=model)
    assert to_bytes(made)[0] == to_bytes(compress(tiny, Budget(size_ratio=0.2)))[0]
    sensitivities(model, tiny.Batches(8, 1).inputs, torch.Generator().manual_seed(0))
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_without_a_budget_outputs_have_to_be_classes():
    inputs = torch.rand(40, 16)
    for last in (nn.Linear(8, 1), nn.Sequential(nn.Linear(8, 3), nn.Flatten(0))):
        network = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), last)
        task = replace(Task.from_inputs(inputs), held_out=Task.from_inputs(inputs).calibration)
        with pytest.raises(ConfigError, match=r"outputs of shape \[.*\] have none: allowed is a budget size_ratio"):
            rptq.compress(network, task, Budget(), SHORT, torch.Generator().manual_seed(0))


def test_several_outputs_are_refused_in_one_line():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(16, 4)

        def forward(self, x):
            return self.fc(x), x

    with pytest.raises(CompressError, match="puts out a tuple: needed is one tensor"):
        rptq.compress(Two(), Task.from_inputs(torch.rand(40, 16)), Budget(size_ratio=0.5), SHORT, torch.Generator())


def test_the_search_survives_bytes_that_jump():
    class Steps:
        weights = {"a": torch.randn(1000, generator=torch.Generator().manual_seed(0))}
        coarsest, finest, seen = 100.0, 1e-4, 0

        def steps(self, c):
            return {"a": c}

        def least_bytes(self):
            return 20

        def trial(self, c):
            self.seen += 1
            return Trial(c, None, 50 * math.ceil(20 / c**0.4))

    class Quiet:
        def report(self, *args, **kwargs):
            pass

    for limit in (260, 400, 999, 5000):
        steps = Steps()
        found = search_size(steps, limit / 4000 + 1e-9, 4000, Quiet())
        assert min(0.97 * limit, limit - 49) <= found.bytes <= limit and steps.seen <= 16


def test_a_small_file_of_finer_codes_is_no_end_of_the_bracket():
    """Bytes are not monotone: c = 1 fits and c = 2 does not, so that what is looked for lies above 2, and c = 1 would
    be the wrong end of the bracket."""
    def size(c):
        return 90 if c < 2 else int(240 / c)

    class Steps:
        coarsest, finest = 100.0, 1e-4

    seen = Bracket(Steps(), -1.0, 100)
    for c in (1.0, 2.0):
        seen.add(Trial(c, None, size(c)))
    assert seen.best.c == 1 and seen.above.c == 2 and seen.below is None and not seen.done()
    for _ in range(8):
        if not seen.done():
            assert seen.next() > 2
            seen.add(Trial(seen.next(), None, size(seen.next())))
    assert 97 <= seen.best.bytes <= 100


def test_a_layer_of_zeros_is_not_the_finest(tiny):
    """Its peak is 0, and a budget for the finest codes of the others is met in a few passes."""
    model, other = tiny.model(), tiny.model()
    with torch.no_grad():
        model.conv2.weight.zero_()
        other.conv2.weight.mul_(1e-3)
    inputs = calibration_only(tiny).calibration_inputs(16)
    zeros, small = (rptq.Quantizer(one, inputs, SHORT, torch.Generator().manual_seed(0)) for one in (model, other))
    others = [name for name in zeros.weights if name != "conv2"]
    peaks = {name: float(zeros.weights[name].abs().max()) for name in others}
    assert zeros.finest == pytest.approx(min(peaks[name] / zeros.units[name] for name in others) / 32767)
    assert small.finest < zeros.finest
    run = tiny.Run()
    made = rptq.compress(model, calibration_only(tiny), Budget(size_ratio=1.0), SHORT,
                         torch.Generator().manual_seed(0), run=run)
    assert len(run.calls) <= 3 and made.weights["conv2"].kept == 0
    assert max(tensor.bits for tensor in made.weights.values()) == 16


def test_agreement_decides_where_there_is_no_budget(tiny):
    fine, coarse = compress(tiny, points=5.0), compress(tiny, points=30.0)
    assert len(to_bytes(coarse)[0]) < len(to_bytes(fine)[0])
    inputs = calibration_only(tiny).held_out.inputs
    with torch.no_grad():
        wanted = tiny.model().eval()(inputs).argmax(1)
        for made, points in ((fine, 5), (coarse, 30)):
            changed = 100 * float((apply(made, tiny.net())(inputs).argmax(1) != wanted).float().mean())
            assert changed <= points


def test_no_label_is_read(tiny):
    class NoLabels(tiny.Batches):
        def epoch(self, generator):
            for inputs, _ in super().epoch(generator):
                yield inputs, torch.full((len(inputs),), -1)

    task = replace(calibration_only(tiny), calibration=NoLabels(96, 1), held_out=NoLabels(48, 2))
    made = rptq.compress(tiny.model(), task, Budget(), SHORT, torch.Generator().manual_seed(0))
    assert to_bytes(made)[0] == to_bytes(compress(tiny))[0]


def test_the_step_follows_the_sensitivity(tiny):
    made = compress(tiny, Budget(size_ratio=0.2))
    quantizer = rptq.Quantizer(tiny.model(), calibration_only(tiny).calibration_inputs(48), SHORT,
                               torch.Generator().manual_seed(0))
    c = made.notes["c"]
    for name, tensor in made.weights.items():
        assert float(tensor.grid.scale) == pytest.approx(c * quantizer.units[name])
    steps = quantizer.steps(1e9)
    assert all(0.5 * steps[name] > float(w.abs().max()) for name, w in quantizer.weights.items())


def test_a_file_is_its_entropy():
    codes = (1.2 * torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0))).round().int()
    tensor = CompressedTensor.of(codes, Affine(torch.tensor(0.1), torch.tensor(0, dtype=torch.int32)), 5)
    bits = entropy_bits(torch.unique(codes, return_counts=True)[1])
    assert len(to_bytes(CompressedModel({"a": tensor}, {}))[0]) == pytest.approx(bits / 8, rel=0.01)


def test_biases_take_sixteen_bits_where_they_can(tiny):
    budget = Budget(size_ratio=0.3)
    assert compress(tiny, budget).rest["fc.bias"].dtype == torch.float16
    assert compress(tiny, budget, bias_bits=32).rest["fc.bias"].dtype == torch.float32
    model = tiny.model()
    with torch.no_grad():
        model.fc.bias[0] = 1e6
    assert compress(tiny, budget, model=model).rest["fc.bias"].dtype == torch.float32


class Grouped(nn.Module):
    """A depthwise convolution, a linear layer without bias, and a layer that the outputs do not depend on."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, groups=3, padding=1), nn.Conv2d(6, 6, 3, groups=6)
        self.pool, self.flat, self.c = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4, bias=False)
        self.relu = nn.ReLU()
        with torch.no_grad():
            self.b.weight.zero_()

    def forward(self, x):
        return self.c(self.flat(self.pool(self.relu(self.b(self.a(x))))))


def test_groups_missing_biases_and_layers_without_effect(tiny):
    made = compress(tiny, model=Grouped(), points=60.0)
    assert set(made.weights) == {"a", "b", "c"} and made.weights["a"].kept == 0  # behind weights of 0


def test_mistakes(tiny):
    for config, message in (({"points": 0.0}, "between 0 and 100"), ({"lam": -1.0}, "0 or more"),
                            ({"lam": 0.05}, "lam = 0.05 does nothing"),
                            ({"bias_bits": 8}, "16, 32"), ({"rounding": "up"}, "nearest, gptq, descent"),
                            ({"calibration_inputs": 0}, "at least 1")):
        with pytest.raises(ConfigError, match=message):
            replace(SHORT, **config)
    with pytest.raises(BudgetError, match="it takes: size_ratio"):
        compress(tiny, Budget(bits=4))
    with pytest.raises(CompressError, match="no Conv2d"):
        compress(tiny, model=nn.Sequential(nn.ReLU()))


class Mixed(nn.Module):
    """A one-dimensional convolution and an attention beside a linear layer: weights that the graph does not show."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv1d(24, 8, 3), nn.MultiheadAttention(6, 2, batch_first=True)
        self.flat, self.c = nn.Flatten(), nn.Linear(48, 4)

    def forward(self, x):
        x = self.a(x.reshape(x.shape[0], 24, 8))
        return self.c(self.flat(self.b(x, x, x, need_weights=False)[0]))


def test_every_kind_of_weight_gets_codes(tiny):
    made = compress(tiny, model=Mixed(), points=30.0)
    assert set(made.weights) == {"a", "b.in_proj_weight", "b.out_proj", "c"}
    assert all(tensor.grid.scale.ndim == 0 for tensor in made.weights.values())
