"""Muon on filters: the step against a singular value decomposition, and what must not depend on memory layout."""

import pytest
import torch
from torch import nn

from methods.core.train.finetune import Hooks, Recipe, train
from methods.core.train.muon import DECAY, RATE, FilterMuon

LR = 0.1


def step(layout, times=1, momentum=0.9, decay=0.0, shape=(6, 4, 3, 3)):
    """(filters before, gradients, filters after), in the usual order of dimensions."""
    seeded = torch.Generator().manual_seed(0)
    before = torch.randn(shape, generator=seeded)
    filters = nn.Parameter(before.clone().to(memory_format=layout))
    optimizer = FilterMuon([filters], LR, decay, momentum)
    gradients = [torch.randn(shape, generator=seeded) for _ in range(times)]
    for gradient in gradients:
        filters.grad = gradient.to(memory_format=layout)
        optimizer.step()
    return before, gradients, filters.detach()


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (40, 2, 3, 3), (5, 8, 1, 1)])
def test_a_step_turns_every_direction_of_the_gradient_alike(shape):
    before, (gradient,), after = step(torch.contiguous_format, shape=shape)
    tall = max(1.0, shape[0] / before[0].numel()) ** 0.5
    moved = ((before - after) / (LR * tall)).flatten(1).double()
    left, size, right = torch.linalg.svd(gradient.flatten(1).double(), full_matrices=False)
    in_their_frame = left.T @ moved @ right.T
    assert size.max() / size.min() > 1.5  # the gradient itself is not of that kind
    assert ((in_their_frame.diag() > 0.6) & (in_their_frame.diag() < 1.3)).all()
    assert (in_their_frame - in_their_frame.diag().diag()).abs().max() < 0.05


def test_channels_last_changes_nothing_but_the_order_in_memory():
    _, _, usual = step(torch.contiguous_format, times=3, decay=0.5)
    before, _, last = step(torch.channels_last, times=3, decay=0.5)
    assert last.is_contiguous(memory_format=torch.channels_last) and not torch.equal(before, last)
    assert torch.allclose(usual, last, atol=0.03 * LR)  # sums in bfloat16, in another order


def test_the_size_of_a_gradient_does_not_matter_and_decay_is_apart_from_it():
    before, _, kept = step(torch.contiguous_format)
    _, _, decayed = step(torch.contiguous_format, decay=0.5)
    assert torch.allclose(kept - decayed, before * LR * 0.5, atol=1e-5)


def test_muon_trains_filters_and_sgd_the_rest(tiny):
    recipe = Recipe(epochs=2, lr=0.2, optimizer="muon", weight_decay=5e-4)
    model = tiny.model()
    optimizers = Hooks().optimizers(model, recipe)
    seen = {id(p): kind for o in optimizers for kind, group in [(type(o).__name__, o.param_groups)]
            for p in (o.filters if isinstance(o, FilterMuon) else [p for g in group for p in g["params"]])}
    assert {name: seen[id(p)] for name, p in model.named_parameters()} == {
        name: "FilterMuon" if p.ndim == 4 else "SGD" for name, p in model.named_parameters()}
    muon = next(o for o in optimizers if isinstance(o, FilterMuon)).param_groups[0]
    assert (muon["lr"], muon["weight_decay"]) == (0.2 / RATE, 5e-4 * DECAY)
    history = train(model, tiny.task(), recipe, torch.Generator().manual_seed(0))
    assert history[1]["loss"] < history[0]["loss"]


def test_an_interrupted_training_goes_on_to_the_same_bytes(tiny):
    def weights(run):
        model = tiny.net()
        model.load_state_dict(tiny.model().state_dict())
        train(model.to(memory_format=torch.channels_last), tiny.task(), Recipe(epochs=3, lr=0.1, optimizer="muon"),
              torch.Generator().manual_seed(0), run=run)
        return model.state_dict()

    counted = tiny.Run()
    whole, states = weights(counted), {}
    saves = [i for i, (_, what) in enumerate(counted.calls) if what == "save"]
    with pytest.raises(tiny.Interrupted):
        weights(tiny.Run(states, limit=saves[1] + 1))
    assert states and tiny.same(weights(tiny.Run(states)), whole)
