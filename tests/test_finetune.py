"""The training loop: resuming to the same bytes, one source of randomness, schedules and averages by hand."""

import math
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from methods.core.errors import CompressError, ConfigError, TrainingDiverged
from methods.core.train.finetune import CHECK_EVERY, SCHEDULES, Hooks, Recipe, decay_groups, train
from methods.core.train.loss import smoothed
from methods.core.train.task import Task

STEPS = 4  # batches in an epoch of the tiny task


def network() -> nn.Module:
    """Batch norm and dropout, always with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hidden, bn, fc = nn.Linear(192, 12, bias=False), nn.BatchNorm1d(12), nn.Linear(12, 4)
        layers = OrderedDict(flat=nn.Flatten(), hidden=hidden, bn=bn, relu=nn.ReLU(), drop=nn.Dropout(0.2), fc=fc)
        return nn.Sequential(layers).eval()


class Pulled(Hooks):
    """Pulls the classifier towards an average that the hook itself carries; stops at a given event."""

    def __init__(self, stop=None):
        self.stop, self.seen, self.average = stop, 0, torch.zeros(4, 12)

    def check(self, event):
        if event == self.stop:
            raise KeyboardInterrupt

    def after_backward(self, model, lr):
        self.check(("backward", self.seen))

    @torch.no_grad()
    def after_step(self, model, lr):
        self.seen += 1
        self.average.lerp_(model.fc.weight, 0.1)
        model.fc.weight.lerp_(self.average, 0.05)

    def after_epoch(self, model, epoch):
        self.check(("epoch", epoch))

    def state(self):
        return {"seen": self.seen, "average": self.average}

    def restore(self, state):
        self.seen, self.average = state["seen"], state["average"].clone()


RECIPES = {
    "sgd": Recipe(epochs=3, lr=0.02, schedule="one_cycle", warmup=0.3, label_smoothing=0.1),
    "sgd ema": Recipe(epochs=3, lr=0.02, ema=0.8),
    "adam": Recipe(epochs=3, lr=0.01, optimizer="adam", schedule="step"),
    "adam ema": Recipe(epochs=3, lr=0.01, optimizer="adam", ema=0.8),
}
# The first step of all, the middle of an epoch, the first step after a save, before a save, after the last step.
STOPS = [("backward", 0), ("backward", STEPS + 2), ("backward", 2 * STEPS), ("epoch", 1), ("epoch", 2)]


def outcome(tiny, recipe, run, stop=None):
    """Everything that a finished training leaves behind."""
    model, hooks, generator = network(), Pulled(stop), torch.Generator().manual_seed(7)
    history = train(model, tiny.task(), recipe, generator, hooks=hooks, run=run)
    return {"model": model.state_dict(), "history": history, "hooks": hooks.state(), "generator": generator.get_state()}


@pytest.mark.parametrize("kind", RECIPES)
def test_an_interrupted_run_resumes_to_the_same_bytes(tiny, kind):
    whole = outcome(tiny, RECIPES[kind], tiny.Run())
    for stop in STOPS:
        states = {}
        with pytest.raises(KeyboardInterrupt):
            outcome(tiny, RECIPES[kind], tiny.Run(states), stop)
        torch.manual_seed(99)
        assert tiny.same(outcome(tiny, RECIPES[kind], tiny.Run(states)), whole), stop


def test_a_failing_save_or_report_loses_nothing(tiny):
    recipe, counted = RECIPES["sgd ema"], tiny.Run()
    whole = outcome(tiny, recipe, counted)
    assert [what for _, what in counted.calls].count("save") == recipe.epochs
    for limit in range(len(counted.calls)):
        states = {}
        with pytest.raises(tiny.Interrupted):
            outcome(tiny, recipe, tiny.Run(states, limit))
        assert tiny.same(outcome(tiny, recipe, tiny.Run(states)), whole), limit
    assert tiny.same(outcome(tiny, recipe, tiny.Run(counted.states)), whole)  # a finished run trains no step more


def test_the_generator_is_the_only_randomness(tiny):
    def weights(seed, world):
        torch.manual_seed(world)
        before, model = torch.get_rng_state(), network()
        train(model, tiny.task(), Recipe(epochs=1, lr=0.01), torch.Generator().manual_seed(seed))
        assert torch.equal(torch.get_rng_state(), before)
        return model.state_dict()

    assert tiny.same(weights(1, world=1), weights(1, world=2))
    assert not tiny.same(weights(1, world=1), weights(2, world=1))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_label_smoothing_is_that_of_torch(tiny, smoothing):
    outputs = torch.randn(9, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    targets = torch.arange(9) % 5
    ours = smoothed(tiny.task().loss, smoothing)(outputs, targets, None)
    wanted = F.cross_entropy(outputs, targets, label_smoothing=smoothing)
    assert torch.allclose(ours, wanted, rtol=1e-6)
    assert torch.allclose(*(torch.autograd.grad(loss, outputs)[0] for loss in (ours, wanted)), atol=1e-7)


HALF = math.sqrt(0.5)
BY_HAND = {  # factors of the 8 steps of 2 epochs, at progress 1/16, 3/16, ... 15/16
    ("constant", 0.0): [1] * 8,
    ("constant", 0.25): [1 / 4, 3 / 4, 1, 1, 1, 1, 1, 1],
    ("one_cycle", 0.0): [15 / 16, 13 / 16, 11 / 16, 9 / 16, 7 / 16, 5 / 16, 3 / 16, 1 / 16],
    ("one_cycle", 0.5): [1 / 8, 3 / 8, 5 / 8, 7 / 8, 7 / 8, 5 / 8, 3 / 8, 1 / 8],
    ("cosine", 0.0): [0.5 + 0.5 * math.cos(math.pi * k / 16) for k in range(1, 16, 2)],
    ("cosine", 0.5): [1 / 8, 3 / 8, 5 / 8, 7 / 8] + [0.5 + 0.5 * math.cos(math.pi * k / 8) for k in (1, 3, 5, 7)],
    ("step", 0.0): [1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01],
    ("step", 0.25): [1 / 4, 3 / 4, 1, 1, 0.1, 0.1, 0.01, 0.01],
}


@pytest.mark.parametrize("schedule, warmup", BY_HAND)
def test_schedules_by_hand(tiny, schedule, warmup):
    class Log(Hooks):
        def __init__(self):
            self.seen, self.groups = [], []

        def optimizers(self, model, recipe):
            self.made = [*super().optimizers(model, recipe), torch.optim.SGD([torch.zeros(1, requires_grad=True)], 5.0)]
            return self.made

        def after_step(self, model, lr):
            self.seen.append(lr / 0.02)
            self.groups.append([group["lr"] for optimizer in self.made for group in optimizer.param_groups])

    log, recipe = Log(), Recipe(epochs=2, lr=0.02, schedule=schedule, warmup=warmup)
    train(network(), tiny.task(), recipe, torch.Generator().manual_seed(0), hooks=log)
    wanted = BY_HAND[schedule, warmup]
    assert log.seen == pytest.approx(wanted)
    assert [row[:2] for row in log.groups] == [pytest.approx([0.02 * w] * 2) for w in wanted]
    assert [row[2] for row in log.groups] == pytest.approx([5.0 * w for w in wanted])  # a method's own optimizer
    assert set(SCHEDULES) == {name for name, _ in BY_HAND}


def test_the_average_by_hand(tiny):
    class Log(Hooks):
        def __init__(self, model):
            self.mean = {name: value.double() for name, value in model.state_dict().items()}

        def after_step(self, model, lr):
            for name, value in model.state_dict().items():
                self.mean[name] = 0.9 * self.mean[name] + 0.1 * value.double()

    model = network()
    log = Log(model)
    train(model, tiny.task(), Recipe(epochs=2, lr=0.02, ema=0.9), torch.Generator().manual_seed(0), hooks=log)
    for name, value in model.state_dict().items():
        assert name.endswith("num_batches_tracked") or torch.allclose(value.double(), log.mean[name], atol=1e-6)


def test_loss_and_accuracy_are_means_over_images():
    inputs, targets = torch.randn(50, 6), torch.randint(3, (50,))
    task = Task.from_loader(list(zip(inputs.split(32), targets.split(32), strict=True)), [])
    model = nn.Linear(6, 3)
    with torch.no_grad():
        outputs = model(inputs)
    wanted = float(F.cross_entropy(outputs, targets)), float((outputs.argmax(1) == targets).float().mean())
    (epoch,) = train(model, task, Recipe(epochs=1, lr=1e-12), torch.Generator().manual_seed(0))
    assert (epoch["loss"], epoch["train_top1"]) == pytest.approx((wanted[0], 100 * wanted[1]), rel=1e-5)


def test_a_loss_that_is_not_finite_stops_with_the_step(tiny):
    class Break(Hooks):
        def __init__(self, at, value):
            self.count, self.at, self.value = -1, at, value

        def loss(self, model, loss):
            self.count += 1
            return loss * self.value if self.count >= self.at else loss

    for at, value, said in ((0, math.nan, 0), (5, math.nan, 7), (8, math.inf, 10), (23, math.nan, 23)):
        assert said - at < CHECK_EVERY
        with pytest.raises(TrainingDiverged, match=rf"is (nan|inf) at step {said} of 24 .*lower lr \(0.02\)"):
            train(network(), tiny.task(), Recipe(epochs=6, lr=0.02), torch.Generator().manual_seed(0),
                  hooks=Break(at, value))
    with pytest.raises(TrainingDiverged):
        train(network(), tiny.task(), Recipe(epochs=9, lr=1e18, schedule="constant"), torch.Generator())
    assert issubclass(TrainingDiverged, CompressError)


def test_decay_acts_on_weights_not_on_biases_and_norms(tiny):
    model = network()
    model.bn.bias.requires_grad_(False)
    decayed, free = decay_groups(model, 0.1)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert {id(p) for p in decayed["params"]} == {id(model.hidden.weight), id(model.fc.weight)}
    assert {id(p) for p in free["params"]} == {id(model.bn.weight), id(model.fc.bias)}
    with pytest.raises(ConfigError, match="requires a gradient"):
        decay_groups(model.requires_grad_(False), 0.1)


def test_no_epoch_changes_nothing(tiny):
    model, generator = network().train(), torch.Generator().manual_seed(0)
    before, state = tiny.fingerprint(model)["values"], generator.get_state()
    assert train(model, tiny.task(), Recipe(epochs=0, lr=0.1, ema=0.9), generator) == []
    assert tiny.same(model.state_dict(), before) and torch.equal(generator.get_state(), state) and not model.training


BAD = {"lr": [0, -1, math.nan], "epochs": [-1], "warmup": [1.0, -0.1], "ema": [1.0, -0.1], "momentum": [1.0, -0.1],
       "weight_decay": [-1e-4, math.nan], "label_smoothing": [1.0, -0.1], "schedule": ["linear"], "optimizer": ["lion"]}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in BAD.items() for value in values])
def test_recipes_that_make_no_sense_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"^{name} = .*allowed"):
        Recipe(**{"epochs": 1, "lr": 0.1, name: value})


def test_a_task_without_batches_is_refused(tiny):
    for train_batches, message in ((None, "holds no training batches"), (tiny.Batches(0, 0), "nothing to train on")):
        with pytest.raises(ConfigError, match=message):
            train(network(), Task(train_batches, tiny.Batches(24, 1)), Recipe(1, 0.1), torch.Generator())
