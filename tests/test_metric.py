"""Losses of any signature, and what a network is judged by: top-1 where it exists, a user's metric, else the loss."""

import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from methods import clip_q
from methods.core.budget import Budget
from methods.core.errors import CompressError, ConfigError
from methods.core.train.finetune import Recipe, train
from methods.core.train.loss import Loss
from methods.core.train.metric import TOP1, Metric, evaluating, is_classification
from methods.core.train.task import Task

FLOATS = torch.rand(4, 3)


def three(outputs, targets, inputs):
    return (outputs - targets).square().mean() + inputs.mean()


def named(outputs, targets, *, inputs=None):
    return inputs.mean()


class Smooth(nn.Module):
    def forward(self, outputs, targets):
        return (outputs - targets).abs().mean()


@pytest.mark.parametrize("function, how", [
    (F.cross_entropy, "not at all"), (nn.CrossEntropyLoss(), "not at all"), (F.mse_loss, "not at all"),
    (Smooth(), "not at all"), (lambda a, b, weight=None: a.mean(), "not at all"),
    (lambda *args: args[0].mean(), "not at all"), (functools.partial(three, inputs=torch.ones(1)), "by name"),
    (functools.partial(F.mse_loss, reduction="sum"), "not at all"),
    (three, "by name"), (lambda a, b, c: a.mean(), "by position"), (named, "by name")])
def test_the_signature_of_a_loss_is_read_once(function, how):
    loss = Loss.of(function)
    assert loss.how == how and Loss.of(loss) is loss and Task(None, [], loss=function).loss.how == how


def test_a_loss_is_handed_the_inputs_that_it_takes():
    x, y, z = torch.zeros(2, 3), torch.ones(2, 3), torch.full((2, 3), 5.0)
    assert float(Loss.of(three)(x, y, z)) == 6.0 and float(Loss.of(named)(x, y, z)) == 5.0
    assert float(Loss.of(lambda a, b, c: c.sum())(x, y, z)) == 30.0
    assert float(Loss.of(F.mse_loss)(x, y, z)) == float(Loss.of(F.mse_loss)(x, y)) == 1.0
    task = Task(None, [], loss=F.mse_loss)
    assert float(pickle.loads(pickle.dumps(task)).loss(x, y, z)) == 1.0


@pytest.mark.parametrize("loss", [lambda a: a.mean(), lambda a, b, c, d: a.mean(), lambda: 0, "mse", None])
def test_what_is_no_loss_is_refused_when_the_task_is_made(loss):
    with pytest.raises(ConfigError, match="needed is a function of .outputs, targets. or of"):
        Task(None, [], loss=loss)


@pytest.mark.parametrize("outputs, targets, wanted", [
    ((8, 3), (8,), True), ((8, 3, 5, 5), (8, 5, 5), True), ((8, 3, 5), (8, 5), True), ((8, 1), (8,), False),
    ((8,), (8,), False), ((8, 3), (8, 1), False), ((8, 3), (8, 3), False), ((8, 3), (7,), False),
    ((8, 1, 5, 5), (8, 5, 5), False)])
def test_what_is_a_classification(outputs, targets, wanted):
    labels = torch.zeros(targets, dtype=torch.int64)
    assert is_classification(torch.zeros(outputs), labels) is wanted
    assert not is_classification(torch.zeros(outputs), labels.float())
    assert not is_classification(torch.zeros(outputs), labels.bool())
    assert not is_classification([torch.zeros(outputs)], labels) and not is_classification(torch.zeros(outputs), {})


def test_segmentation_is_scored_by_pixels_of_a_class():
    outputs = torch.zeros(2, 3, 2, 2)
    outputs[:, 1] = 1.0  # class 1 everywhere
    targets = torch.tensor([[[1, 1], [0, -100]], [[1, 2], [2, 2]]])
    task = Task.from_loader([], [(outputs, targets), (outputs[:1], targets[:1])])
    assert task.score(nn.Identity()) == pytest.approx(100 * (3 + 2) / (7 + 3))
    assert task.error(nn.Identity()) == pytest.approx(1 - 5 / 10)


def test_error_is_the_top1_error_to_the_bit(tiny):
    task, model = tiny.task(), tiny.model()
    assert task.error(model) == 1 - task.score(model) / 100  # what rows of CLIP-Q were searched with


def regression(n=5):
    x = torch.arange(4.0 * n).reshape(n, 4)
    return [(x[:3], x[:3, :1]), (x[3:], x[3:, :1] + 1)]


