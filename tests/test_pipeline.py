"""The pipeline: every part in it, any order of stages, and what is refused."""

import itertools
from dataclasses import replace

import pytest
import torch

from benchmarks.settings import build
from methods import data_of, pipeline
from methods.core.budget import Budget
from methods.core.errors import BudgetError, CompressError
from methods.core.file.storage import from_bytes, to_bytes
from methods.core.fit.criteria import CRITERIA
from methods.core.fit.quantize import fit_symmetric
from methods.core.fit.size import compress_to_size
from methods.core.graph.build import apply, float_bytes
from methods.core.graph.coupled import Group
from methods.core.graph.fold import norm_ratio, norms_after
from methods.core.graph.shrink import shrink
from methods.core.graph.weights import weight_layers
from methods.core.train.finetune import train
from methods.core.train.hooks import Hooks
from methods.core.train.recipe import Distill, Recipe

SHORT = {"epochs": 1, "lr": 0.01}
BITS = {"rtn": 4, "qat": 4, "lsq": 4, "lsq+": 4, "dorefa": 3, "bnn": 1}


def made(tiny, config, model=None, task=None, **budget):
    model = tiny.model() if model is None else model
    task = tiny.task() if task is None else task
    return pipeline.compress(model, task, Budget(**budget), build(pipeline.Config, config),
                             torch.Generator().manual_seed(0))


def kept(compressed):
    return {name: tensor.kept for name, tensor in compressed.weights.items()}


