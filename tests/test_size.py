"""`size_ratio` for every method: the real file is never over it and uses it, by the rule of core/fit/size.py."""

import types
from dataclasses import dataclass, replace

import pytest
import torch

from benchmarks.jobs import all_tables
from benchmarks.measure import with_ranges
from benchmarks.settings import build
from methods import Budget, Task, compress_to_size, find_method, method_names, pipeline
from methods.core.errors import BudgetError, CompressError
from methods.core.file.storage import encode, to_bytes
from methods.core.fit import size as sizes
from methods.core.fit.prune import global_densities
from methods.core.fit.quantize import fit_symmetric, quantize
from methods.core.fit.size import Knob, any_ranges, untrained
from methods.core.fit.trim import without_smallest
from methods.core.graph.build import assemble, float_bytes
from methods.core.graph.graph import trace
from methods.core.graph.weights import weight_layers
from methods.core.train.finetune import Recipe
from methods.core.train.run import NullRun

KNOBS = [name for name in method_names() if hasattr(find_method(name), "SIZE_KNOB")]
RATIO = {"neuron_merging": 0.6, "udfc": 0.2, "sequential_reconstruction": 0.2, "iterative_sensitivity": 0.16}
BITS_RATIO = 0.3  # where bits are turned; elsewhere 0.13
LOOSE = {"annc", "udfc", "neuron_merging", "sequential_reconstruction",
         "iterative_sensitivity"}  # files of tiny networks jump


def smoke(name):
    method = find_method(name)
    found = next(table.smoke for table in all_tables() if table.method == name and table.smoke)
    knob = method.SIZE_KNOB
    ratio = RATIO.get(name, BITS_RATIO if knob.whole else 0.13)
    budget = {key: value for key, value in found["budget"].items() if key != knob.name}
    return method, Budget(**budget, size_ratio=ratio), build(method.Config, found.get("config", {}))


def task_of(method, tiny):
    return tiny.task().seen_as(method.DATA)


def test_every_method_takes_a_size():
    """By a knob, or by itself."""
    task = Task.from_loader([], [])
    for name in set(method_names()) - set(KNOBS):
        method = find_method(name)
        with pytest.raises(BudgetError, match="it takes: .*size_ratio"):
            method.compress(torch.nn.Linear(2, 2), task, Budget(data_ratio=0.5), method.Config(), torch.Generator())


