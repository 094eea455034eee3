"""Distillation: closed forms of the losses, a teacher that stays as it is, and every kind of link."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.settings import build, count_knobs
from methods import bayesian_bits, find_method
from methods.core.budget import Budget
from methods.core.errors import ConfigError
from methods.core.file.storage import to_bytes
from methods.core.train import finetune
from methods.core.train.distill import Distillation, flow, link_loss, make_translator, soft_loss
from methods.core.train.finetune import Hooks, Recipe, train
from methods.core.train.recipe import Distill, Link
from methods.core.train.start import ready
from methods.core.train.task import Task

DC = find_method("deep_compression")


def logits(n=6, classes=5, seed=0):
    return torch.randn(n, classes, generator=torch.Generator().manual_seed(seed))


# --- the soft loss -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_the_gradient_is_t_times_the_difference_of_probabilities(temperature):
    found, wanted = logits(seed=1).requires_grad_(), logits(seed=2)
    loss = soft_loss(found, wanted, temperature)
    p_s, p_t = ((x.double() / temperature).softmax(1) for x in (found.detach(), wanted))
    assert float(loss.detach()) == pytest.approx(
        temperature**2 * float((p_t * (p_t / p_s).log()).sum(1).mean()), rel=1e-3)
    (gradient,) = torch.autograd.grad(loss, found)
    assert torch.allclose(gradient, (temperature * (p_s - p_t) / len(found)).float(), rtol=1e-3, atol=1e-6)


def test_hot_distillation_is_matching_of_centred_logits():
    found, wanted = logits(seed=1).requires_grad_(), logits(seed=2)
    (gradient,) = torch.autograd.grad(soft_loss(found, wanted, 1000.0), found)
    centred = (found - found.mean(1, keepdim=True) - wanted + wanted.mean(1, keepdim=True)).detach()
    assert torch.allclose(gradient, centred / 5 / len(found), atol=1e-3)


def test_equal_outputs_cost_nothing_and_a_constant_changes_nothing():
    found, wanted = logits(seed=1).requires_grad_(), logits(seed=2)
    assert float(soft_loss(found, found.detach(), 4.0).detach()) == pytest.approx(0.0, abs=1e-6)
    (gradient,) = torch.autograd.grad(soft_loss(found, found.detach(), 4.0), found)
    assert float(gradient.abs().max()) < 1e-6
    plain, moved = (float(soft_loss(found.detach(), w, 4.0)) for w in (wanted, wanted + 7))
    assert plain == pytest.approx(moved, rel=1e-4) and plain > 0
    maps = torch.randn(2, 5, 3, 4)
    pixels = maps.permute(0, 2, 3, 1).reshape(-1, 5)
    assert float(soft_loss(maps, 2 * maps, 2.0)) == pytest.approx(float(soft_loss(pixels, 2 * pixels, 2.0)), rel=1e-5)


# --- links -------------------------------------------------------------------------------------------------


def test_flow_is_the_gram_matrix_over_pixels():
    a, b = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)
    wanted = torch.stack([torch.tensor([[float((a[n, i] * b[n, j]).sum()) / 16 for j in range(5)] for i in range(3)])
                          for n in range(2)])
    assert torch.allclose(flow(a, b), wanted, atol=1e-5)
    order = torch.randperm(16)
    shuffled = [x.flatten(2)[:, :, order].reshape(x.shape) for x in (a, b)]
    assert torch.allclose(flow(*shuffled), wanted, atol=1e-5)
    assert torch.linalg.eigvalsh(flow(a, a).double()).min() > -1e-6
    pooled = F.adaptive_avg_pool2d(a, (2, 2))
    assert torch.allclose(flow(a, b[:, :, :2, :2]), flow(pooled, b[:, :, :2, :2]), atol=1e-6)


def test_the_least_of_several_layers():
    found, near, far = torch.zeros(2, 3), torch.full((2, 3), 0.5), torch.full((2, 3), 2.0)
    link = Link("a", ("x", "y"), "dynamic")
    assert float(link_loss(link, [found], [far, near], nn.Identity())) == 0.25
    assert float(link_loss(link, [found], [far], nn.Identity())) == 4.0


def test_a_kl_link_is_at_temperature_two():
    found, wanted = torch.randn(2, 4, 6), torch.randn(2, 4, 6)
    p, q = (wanted / 2).softmax(-1), (found / 2).softmax(-1)
    loss = link_loss(Link("a", kind="kl"), [found], [wanted], nn.Identity())
    assert float(loss) == pytest.approx(4 * float((p * (p / q).log()).sum()) / 2, rel=1e-4)


def test_a_hint_costs_nothing_where_the_teacher_is_a_linear_image():
    for shape, kind in (((4, 3, 5, 5), nn.Conv2d), ((4, 3, 5), nn.Conv1d), ((4, 3), nn.Linear)):
        found = torch.randn(shape)
        translator = make_translator(Link("a", kind="fitnet"), [found], [torch.randn(4, 7, *shape[2:])])
        assert type(translator) is kind
        with torch.no_grad():
            wanted = translator(found)
            assert float(link_loss(Link("a", kind="fitnet"), [found], [wanted], translator)) == 0.0
            assert float(link_loss(Link("a", kind="fitnet"), [found], [wanted + 1], translator)) == pytest.approx(0.5)


def test_a_map_is_trained_only_where_widths_differ():
    link = Link("a", kind="adaptive1d")
    assert not list(make_translator(link, [torch.zeros(2, 4, 8)], [torch.zeros(2, 4, 8)]).parameters())
    translator = make_translator(link, [torch.zeros(2, 4, 8)], [torch.zeros(2, 4, 6)])
    assert translator.weight.shape == (6, 8)


UNLIKE = [("mse", (2, 3, 4, 4), (2, 5, 4, 4)), ("kl", (2, 3), (2, 5)), ("dynamic", (2, 3), (2, 5)),
          ("fitnet", (2, 3, 4, 4), (2, 5, 2, 2)), ("fitnet", (2, 3), (2, 3, 4, 4)),
          ("adaptive1d", (2, 3, 4), (2, 5, 4)), ("fsp", (2, 3, 4, 4), (2, 5, 4, 4)), ("fsp", (2, 3), (2, 3))]


@pytest.mark.parametrize("kind, mine, theirs", UNLIKE)
def test_layers_of_different_shapes_are_refused_in_one_line(kind, mine, theirs):
    n = 2 if kind == "fsp" else 1
    link = Link(("a",) * n, ("b",) * n, kind)
    with pytest.raises(ConfigError, match=f"a {kind} link of a.* to b.*cannot be compared") as caught:
        make_translator(link, [torch.zeros(mine)] * n, [torch.zeros(theirs)] * n)
    assert "\n" not in str(caught.value)


BAD = [lambda: Link("a", kind="cosine"), lambda: Link("a", weight=0.0), lambda: Link("a", kind="fsp"),
       lambda: Link(("a", "b")), lambda: Link("a", ("b", "c")), lambda: Link("a", distance="l1"),
       lambda: Distill(temperature=0.0), lambda: Distill(alpha=1.5), lambda: Distill(soft="l1")]


@pytest.mark.parametrize("make", BAD)
def test_settings_that_make_no_sense_are_refused(make):
    with pytest.raises(ConfigError, match="allowed are|not a link"):
        make()


# --- training ----------------------------------------------------------------------------------------------

LINKED = Distill(2.0, 0.5, links=(
    Link("bn1"), Link("relu2", "relu1", "dynamic"), Link("bn3", "bn3", "fitnet"),
    Link(("bn1", "bn2"), kind="fsp"), Link("fc", kind="adaptive1d", weight=0.1)))


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_the_teacher_is_unchanged_to_the_bit_and_untouched(tiny):
    teacher, model = tiny.model().train(), tiny.model()
    before = tiny.fingerprint(teacher)
    train(model, tiny.task(teacher=teacher), Recipe(2, 0.05, distill=LINKED), torch.Generator())
    assert tiny.same(tiny.fingerprint(teacher), before) and not teacher.conv1._forward_hooks
    assert not any(module._forward_hooks for module in model.modules())  # nor does a tap stay in the student


class Unasked(nn.Module):
    def forward(self, x):
        pytest.fail("the teacher is not in the loss")


def test_alpha_one_without_links_is_the_plain_training(tiny):
    found = []
    for distill in (None, Distill(alpha=1.0)):
        model = tiny.model()
        train(model, tiny.task(teacher=Unasked()), Recipe(1, 0.01, label_smoothing=0.1, distill=distill),
              torch.Generator().manual_seed(0))
        found.append(snapshot(model))
    assert tiny.same(*found)


def test_a_student_that_is_its_teacher_has_no_soft_gradient(tiny):
    model = tiny.model().eval()
    task = tiny.task(teacher=model)
    lesson = Distillation(model, task, Distill(4.0, 0.0, links=(Link("bn2"), Link(("bn1", "bn2"), kind="fsp"))))
    inputs = tiny.Batches(24, 3).inputs
    with lesson.watching(model):
        loss = lesson.objective(lambda *_: pytest.fail("alpha is 0"))(model(inputs), None, inputs)
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-6)
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    assert max(float(g.abs().max()) for g in gradients if g is not None) < 1e-5


def test_the_loss_is_the_sum_of_its_parts(tiny):
    model, teacher = tiny.model().eval(), tiny.net().eval()
    distill = Distill(3.0, 0.25, links=(Link("bn1", weight=2.0), Link("fc", kind="kl", weight=0.5)))
    lesson = Distillation(model, tiny.task(teacher=teacher), distill)
    data = tiny.Batches(24, 3)
    seen = {}
    handles = [net.get_submodule(name).register_forward_hook(lambda m, i, o, key=(who, name): seen.update({key: o}))
               for who, net in (("s", model), ("t", teacher)) for name in ("bn1", "fc")]
    with torch.no_grad(), lesson.watching(model):
        outputs, wanted = model(data.inputs), teacher(data.inputs)
        loss = lesson.objective(finetune.smoothed(Task(None, []).loss, 0.1))(outputs, data.targets, data.inputs)
    for handle in handles:
        handle.remove()
    kl = F.kl_div((outputs / 3).log_softmax(1), (wanted / 3).softmax(1), reduction="batchmean")
    fc = F.kl_div((outputs / 2).log_softmax(1), (wanted / 2).softmax(1), reduction="batchmean")
    parts = (0.25 * F.cross_entropy(outputs, data.targets, label_smoothing=0.1), 0.75 * 9 * kl,
             2.0 * (seen["s", "bn1"] - seen["t", "bn1"]).square().mean(), 0.5 * 4 * fc)
    assert float(loss) == pytest.approx(float(sum(parts)), rel=1e-5)


def test_distillation_pulls_the_student_to_the_teacher(tiny):
    def apart(distill):
        model, teacher = tiny.net(), tiny.model()
        train(model, tiny.task(teacher=teacher), Recipe(3, 0.01, "adam", distill=distill), torch.Generator())
        inputs = tiny.Batches(96, 1).inputs
        with torch.no_grad():
            return float((model(inputs).softmax(1) - teacher(inputs).softmax(1)).abs().mean())

    assert apart(Distill(2.0, 0.0)) < 0.7 * apart(None)


def test_an_interrupted_distillation_resumes_to_the_same_bytes(tiny):
    class Stop(Hooks):
        def __init__(self, at):
            self.at = at

        def after_epoch(self, model, epoch):
            if epoch == self.at:
                raise KeyboardInterrupt

    recipe, teacher = Recipe(3, 0.02, distill=LINKED), tiny.model()

    def outcome(run, stop=None):
        model = tiny.net()
        history = train(model, tiny.task(teacher=teacher), recipe, torch.Generator().manual_seed(3), hooks=Stop(stop),
                        run=run)
        return {"model": model.state_dict(), "history": history}

    torch.manual_seed(0)
    whole, states = outcome(tiny.Run()), {}
    torch.manual_seed(0)
    with pytest.raises(KeyboardInterrupt):
        outcome(tiny.Run(states), 1)
    saved = tiny.Run(states).load()
    assert len(saved["hooks"]) == 2 and set(saved["model"]) == set(tiny.net().state_dict())  # no teacher in it
    assert math.isfinite(sum(float(value.sum()) for value in saved["hooks"][1].values()))
    torch.manual_seed(0)
    assert tiny.same(outcome(tiny.Run(states)), whole)


def test_translators_are_trained_and_do_not_depend_on_the_global_seed(tiny):
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states = {}
        train(tiny.model(), tiny.task(teacher=tiny.model()), Recipe(1, 0.1, distill=LINKED),
              torch.Generator().manual_seed(0), run=tiny.Run(states))
        found.append(tiny.Run(states).load()["hooks"][0])
    assert tiny.same(*found)
    start = Distillation(tiny.model(), tiny.task(teacher=tiny.model()), LINKED).state()
    assert start.keys() == found[0].keys() and not any(torch.equal(start[key], found[0][key]) for key in start)


# --- methods -----------------------------------------------------------------------------------------------


def compress(tiny, distill, task=None):
    config = DC.Config(rounds=1, retrain=Recipe(1, 0.01, distill=distill), tune=Recipe(0, 1e-3))
    return DC.compress(tiny.model(), tiny.task() if task is None else task, Budget(density=0.3, bits=4), config,
                       torch.Generator().manual_seed(0))


def test_the_teacher_is_the_given_network_or_the_task_s(tiny):
    plain, own, given = compress(tiny, None), compress(tiny, Distill()), compress(tiny, Distill(), tiny.task(
        teacher=tiny.model()))
    assert to_bytes(own)[0] == to_bytes(given)[0] != to_bytes(plain)[0]
    other = compress(tiny, Distill(), tiny.task(teacher=tiny.net()))
    assert to_bytes(other)[0] != to_bytes(own)[0]
    with pytest.raises(ConfigError, match="needs a teacher"):
        train(tiny.model(), tiny.task(), Recipe(1, 0.1, distill=Distill()), torch.Generator())


def test_what_cannot_be_distilled_is_said_before_any_training(tiny, monkeypatch):
    monkeypatch.setattr(DC, "train", lambda *_, **__: pytest.fail("it trained"))
    for distill, said in ((Distill(links=(Link("nowhere"),)), "names the layer 'nowhere'; the network has: conv1"),
                          (Distill(links=(Link("conv1", "conv3"),)), "cannot be compared")):
        with pytest.raises(ConfigError, match=said):
            compress(tiny, distill)
    x = torch.randn(8, 4)
    task = Task.from_loader([(x, x[:, :1])], [], loss=F.mse_loss)
    recipe = Recipe(1, 0.1, distill=Distill())
    with pytest.raises(ConfigError, match=r"needs outputs \[N, classes, ...\]; soft = \"mse\" takes others"):
        ready(nn.Linear(4, 1), task, recipe)
    regressor = Recipe(1, 0.1, distill=Distill(soft="mse"))
    assert ready(nn.Linear(4, 1), task, regressor).teacher is not None
    train(nn.Linear(4, 1), ready(nn.Linear(4, 1), task, regressor), regressor, torch.Generator())


def test_links_read_what_a_quantized_student_puts_out(tiny):
    """Bayesian Bits runs the layers itself: its taps give quantized values, in training and before it."""
    model = tiny.model()
    points, wiring = bayesian_bits.survey(model, tiny.Batches(24, 1).inputs, bits=(4, 4))
    network = bayesian_bits.GatedNetwork(copy.deepcopy(model), points, wiring)
    lesson = Distillation(network, tiny.task(teacher=model), Distill(links=(Link("relu1"), Link("bn2"))))
    inputs = tiny.Batches(24, 1).inputs
    with torch.no_grad(), lesson.watching(network):
        network.eval()(inputs)
        beta, found = network.beta[network.at[False, "relu1"]], lesson.found["relu1"]
        assert torch.allclose(found * 15 / beta, (found * 15 / beta).round(), atol=1e-3)  # 0..15 steps of 4 bits
        assert 8 < len((found * 15 / beta).round().unique()) <= 16 and found.shape == (24, 8, 8, 8)
    assert not network.taps
    config = bayesian_bits.Config(recipe=Recipe(1, 1e-3, "adam", weight_decay=0.0, schedule="constant",
                                                distill=Distill(links=(Link("bn2"),))), hold=1.0)
    bayesian_bits.compress(tiny.model(), tiny.task(), Budget(), config, torch.Generator())


def test_settings_in_toml():
    recipe = build(Recipe, {"epochs": 1, "lr": 0.1, "distill": {"temperature": 2.0, "links": [
        {"student": "conv1"}, {"student": ["a", "b"], "kind": "fsp"}]}})
    assert recipe.distill == Distill(2.0, links=(Link("conv1"), Link(("a", "b"), kind="fsp")))
    assert count_knobs(Recipe(1, 0.1)) == 9 and build(Recipe, {"distill": {}}, base=Recipe(1, 0.1)).distill == Distill()