def wanted(tiny, density):
    return {name: -int(-layer.weight.numel() * density // 1) for name, layer in weight_layers(tiny.net()).items()}


# --- parts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["one_shot", "linear", "agp", "geometric", "lottery"])
@pytest.mark.parametrize("criterion", [name for name, one in CRITERIA.items() if "weight" in one.granularities])
def test_criteria_of_weights_on_every_schedule_keep_the_exact_number(criterion, schedule, tiny):
    settings = {} if schedule == "one_shot" else {"updates": 2, "recipe": {**SHORT, "epochs": 2}}
    out = made(tiny, {"prune": {"criterion": criterion, "schedule": schedule, **settings}, "activations": "float"},
               density=0.25, bits=8)
    assert all(count <= most for count, most in zip(kept(out).values(), wanted(tiny, 0.25).values(), strict=True))
    assert sum(kept(out).values()) > 0.9 * sum(wanted(tiny, 0.25).values())  # some codes of what is kept are 0


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("criterion", [name for name, one in CRITERIA.items() if "channel" in one.granularities])
def test_channels_that_share_are_pruned_together_and_shrink_cuts_them_out(criterion, scope, tiny):
    out = made(tiny, {"prune": {"criterion": criterion, "granularity": "channel", "scope": scope},
                      "activations": "float"}, channel_density=0.5, bits=8)
    network = apply(out, tiny.net())
    alive = {name: (network.get_submodule(name).weight != 0).flatten(1).any(1) for name in ("conv1", "conv2", "conv3")}
    assert torch.equal(alive["conv1"], alive["conv2"]) and int(alive["conv1"].sum()) + int(alive["conv3"].sum()) == 10
    small = shrink(out, tiny.net())
    rows = {name: tensor.codes.shape[0] for name, tensor in small.weights.items()}
    assert rows == {"conv1": int(alive["conv1"].sum()), "conv2": int(alive["conv2"].sum()),
                    "conv3": int(alive["conv3"].sum()), "fc": 4}
    inputs = tiny.Batches(24, 5).inputs
    with torch.no_grad():
        assert torch.allclose(apply(small, tiny.net())(inputs), network(inputs), atol=1e-5)
    assert len(to_bytes(small)[0]) < len(to_bytes(out)[0])


@pytest.mark.parametrize("quantizer", BITS)
def test_quantizers_in_the_pipeline(quantizer, tiny):
    recipe = {} if quantizer == "rtn" else {"recipe": SHORT}
    out = made(tiny, {"order": ["quantize"], "quantize": {"quantizer": quantizer, **recipe}}, bits=BITS[quantizer])
    assert len(out.activations) > 0 and to_bytes(from_bytes(to_bytes(out)[0]))[0] == to_bytes(out)[0]
    for tensor in out.weights.values():
        assert len(tensor.codes.unique()) <= 2**tensor.bits and tensor.bits == BITS[quantizer]
    if quantizer == "bnn":
        assert all(set(tensor.decode().unique().tolist()) == {-1.0, 1.0} for tensor in out.weights.values())


def test_float16_keeps_halves_and_no_codes(tiny):
    model = tiny.model()
    out = made(tiny, {"quantize": {"quantizer": "float16"}, "activations": "float"}, model=model, density=0.5)
    assert not out.weights and not out.activations
    for name, layer in weight_layers(model).items():
        stored = out.rest[f"{name}.weight"]
        assert stored.dtype == torch.float16 and int((stored == 0).sum()) >= stored.numel() // 2
        assert torch.equal(stored[stored != 0], layer.weight.detach().half()[stored != 0])
    back = apply(from_bytes(to_bytes(out)[0]), tiny.net())
    assert torch.equal(back.conv1.weight, out.rest["conv1.weight"].float())
    with torch.no_grad():
        model.fc.weight[0, 0] = 1e6
    with pytest.raises(CompressError, match="a weight of fc is 1e.06: float16 ends at 65504"):
        made(tiny, {"quantize": {"quantizer": "float16"}, "activations": "float"}, model=model, density=0.9)


# --- stages ------------------------------------------------------------------------------------------------


class Watch(Hooks):
    """Zeros of conv2, as every step of every training sees them, and the learning rates."""

    seen: list[torch.Tensor] = []
    rates: list[float] = []

    def after_step(self, model, lr):
        Watch.seen.append(model.conv2.weight.detach() == 0)
        Watch.rates.append(lr)


@pytest.fixture
def watched(monkeypatch):
    Watch.seen, Watch.rates = [], []
    for module in (pipeline, pipeline.pruning):
        monkeypatch.setattr(module, "train", lambda *a, hooks, **k: train(
            *a, hooks=[*(hooks if isinstance(hooks, list) else [hooks]), Watch()], **k))
    return Watch


@pytest.mark.parametrize("order", list(itertools.permutations(["prune", "quantize", "distil"])))
def test_six_orders_run_and_no_stage_undoes_another(order, tiny, watched):
    config = {"order": list(order), "prune": {"recipe": SHORT}, "quantize": {"quantizer": "qat", "recipe": SHORT},
              "distil": SHORT, "activations": "float"}
    out = made(tiny, config, density=0.25, bits=3)
    assert all(count <= most for count, most in zip(kept(out).values(), wanted(tiny, 0.25).values(), strict=True))
    steps, start = len(tiny.task().train), 0
    assert len(watched.seen) == 3 * steps
    pruned, zeros = False, None
    for stage in order:
        pruned = pruned or stage == "prune"
        for now in watched.seen[start:start + steps] if pruned else ():
            assert int(now.sum()) >= 0.75 * now.numel() - 1
            zeros = now if zeros is None else zeros
        start += steps
    assert zeros is None or bool((out.weights["conv2"].codes == 0)[zeros].float().mean() > 0.95)


def test_a_grid_that_was_there_before_pruning_stays(tiny):
    """Its scales are those of the dense weights, through pruning, training and folding."""
    model = tiny.model()
    config = {"order": ["quantize", "prune", "distil"], "prune": {"recipe": SHORT}, "distil": SHORT,
              "activations": "float"}
    out = made(tiny, config, model=model, density=0.2, bits=4)
    dense = fit_symmetric(model.fc.weight, 4)
    assert torch.equal(out.weights["fc"].grid.scale, dense.scale)
    later = made(tiny, {**config, "order": ["prune", "distil", "quantize"]}, model=model, density=0.2, bits=4)
    assert not torch.equal(later.weights["fc"].grid.scale, dense.scale)


@pytest.mark.parametrize("quantizer", ["qat", "lsq", "lsq+"])
def test_a_grid_does_not_move_after_its_stage(quantizer, tiny):
    config = {"order": ["quantize", "distil"], "quantize": {"quantizer": quantizer, "recipe": SHORT},
              "activations": "float"}
    before, after = (made(tiny, {**config, "distil": {"epochs": epochs, "lr": 0.1}}, bits=4).weights
                     for epochs in (0, 1))
    grids = [weights["fc"].grid for weights in (before, after)]
    assert torch.equal(grids[0].scale, grids[1].scale) and torch.equal(grids[0].zero, grids[1].zero)
    assert any(not torch.equal(before[name].codes, after[name].codes) for name in before)


def test_a_group_has_the_mean_score_of_its_layers():
    places = torch.arange(2)
    units = pipeline.Units([], {"g": Group(2, {"a": places, "b": places.flip(0)})})
    assert units.gather({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 5.0])})["g"].tolist() == [3.0, 2.5]
    spread = units.spread({"g": torch.tensor([True, False])})
    assert spread["a"].tolist() == [True, False] and spread["b"].tolist() == [False, True]


