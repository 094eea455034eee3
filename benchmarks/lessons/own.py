"""A network and a loss of one's own: a regressor with a skip connection, compressed, stored, run in integers.

What to see: any module that torch.fx can follow, any loss, any loader. Nothing here is a classification: the library
reports the loss instead of accuracy. The same file gives the float network, the integer one, and what both cost.
"""

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods import Budget, Recipe, Task, apply, decode, deep_compression, encode, open_file, train


class Regressor(nn.Module):
    """[N, 16] -> [N, 1]"""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(16, 64), nn.Linear(64, 64), nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        return self.head(F.relu(self.second(x)) + x)


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(64, 16, generator=generator) for _ in range(16)]
    data = [(batch, batch[:, :4].square().sum(1, keepdim=True)) for batch in x]
    task = Task.from_loader(data[:14], data[14:], loss=F.mse_loss)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Regressor()
    train(network, task, Recipe(60, 3e-3, optimizer="adam"), generator)
    config = deep_compression.Config(rounds=2, retrain=Recipe(20, 2e-3, optimizer="adam"),
                                     tune=Recipe(10, 1e-4, optimizer="adam"))
    budget = Budget(density={"*": 0.3, "head": None}, bits={"*": 5, "head": None})
    made = deep_compression.compress(network, task, budget, config, generator)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "regressor.jc"
        size = encode(made, path).total
        again = apply(decode(path), network)
        kept = open_file(path, network, (16,)).compressed.weights
    dense = 4 * sum(p.numel() for p in network.parameters())
    print(f"float32    {dense:6,} B   mean squared error {error(network, data[14:]):.3f}")
    print(f"compressed {size:6,} B   mean squared error {error(again, data[14:]):.3f}; coded: {', '.join(kept)}, "
          "the head is left alone")
    assert size < dense / 4 and "head" not in kept


def error(network: nn.Module, data: list) -> float:
    with torch.no_grad():
        return sum(float(F.mse_loss(network(x), y)) for x, y in data) / len(data)


if __name__ == "__main__":
    main()
