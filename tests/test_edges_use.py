"""How methods are called: a network in training mode, without gradients, with inputs or settings that do not fit."""

import torch
from torch import nn

from methods import width_search
from methods.core.budget import Budget
from methods.core.file.storage import to_bytes
from methods.core.train.task import Task
from tests.edge_networks import seeded


def normed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.5),
                         nn.Linear(32, 4))


def test_a_width_search_takes_a_network_in_training_mode():
    batch = torch.randn(32, 3, 8, 8, generator=seeded()), torch.arange(32) % 4
    task, files = Task.from_loader([batch], [batch]), []
    config = width_search.Config(evaluations=3, population=3, recipe=None, bn_inputs=16)
    for model in (normed().train(), normed().eval()):
        before = torch.get_rng_state()
        made = width_search.compress(model, task, Budget(mac_ratio=0.6, bits=8), config, seeded())
        assert torch.equal(torch.get_rng_state(), before)
        files.append(to_bytes(made)[0])
    assert files[0] == files[1]