def test_without_training_it_is_magnitude_pruning_and_rounding(tiny):
    model = tiny.model()
    out = made(tiny, {}, model=model, density=0.3, bits=6)
    for name, norm in norms_after(model).items():
        weight = model.get_submodule(name).weight.detach()
        size = weight.abs().flatten()
        count = wanted(tiny, 0.3)[name]
        masked = weight * (weight.abs() >= size.sort(descending=True).values[count - 1])
        scale = masked.abs().flatten(1).amax(1).clamp_min(1e-7) / 31
        shape = (-1, 1, 1, 1)
        value = torch.round(masked / scale.reshape(shape)) * scale.reshape(shape)
        gain = norm_ratio(model.get_submodule(norm)).float()
        assert torch.allclose(out.weights[name].decode(), value * gain.reshape(shape), atol=1e-5)


def test_data_is_what_the_settings_need():
    cases = [({"activations": "float"}, "none"), ({}, "calibration"), ({"prune": {"recipe": SHORT}}, "train"),
             ({"prune": {"criterion": "taylor"}}, "train"), ({"prune": {"rates": "sensitivity"}}, "held_out"),
             ({"quantize": {"widths": "sensitivity"}}, "held_out"),
             ({"prune": {"criterion": "loss", "granularity": "block", "blocks": 1}}, "held_out"),
             ({"prune": {"criterion": "loss", "granularity": "block", "blocks": 1, "recipe": SHORT}}, "train"),
             ({"order": ["quantize", "distil"], "distil": SHORT}, "train")]
    for config, data in cases:
        assert data_of(pipeline, build(pipeline.Config, config)) == data


def test_no_data_at_all(tiny):
    out = pipeline.compress(tiny.model(), None, Budget(density=0.5, bits=4), pipeline.Config(activations="float"),
                            torch.Generator())
    assert out.weights and not out.activations


