"""Prune, fine-tune, quantize, store: the exercise that every tutorial sets, done to the end.

What to see: 90 % of the weights are gone, the rest have 4 bits, and the *file* is some thirty times smaller; the
accuracy is that of the decoded file, in integer arithmetic. Tutorials usually stop at masks on float tensors: then
nothing is smaller, and the quantized accuracy is that of a network nobody stored.
"""

import tempfile
from pathlib import Path

import torch

from methods import Budget, Recipe, encode, open_file, prune_then_quantize

from .common import accuracy, digits_task, trained


def main() -> None:
    network = trained()
    config = prune_then_quantize.Config(retrain=Recipe(epochs=12, lr=0.03))
    compressed = prune_then_quantize.compress(network, digits_task(), Budget(density=0.1, bits=4), config,
                                              torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "digits.jc"
        size = encode(compressed, path).total
        integer = accuracy(open_file(path, network))
    dense = 4 * sum(p.numel() for p in network.parameters())
    print(f"float32    {dense:7,} B   {accuracy(network):.2f} %")
    print(f"compressed {size:7,} B   {integer:.2f} % in integers, {dense / size:.1f} times smaller")
    assert dense > 10 * size and integer > accuracy(network) - 3


if __name__ == "__main__":
    main()
