"""Several hooks in one training: their order, their states, and whose optimizers are taken."""

import pytest
import torch
from torch import nn

from methods.core.errors import ConfigError
from methods.core.fit.prune import MaskHooks
from methods.core.train.finetune import Hooks, Recipe, train
from methods.core.train.hooks import as_hooks


class Log(Hooks):
    def __init__(self, name, seen):
        self.name, self.seen, self.count = name, seen, 0

    def loss(self, model, loss):
        self.seen.append((self.name, "loss"))
        return 2 * loss if self.name == "a" else loss + 1

    def after_backward(self, model, lr):
        self.seen.append((self.name, "backward"))

    def after_step(self, model, lr):
        self.count += 1
        self.seen.append((self.name, "step"))

    def after_epoch(self, model, epoch):
        self.seen.append((self.name, "epoch"))

    def state(self):
        return {"count": self.count}

    def restore(self, state):
        self.count = state["count"]


def test_hooks_are_called_in_order(tiny):
    seen = []
    train(tiny.model(), tiny.task(), Recipe(1, 0.01), torch.Generator(), hooks=[Log("a", seen), Log("b", seen)])
    step = [(name, what) for what in ("loss", "backward", "step") for name in "ab"]
    assert seen == 4 * step + [("a", "epoch"), ("b", "epoch")]
    both = as_hooks([Log("a", []), Log("b", [])])
    assert float(both.loss(nn.Identity(), torch.tensor(3.0))) == 7.0  # 2 * 3 + 1, not 2 * (3 + 1)


def test_each_hook_takes_back_its_own_state(tiny):
    def run_with(run):
        hooks = [Log("a", []), Log("b", []), Hooks()]
        hooks[1].count = 100
        train(tiny.model(), tiny.task(), Recipe(2, 0.01), torch.Generator().manual_seed(0), hooks=hooks, run=run)
        return [hook.count for hook in hooks[:2]]

    states = {}
    with pytest.raises(tiny.Interrupted):
        run_with(tiny.Run(states, limit=4))
    assert run_with(tiny.Run(states)) == run_with(tiny.Run()) == [8, 108]


def test_one_hook_none_or_a_list_are_the_same(tiny):
    def trained(hooks):
        model = tiny.model()
        train(model, tiny.task(), Recipe(1, 0.01), torch.Generator().manual_seed(0), hooks=hooks)
        return model.state_dict()

    masks = {"fc": torch.rand(4, 12) > 0.5}
    assert tiny.same(trained(None), trained([])) and tiny.same(trained(None), trained(Hooks()))
    pruned = trained(MaskHooks(masks))
    assert tiny.same(pruned, trained([Hooks(), MaskHooks(masks)])) and not bool(pruned["fc.weight"][~masks["fc"]].any())


def test_one_hook_chooses_the_optimizers_and_others_add_their_own(tiny):
    class Chooses(Hooks):
        def optimizers(self, model, recipe):
            return [torch.optim.SGD(model.fc.parameters(), lr=recipe.lr)]

    class Holds(Hooks):
        def __init__(self):
            self.scale = nn.Parameter(torch.ones(()))

        def own_optimizers(self, model, recipe):
            return [torch.optim.SGD([self.scale], lr=recipe.lr)]

        def loss(self, model, loss):
            return loss * self.scale

    model, holds = tiny.model(), Holds()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, tiny.task(), Recipe(1, 0.01), torch.Generator(), hooks=[holds, Chooses()])
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {"fc.weight", "fc.bias"} and float(holds.scale.detach()) < 1
    with pytest.raises(ConfigError, match="Chooses, Chooses each choose the optimizers"):
        train(model, tiny.task(), Recipe(1, 0.01), torch.Generator(), hooks=[Chooses(), Chooses()])
    with pytest.raises(ConfigError, match="hooks holds a int"):
        train(model, tiny.task(), Recipe(1, 0.01), torch.Generator(), hooks=[3])