@pytest.mark.parametrize("name", KNOBS)
def test_the_file_fits_and_the_limit_is_used(name, tiny, tmp_path):
    method, budget, config = smoke(name)
    model, ranges = tiny.model(), tiny.task()

    def finish(found):
        return with_ranges(found, model, ranges)

    def compress(run=None):
        return compress_to_size(method, model, task_of(method, tiny), budget, config, torch.Generator().manual_seed(0),
                                run=run, finish=finish)

    found = compress()
    limit = budget.size_ratio * float_bytes(model)
    size = encode(finish(found), tmp_path / "a.jc").total
    said, knob = found.notes["size"], method.SIZE_KNOB
    assert (tmp_path / "a.jc").stat().st_size == size == said["bytes"] <= limit
    assert said["knob"] == knob.name
    if not knob.whole and name not in LOOSE:
        assert size >= 0.97 * limit and said["whole_runs"] == 1
    states = {}
    total = tiny.Run(states)
    assert to_bytes(compress(total))[0] == to_bytes(found)[0]
    with pytest.raises(tiny.Interrupted):  # cheap sizes survive: the second time begins where the first ended
        compress(tiny.Run(again := {}, len(total.calls) // 2))
    assert to_bytes(compress(tiny.Run(again)))[0] == to_bytes(found)[0]


RTN = {"order": ("quantize",)}
CHANNELS = {"prune": pipeline.Prune("l1", "channel")}
BLOCKS = {"prune": pipeline.Prune("loss", "block", blocks=1)}


@pytest.mark.parametrize("settings, budget, knob", [(CHANNELS, {"bits": 8}, "channel_density"), (RTN, {}, "bits")])
def test_a_pipeline_turns_what_its_settings_have(settings, budget, knob, tiny):
    model = tiny.model()
    config = pipeline.Config(**settings, calibration_inputs=24)
    found = compress_to_size(pipeline, model, tiny.task(), Budget(**budget, size_ratio=0.22), config,
                             torch.Generator().manual_seed(0))
    assert found.notes["size"]["knob"] == knob and len(to_bytes(found)[0]) <= 0.22 * float_bytes(model)


def test_a_pipeline_without_a_knob_says_what_it_takes(tiny):
    config = pipeline.Config(order=("quantize",), quantize=pipeline.Quantize("float16"))
    with pytest.raises(BudgetError, match="size_ratio = 0.2: with these settings pipeline has nothing to turn"):
        compress_to_size(pipeline, tiny.model(), tiny.task(), Budget(size_ratio=0.2), config, torch.Generator())
    assert pipeline.Config(**BLOCKS).size_knob.name == "bits"


@pytest.mark.parametrize("wrong, message", [
    ({"method": "rptq"}, "method = a str: compress_to_size takes the module"), ({"model": None}, "where a network"),
    ({"budget": {"size_ratio": 0.2}}, "budget = a dict of size_ratio: compress_to_size takes a Budget"),
    ({"generator": 0}, "generator = a int: compress_to_size takes a torch.Generator")])
def test_an_argument_of_another_type_is_refused_in_one_line(wrong, message, tiny):
    given = {"method": pipeline, "model": tiny.model(), "task": tiny.task(), "budget": Budget(size_ratio=0.2, bits=8),
             "config": pipeline.Config(), "generator": torch.Generator(), **wrong}
    with pytest.raises(CompressError, match=message) as caught:
        compress_to_size(**given)
    assert "\n" not in str(caught.value)


# --- the rule, on a method whose sizes are known -----------------------------------------------------------


@dataclass(frozen=True)
class Config:
    recipe: Recipe = Recipe(epochs=1, lr=0.1)
    larger: float = 1.0  # a trained file over a cheap one of the same density


class Made:
    """A method that keeps the largest weights at `density`, and counts its calls; trained, `larger` times as many."""

    def __init__(self, knob):
        self.calls = []
        self.module = types.SimpleNamespace(SIZE_KNOB=knob, compress=self.compress)

    def compress(self, model, task, budget, config, generator, *, run=None):
        density = budget.density if budget.density is not None else budget.bits / 16
        trained = config.recipe.epochs > 0
        self.calls.append((trained, density))
        density = min(density * (config.larger if trained else 1.0), 1.0)
        layers = weight_layers(model)
        weights = {}
        for name, layer in layers.items():
            mask = torch.zeros(layer.weight.numel(), dtype=torch.bool)
            mask[layer.weight.detach().abs().flatten().argsort(descending=True)[:int(density * len(mask))]] = True
            weights[name] = quantize(layer.weight, fit_symmetric(layer.weight, 8), 8, mask.reshape(layer.weight.shape))
        return assemble(model, weights)


def sized(made, tiny, config, ratio=0.2, **more):
    model = tiny.model()
    found = compress_to_size(made.module, model, None, Budget(size_ratio=ratio), config,
                             torch.Generator().manual_seed(0), **more)
    return found, len(to_bytes(found)[0]) / (ratio * float_bytes(model))


@pytest.mark.parametrize("larger, whole_runs", [(1.0, 1), (1.04, 1), (1.3, 2), (0.7, 2)])
def test_training_changes_sizes(tiny, larger, whole_runs):
    """A little over: the smallest weights go; more: the knob is corrected and the method run once more."""
    made = Made(Knob("density", 1e-3, 1.0))
    found, used = sized(made, tiny, Config(larger=larger))
    assert 0.97 <= used <= 1 and sum(trained for trained, _ in made.calls) == whole_runs
    density = [density for trained, density in made.calls if trained][-1]
    kept = sum(tensor.kept for tensor in found.weights.values()) / sum(t.mask.numel() for t in found.weights.values())
    assert kept <= density * larger + 1e-9
    trimmed = found.notes["size"]["trimmed"]
    assert kept == pytest.approx((1 - trimmed) * density * larger, rel=0.02) and (trimmed > 0) == (larger == 1.04)


def test_what_trimmed_weights_took_along_is_corrected(tiny):
    """With a task batch norm moves, without one it stays; codes are the same."""
    made, model = Made(Knob("density", 1e-3, 1.0)), tiny.model()
    one, other = (compress_to_size(made.module, model, task, Budget(size_ratio=0.2), Config(larger=1.04),
                                   torch.Generator().manual_seed(0)) for task in (tiny.task(), None))
    assert one.notes["size"]["trimmed"] == other.notes["size"]["trimmed"] > 0
    assert tiny.same({n: t.codes for n, t in one.weights.items()}, {n: t.codes for n, t in other.weights.items()})
    assert tiny.same(other.rest, assemble(model, other.weights).rest)
    assert not torch.equal(one.rest["bn3.running_mean"], other.rest["bn3.running_mean"])


@pytest.mark.parametrize("larger, whole_runs", [(1.04, 2), (1.014, 1)])
def test_without_batch_norm_only_a_little_is_trimmed(larger, whole_runs):
    torch.manual_seed(0)
    made, model = Made(Knob("density", 1e-3, 1.0)), torch.nn.Sequential(torch.nn.Linear(60, 90), torch.nn.ReLU(),
                                                                        torch.nn.Linear(90, 10))
    found = compress_to_size(made.module, model, None, Budget(size_ratio=0.1), Config(larger=larger),
                             torch.Generator().manual_seed(0))
    assert sum(trained for trained, _ in made.calls) == whole_runs
    assert (found.notes["size"]["trimmed"] > 0) == (whole_runs == 1) and to_bytes(found)[1].total <= 0.1 * 4 * 6400


def test_what_is_allowed_is_more_than_what_was_refused(tiny):
    """Training makes the file four times as large whatever the knob is: cheap runs would fit, whole ones never do."""
    class Grown(Made):
        def compress(self, model, task, budget, config, generator, *, run=None):
            found = super().compress(model, task, budget, replace(config, larger=1.0), generator, run=run)
            more = {"grown": torch.randn(1500)} if config.recipe.epochs > 0 else {}
            return replace(found, rest={**found.rest, **more})

    made = Grown(Knob("density", 1e-2, 1.0))
    with pytest.raises(BudgetError, match="allowed are numbers of about") as caught:
        compress_to_size(made.module, tiny.model(), None, Budget(size_ratio=0.3), Config(),
                         torch.Generator().manual_seed(0))
    assert float(str(caught.value).rsplit("about ", 1)[1].split()[0]) > 0.3 and "density" in str(caught.value)


def test_without_training_no_weight_is_trimmed(tiny):
    made = Made(Knob("density", 1e-3, 1.0))

    def finish(found):
        return with_ranges(found, tiny.model(), tiny.task())

    found, _ = sized(made, tiny, Config(Recipe(epochs=0, lr=1.0)), finish=finish)
    assert 0.97 <= len(to_bytes(finish(found))[0]) / (0.2 * float_bytes(tiny.model())) <= 1
    value = found.notes["size"]["value"]
    again = made.compress(tiny.model(), None, Budget(density=value), Config(Recipe(epochs=0, lr=1.0)), None)
    assert tiny.same({n: t.codes for n, t in found.weights.items()}, {n: t.codes for n, t in again.weights.items()})


@pytest.mark.parametrize("finish, small", [(lambda found: without_smallest(found, 0.5), 0.2), (None, 0.2)])
def test_storing_takes_a_share_and_adds_a_number(tiny, finish, small):
    """Looked at once, on a large file: a small one loses its share of the weights, and gains the same ranges."""
    made, config = Made(Knob("density", 1e-3, 1.0)), Config(Recipe(epochs=0, lr=1.0))
    finish = finish if finish is not None else lambda found: with_ranges(found, tiny.model(), tiny.task())
    search = sizes._Search(made.module, made.module.SIZE_KNOB, tiny.model(), None, Budget(size_ratio=0.2), config, 0,
                           NullRun())
    for value in (1.0, small):
        search.cheap_bytes(value)
    search.finish(1.0, finish)
    for value in (1.0, small):
        stored = finish(made.compress(tiny.model(), None, Budget(density=value), config, None))
        assert search.cheap_bytes(value) == pytest.approx(len(to_bytes(stored)[0]), rel=0.25)


def test_densities_of_layers_may_differ(tiny):
    """The knob is the density of all weights; each layer gets its share of one ranking."""
    weights, seen = {name: layer.weight for name, layer in weight_layers(tiny.model()).items()}, []
    made = Made(Knob("density", 1e-3, 1.0))

    def compress(model, task, budget, *given, _f=made.compress, **more):
        seen.append(budget.density)
        return _f(model, task, replace(budget, density=sum(budget.density[n] * w.numel() for n, w in weights.items())
                                       / sum(w.numel() for w in weights.values())), *given, **more)

    made.module.compress = compress
    found, used = sized(made, tiny, Config(Recipe(epochs=0, lr=1.0)),
                        spread=lambda density: global_densities(weights, density))
    assert 0.97 <= used <= 1
    everything = torch.cat([w.abs().flatten() for w in weights.values()])
    edge = everything.sort(descending=True).values[round(found.notes["size"]["value"] * len(everything)) - 1]
    for name, weight in weights.items():
        assert seen[-1][name] == pytest.approx(float((weight.abs() >= edge).float().mean()), abs=0.02)


def test_whole_numbers_take_the_largest_that_fits(tiny):
    config = Config(Recipe(epochs=0, lr=1.0))
    made = Made(Knob("bits", 1, 16, whole=True))
    found, used = sized(made, tiny, config, 0.3)
    bits = int(found.notes["size"]["value"])
    more = made.compress(tiny.model(), None, Budget(bits=bits + 1), config, None)
    assert used <= 1 < len(to_bytes(more)[0]) / (0.3 * float_bytes(tiny.model()))


def test_ends_of_the_range(tiny):
    made = Made(Knob("density", 0.5, 0.6))
    found, used = sized(made, tiny, Config(), ratio=1.0)
    assert found.notes["size"]["value"] == 0.6 and used < 0.97
    with pytest.raises(BudgetError, match=r"size_ratio = 0.05 is 365 bytes; the smallest file that density reaches is "
                                          r"about [\d,]{3,5} bytes: allowed are numbers of about 0\.\d+ or more$"):
        sized(made, tiny, Config(), ratio=0.05)
    with pytest.raises(BudgetError, match="size_ratio chooses density: give one of the two"):
        compress_to_size(made.module, tiny.model(), None, Budget(size_ratio=0.3, density=0.1), Config(),
                         torch.Generator())
    assert not any(trained for trained, density in made.calls if density < 0.5)


def test_ranges_that_stand_in_for_real_ones_take_their_bytes(tiny):
    """The same edges, scales of 4 bytes each in the file, and no two alike, whatever the width."""
    model = tiny.model()
    made, real = assemble(model, {}), with_ranges(assemble(model, {}), model, tiny.task()).activations
    for bits in (8, 1):
        found = any_ranges(trace(model), bits)
        assert list(found) == list(real) and len({one.scale for one in found.values()}) == len(real) > 3
        assert all(one.bits == bits and one.scale == float(torch.tensor(one.scale)) for one in found.values())
    more = [len(to_bytes(replace(made, activations=ranges))[0]) for ranges in (any_ranges(trace(model), 8), real)]
    assert abs(more[0] - more[1]) <= 3 * len(real) < 8 * len(real) < more[1] - len(to_bytes(made)[0])


def test_untrained():
    @dataclass(frozen=True)
    class Outer:
        a: Recipe = Recipe(epochs=3, lr=0.1)
        b: Config = Config()
        c: Recipe | None = None
        d: int = 7

    found = untrained(Outer())
    assert (found.a.epochs, found.b.recipe.epochs, found.c, found.d) == (0, 0, None, 7) and found.a.lr == 0.1
