"""What the criteria of a pipeline see in training: taylor, movement and slim, each against its equation."""

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.settings import build
from methods import pipeline
from methods.core.budget import Budget
from methods.core.graph.build import apply


def scores_of(criterion, granularity, model, layers):
    dressed = pipeline.Dressed(model, layers)
    return dressed, pipeline.make_scores(criterion, granularity, dressed, layers, {}, 0.0, torch.Generator())


def test_taylor_is_the_square_of_gradient_times_weight_and_begins_anew(tiny):
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    weight = model[0].weight.detach().clone()
    inputs, targets = torch.randn(5, 3), torch.randn(5, 2)
    own = weight.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.mse_loss(inputs @ own.T, targets), own)
    dressed, scores = scores_of("taylor", "channel", model, ["0"])
    assert not scores.ready()
    for _ in range(2):
        F.mse_loss(model(inputs), targets).backward()
        scores.after_backward(model, 0.0)
    assert torch.allclose(scores.now()["0"], (gradient * weight).square().sum(1), atol=1e-6)
    scores.clear()
    assert not scores.ready() and not scores.now()["0"].any()
    dressed.set_masks({"0": torch.tensor([[True, False, True]] * 2)})
    _, single = dressed, pipeline.make_scores("taylor", "weight", dressed, ["0"], {}, 0.0, torch.Generator())
    F.mse_loss(model(inputs), targets).backward()
    single.after_backward(model, 0.0)
    assert not single.now()["0"][:, 1].any()  # a weight that is 0 has nothing to lose


def test_movement_prunes_the_large_weight_that_shrinks_before_the_small_one_that_grows():
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[2.0, 0.1]]))
    dressed, scores = scores_of("movement", "weight", model, ["0"])
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(3):  # L = g . w with g = (1, -1)
        optimizer.zero_grad()
        model(torch.tensor([[1.0, -1.0]])).sum().backward()
        scores.after_backward(model, 0.0)
        optimizer.step()
    found = scores.now()["0"]
    assert float(found[0, 0]) < 0 < float(found[0, 1])  # the sign of -g w
    level = pipeline.make_scores("level", "weight", dressed, ["0"], {}, 0.0, torch.Generator()).now()["0"]
    assert int(level.argmin()) == 1 and int(found.argmin()) == 0


def test_slim_makes_every_gamma_smaller_where_the_task_says_nothing(tiny):
    config = build(pipeline.Config, {"prune": {
        "criterion": "slim", "granularity": "channel", "penalty": 0.01, "before": {
            "epochs": 2, "lr": 0.05, "weight_decay": 0.0, "momentum": 0.0}}, "activations": "float"})
    model = tiny.model()
    with torch.no_grad():
        model.bn3.weight.copy_(torch.linspace(0.1, 1.0, 12).flip(0))
    before = {name: getattr(model, name).weight.detach().clone() for name in ("bn1", "bn3")}
    seen = {}
    original = pipeline.scores.Norms.now

    def now(self):
        seen.update(original(self))
        return seen

    pipeline.scores.Norms.now = now
    try:
        task = tiny.task(loss=lambda outputs, targets: outputs.sum() * 0.0)
        out = pipeline.compress(model, task, Budget(channel_density=0.5, bits=8), config, torch.Generator())
    finally:
        pipeline.scores.Norms.now = original
    assert bool((seen["conv3"] < before["bn3"].abs()).all()) and bool((seen["conv1"] < before["bn1"].abs()).all())
    alive = (apply(out, tiny.net()).conv3.weight != 0).flatten(1).any(1)
    assert alive.tolist() == [True] * 6 + [False] * 6
