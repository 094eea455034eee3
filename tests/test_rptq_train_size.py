"""Rate-aware training and the bytes of its file: what it begins with, what it is steered to, what is weighed."""

import math
import re
from dataclasses import replace

import pytest
import torch

from methods import rptq, rptq_train
from methods.core.budget import Budget
from methods.core.errors import CompressError, ConfigError
from methods.core.file.storage import to_bytes
from methods.core.fit.rates import round_to_rate
from methods.core.graph.build import apply, float_bytes, weight_layers
from methods.core.graph.fold import fold_batchnorm
from methods.core.train.recipe import Recipe
from methods.rptq_train.rated import RateAware, zero_bits
from tests.perceptron import Plain

SHORT = rptq_train.Config(recipe=Recipe(epochs=2, lr=0.01), sensitivity_inputs=16, calibration_inputs=48)
UNTRAINED = Recipe(epochs=0, lr=0.01)


def compress(tiny, ratio, model=None, run=None, **config):
    return rptq_train.compress(tiny.model() if model is None else model, tiny.task(), Budget(size_ratio=ratio),
                               replace(SHORT, **config), torch.Generator().manual_seed(0), run=run)


def without_codes(tiny, model):
    """Bytes of a file whose codes are all 0."""
    inputs = tiny.task().calibration_inputs(16)
    config = rptq.Config(sensitivity_inputs=16)
    return rptq.Quantizer(model, inputs, config, torch.Generator().manual_seed(0)).least_bytes()


@pytest.fixture
def hooked(monkeypatch):
    """The hooks of the trainings, and the bytes that they were told, in order."""
    found = []

    class Watched(RateAware):
        def __init__(self, *given, weigh, **more):
            self.told = []
            super().__init__(*given, weigh=lambda hooks: self.told.append(weigh(hooks)) or self.told[-1], **more)
            found.append(self)

    monkeypatch.setattr(rptq_train, "RateAware", Watched)
    return found


def test_the_training_begins_at_start_times_the_budget(tiny):
    """The whole file: what it takes without codes, and the entropy of the codes, rounded with prices."""
    made = compress(tiny, 0.12, recipe=UNTRAINED, start=1.6)
    bits = 0.0
    for name, layer in weight_layers(fold_batchnorm(tiny.model())[0]).items():
        counts = round_to_rate(layer.weight.detach() / made.notes["steps"][name])[0].tolist()
        bits += sum(n * (math.log2(sum(counts) / n) + (code > 0)) for code, n in enumerate(counts) if n)
    whole = without_codes(tiny, tiny.model()) + bits / 8
    assert whole == pytest.approx(1.6 * 0.12 * float_bytes(tiny.model()), rel=0.02)


def test_the_file_is_steered_to_98_per_cent_so_that_no_code_has_to_go(tiny, hooked):
    made = compress(tiny, 0.2, Plain(), recipe=Recipe(epochs=3, lr=0.01))
    limit, (hooks,) = int(0.2 * float_bytes(Plain())), hooked
    assert hooks.limit == pytest.approx(0.98 * limit)
    assert hooks.goal == pytest.approx(hooks.entropy * 0.98 * limit / hooks.told[-1]) and len(hooks.told) == 2
    assert len(to_bytes(made)[0]) <= limit


@pytest.mark.parametrize("bits", [8, 3])
def test_what_is_weighed_has_the_bytes_of_what_is_stored(tiny, hooked, bits):
    """With ranges, though these are found after the training; real zero points are mostly 0, and take two bytes less. A
    file far below its limit, so that it keeps its codes; prices stay from the last look on."""
    made = compress(tiny, 0.6, c=0.2, activation_bits=bits)
    stored = len(to_bytes(made)[0])
    assert made.activations and abs(hooked[0].told[-1] - stored) <= 3 * len(made.activations)
    assert stored - len(to_bytes(replace(made, activations={}))[0]) > 8 * len(made.activations)


@pytest.mark.parametrize("holding", [0.0, 0.3])
def test_a_training_cut_while_prices_stay_goes_on_with_the_same_prices_and_zeros(holding, tiny):
    """24 steps; prices are set last after step 12 and used for new thresholds at step 24, after the cut at 20; zeros
    stay from step 17."""
    config = {"recipe": Recipe(epochs=6, lr=0.1), "falling": 0.3, "settling": 0.34, "holding": holding}
    counted = tiny.Run()
    whole = compress(tiny, 0.12, run=counted, **config)
    saves = [i for i, (_, what) in enumerate(counted.calls) if what == "save"]
    states = {}
    with pytest.raises(tiny.Interrupted):
        compress(tiny, 0.12, run=tiny.Run(states, saves[4] + 1), **config)
    again = compress(tiny, 0.12, run=tiny.Run(states), **config)
    assert to_bytes(again)[0] == to_bytes(whole)[0] and again.notes["lam"] == whole.notes["lam"]