# --- schedules in a training -------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "agp"])
def test_masks_within_a_training_follow_the_schedule(schedule, tiny, watched):
    recipe = {"epochs": 4, "lr": 0.01}
    made(tiny, {"prune": {"schedule": schedule, "updates": 5, "until": 0.7, "recipe": recipe}, "activations": "float"},
         density=0.2, bits=8)
    total = 4 * len(tiny.task().train)
    interval, n = int(0.7 * total) // 5, watched.seen[0].numel()
    for step, zeros in enumerate(watched.seen, start=1):
        t = min(step // interval, 5)
        share = 0.8 * (t / 5 if schedule == "linear" else 1 - (1 - t / 5) ** 3)
        assert abs(int(zeros.sum()) - int(share * n + 1e-9)) <= 1, (step, t)


@pytest.mark.parametrize("schedule", ["linear", "agp"])
def test_the_last_masks_are_left_learning_rate_to_heal(schedule, tiny, watched):
    """Unless one asks for less: more than half of what the recipe holds comes after them."""
    made(tiny, {"prune": {"schedule": schedule, "updates": 4, "recipe": {"epochs": 4, "lr": 0.01}},
                "activations": "float"}, density=0.2, bits=8)
    most = max(int(zeros.sum()) for zeros in watched.seen)
    after = [int(zeros.sum()) >= most - 1 for zeros in watched.seen]
    assert sum(rate for rate, late in zip(watched.rates, after, strict=True) if late) > 0.5 * sum(watched.rates)


def test_one_ranking_of_all_layers_empties_none(tiny):
    """Batch norms of conv3 are all a little smaller than the others: by |gamma| alone one channel of it would stay."""
    model = tiny.model()
    with torch.no_grad():
        for norm, gamma in ((model.bn1, 1.0), (model.bn2, 1.0), (model.bn3, 0.9)):
            norm.weight.copy_(gamma + 0.01 * torch.rand(len(norm.weight)))
    for floor, left in ((0.0, 2), (0.2, 2), (0.6, 4), (1.0, 6)):
        out = made(tiny, {"prune": {"criterion": "slim", "granularity": "channel", "scope": "global", "floor": floor},
                          "activations": "float"}, model=model, channel_density=0.5, bits=8)
        assert int((apply(out, tiny.net()).conv3.weight != 0).flatten(1).any(1).sum()) == left


def test_a_weight_pruned_early_may_come_back(tiny, watched):
    made(tiny, {"prune": {"schedule": "agp", "criterion": "movement", "updates": 6, "until": 1.0,
                          "recipe": {"epochs": 3, "lr": 0.1}}, "activations": "float"}, density=0.3, bits=8)
    assert any(bool((before & ~after).any()) for before, after in itertools.pairwise(watched.seen))


@pytest.mark.parametrize("criterion", ["level", "movement"])
def test_rounds_are_nested(criterion, tiny, watched):
    made(tiny, {"prune": {"criterion": criterion, "schedule": "geometric", "updates": 3, "recipe": {
        "epochs": 1, "lr": 0.1}}, "activations": "float"}, density=0.2, bits=8)
    steps, n = len(tiny.task().train), watched.seen[0].numel()
    for before, after in itertools.pairwise(watched.seen):
        assert bool((after | ~before).all())
    for r in range(3):
        assert int(watched.seen[r * steps].sum()) == int((1 - 0.2 ** ((r + 1) / 3)) * n)


@pytest.mark.parametrize("rewind", [0, 3])
def test_the_lottery_winds_survivors_back_to_the_bit(rewind, tiny, monkeypatch):
    """A ticket that is not trained any more is the network at step k, masked; the last training starts from there."""
    starts, states = [], []

    def spy(model, task, recipe, generator, *, hooks, run):
        starts.append({name: value.clone() for name, value in model.state_dict().items()})

        class Keep(Hooks):
            def after_step(self, network, lr):
                states.append({name: value.clone() for name, value in network.state_dict().items()})

        return train(model, task, recipe, generator, hooks=[*hooks, Keep()], run=run)

    monkeypatch.setattr(pipeline.pruning, "train", spy)
    made(tiny, {"prune": {"schedule": "lottery", "updates": 3, "rewind": rewind, "recipe": {"epochs": 1, "lr": 0.05}},
                "activations": "float"}, density=0.2, bits=8)
    assert len(starts) == 4
    back = starts[0] if rewind == 0 else states[rewind - 1]
    masks = []
    for start in starts[1:]:
        for name, value in start.items():
            if name.endswith(".mask"):
                assert name != "conv2.parametrizations.weight.0.mask" or masks.append(value) is None
            else:
                assert torch.equal(value, back[name]), name
    sizes = [int(mask.sum()) for mask in masks]
    n = masks[0].numel()
    assert sizes == [n - int((1 - 0.2 ** (r / 3)) * n) for r in (1, 2, 3)]
    assert all(bool((before | ~after).all()) for before, after in itertools.pairwise(masks))


def test_a_fresh_lottery_starts_from_weights_of_its_own(tiny):
    model = tiny.model()
    fresh, again, given = (made(tiny, {"prune": {"schedule": "lottery", "updates": 1, "fresh": fresh, "recipe": {
        "epochs": 0, "lr": 0.1}}, "activations": "float"}, model=model, density=1.0, bits=8) for fresh in (True, True,
                                                                                                           False))
    assert to_bytes(fresh)[0] == to_bytes(again)[0]
    found, own = fresh.weights["fc"].decode(), given.weights["fc"].decode()
    assert torch.allclose(own, model.fc.weight.detach(), atol=0.05) and not torch.allclose(found, own, atol=0.05)


def test_a_size_can_be_asked_for_of_stages_that_are_distilled(tiny):
    """The cheap runs of the search have no epochs, and so no teacher."""
    config = build(pipeline.Config, {"order": ["prune", "quantize", "distil"], "distil": SHORT})
    config = replace(config, distil=replace(config.distil, distill=Distill(2.0, 0.5)))
    assert config.distil == Recipe(1, 0.01, distill=Distill(2.0, 0.5))
    model = tiny.model()
    out = compress_to_size(pipeline, model, tiny.task(), Budget(size_ratio=0.25, bits=4), config,
                           torch.Generator().manual_seed(0))
    assert len(to_bytes(out)[0]) <= 0.25 * float_bytes(model)


@pytest.mark.parametrize("quantizer, budget", [("bnn", {"bits": 1}), ("float16", {})])
def test_a_size_is_refused_where_no_setting_could_change_it(tiny, quantizer, budget):
    recipe = {} if quantizer == "float16" else {"recipe": SHORT}
    config = build(pipeline.Config, {"order": ["quantize"], "quantize": {"quantizer": quantizer, **recipe}})
    with pytest.raises(BudgetError, match="size_ratio"):
        compress_to_size(pipeline, tiny.model(), tiny.task(), Budget(size_ratio=0.25, **budget), config,
                         torch.Generator())