def test_without_a_metric_choices_take_the_loss():
    task = Task.from_loader([], regression(), loss=F.mse_loss)
    assert task.error(nn.Linear(4, 1)) > 0
    model = nn.Linear(4, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0, 0, 0]]))
        model.bias.zero_()
    assert task.error(model) == pytest.approx(2 / 5, rel=1e-6)  # 0 on three examples, 1 on two
    with pytest.raises(CompressError, match=r"no metric for outputs float32 \[3, 1\] and targets float32 \[3, 1\]"):
        task.score(model)
    assert Task.from_loader([], [(torch.eye(3), torch.arange(3))], metric=None).error(nn.Identity()) == pytest.approx(
        float(F.cross_entropy(torch.eye(3), torch.arange(3))))


def test_a_metric_of_the_users_with_its_direction():
    worst = Metric(lambda outputs, targets: (outputs - targets).abs().amax(), "worst", higher_is_better=False)
    closest = Metric(lambda outputs, targets: -(outputs - targets).abs(), "closest", higher_is_better=True)
    share = Metric(lambda outputs, targets: 25.0, "share", higher_is_better=True, percent=True)
    model, data = nn.Identity(), [(FLOATS, FLOATS + 1), (FLOATS[:1], FLOATS[:1] + 6)]
    found = [(task.score(model), task.error(model)) for task in
             (Task.from_loader([], data, metric=metric) for metric in (worst, closest, share))]
    assert found == [pytest.approx((2, 2)), pytest.approx((-2, 2)), (25.0, 0.75)]
    with pytest.raises(ConfigError, match="metric = 'top1': needed is Metric"):
        Task(None, [], metric="top1")
    with pytest.raises(ConfigError, match="the metric 'odd' returns a str"):
        Task.from_loader([], data, metric=Metric(lambda *_: "x", "odd", True)).score(model)


def test_training_reports_the_metric_where_there_is_one():
    model = nn.Linear(4, 1)
    (epoch,) = train(model, Task.from_loader(regression(), [], loss=F.mse_loss), Recipe(1, 1e-6), torch.Generator())
    assert set(epoch) == {"loss"}
    gap = Metric(lambda outputs, targets: (outputs - targets).abs(), "gap", False)
    task = Task.from_loader(regression(), [], loss=F.mse_loss, metric=gap)
    with torch.no_grad():
        wanted = float(torch.cat([(model(x) - y).abs() for x, y in regression()]).mean())
    (epoch,) = train(model, task, Recipe(1, 1e-12), torch.Generator())
    assert epoch["train_gap"] == pytest.approx(wanted, rel=1e-5)
    assert TOP1.name == "top1"  # the name of the column of logs


def test_nested_outputs_train_and_are_judged():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 1)

        def forward(self, x):
            return {"value": self.fc(x), "again": [2 * self.fc(x)]}

    def loss(outputs, targets):
        return F.mse_loss(outputs["value"], targets) + F.mse_loss(outputs["again"][0], 2 * targets)

    task = Task.from_loader(regression(), regression(), loss=loss)
    model = Two()
    before = task.error(model)
    train(model, task, Recipe(3, 1e-4), torch.Generator())
    assert task.error(model) < before


def test_scoring_leaves_every_modules_mode_as_it_was():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout())
    model.train()
    model[1].eval()
    with pytest.raises(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == [True, True, False, True]


def test_the_search_of_clip_q_sees_the_task_s_own_measure():
    x = [torch.randn(64, 8) for _ in range(2)]
    data = [(each, each[:, :1] - each[:, 1:2]) for each in x]
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    train(net, Task.from_loader(data, data, loss=F.mse_loss), Recipe(60, 1e-2, "adam", weight_decay=0.0),
          torch.Generator())
    config = clip_q.Config(evaluations=6, initial=6, finetune=Recipe(0, 1e-2))
    for fields in ({}, {"metric": Metric(lambda o, t: (o - t).square(), "mse", higher_is_better=False)}):
        task = Task.from_loader(data, data, loss=F.mse_loss, **fields)
        out = clip_q.compress(net, task, Budget(bits=4), config, torch.Generator().manual_seed(0))
        found = {entry["p"]: entry["error"] for entry in out.notes["trace"]["0"]}
        assert found[max(found)] > 3 * found[min(found)]  # pruning most of the layer costs accuracy, and is seen to