def test_densities_are_smoothed_by_half_a_weight():
    """4 rows, 8 columns, 5 weights at each place: row 0 full but for column 3, which is empty, row 1 has one weight."""
    kept = torch.zeros(4, 8, 5, dtype=torch.bool)
    kept[0], kept[:, 3], kept[1, 0, 2] = True, False, True
    zero, other = zero_bits(kept)
    for i in range(4):
        for j in range(8):
            row, column, every = int(kept[i].sum()), int(kept[:, j].sum()), int(kept.sum())
            p = (row + 0.5) / 40 * (column + 0.5) / 20 / ((every + 0.5) / 160)
            assert float(other[i, j]) == pytest.approx(-math.log2(min(p, 0.5)), rel=1e-4)
            assert float(zero[i, j]) == pytest.approx(-math.log2(1 - min(p, 0.5)), rel=1e-3, abs=1e-5)


def test_a_layer_may_have_two_names(tiny):
    model = Plain()
    model.alias = model.a
    made = compress(tiny, 0.12, model)
    assert set(made.weights) == {"a", "b"} and len(to_bytes(made)[0]) <= 0.12 * float_bytes(model)
    assert apply(made, model).alias.weight.any()
    with RateAware(model, dict.fromkeys(weight_layers(model), 0.05), 1e4, 10, False) as hooks:
        with torch.no_grad():
            hooks.behind("a").add_(0.01)
        bare = hooks.bare()
        assert bare.alias is bare.a and torch.equal(bare.a.weight, hooks.behind("a"))


def test_a_gain_that_vanished_in_training_is_a_dead_channel(tiny):
    """Too small for the scale of its codes to be a float32 number; its neighbours keep their scales, in 16 bits too."""
    student, inputs = tiny.model(), tiny.task().calibration_inputs(20)
    with RateAware(student, dict.fromkeys(weight_layers(student), 0.02), 1e4, 0, False) as hooks:
        with torch.no_grad():
            student.bn1.weight[2] = 1e-44
        hooks.refresh(steer=False)
        with torch.no_grad():
            outputs = student(inputs)
    for bits, precision in ((32, 1e-5), (16, 0.02)):
        ending = rptq_train.Ending(student, tiny.net(), hooks, replace(SHORT, bias_bits=bits), 1.0)
        made = ending.store(ending.codes())
        with torch.no_grad():
            assert torch.allclose(apply(made, tiny.net())(inputs), outputs,
                                  atol=precision * float(outputs.abs().max()))
        assert int(made.weights["conv1"].mask.flatten(1).any(1).sum()) == 7


def test_an_average_of_the_weights_is_refused():
    """It would be written after the last look at dead codes, whose constants are in the biases."""
    with pytest.raises(ConfigError, match="^recipe.ema = 0.9: allowed is 0: "):
        replace(SHORT, recipe=Recipe(epochs=1, lr=0.01, ema=0.9))


def test_a_start_without_codes_is_refused_by_its_name(tiny):
    with pytest.raises(ConfigError, match=r"^start = 0.1: every code .* allowed are numbers above 0\.\d+$") as caught:
        compress(tiny, 0.2, start=0.1)
    least = float(re.search(r"above (.*)$", str(caught.value))[1])
    assert least > without_codes(tiny, tiny.model()) / (0.2 * float_bytes(tiny.model()))
    made = compress(tiny, 0.2, start=least + 0.01, recipe=UNTRAINED)
    assert made.notes["entropy_bits"] > 0  # of codes, before those that reach no output are left out
    made = compress(tiny, 0.2, start=least + 0.1, recipe=UNTRAINED)
    assert 0 < sum(tensor.kept for tensor in made.weights.values())


def test_a_network_of_zeros_is_refused(tiny):
    model = Plain()
    with torch.no_grad():
        model.a.weight.zero_(), model.b.weight.zero_()
    with pytest.raises(CompressError, match="^no weight of this network that is not 0 changes an output"):
        compress(tiny, 0.2, model)
