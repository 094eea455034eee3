"""Which layer can be pruned how far: one layer at a time, without fine-tuning, on held-out digits.

What to see: the classifier, with few weights, bears the least; the large linear layer loses nine of ten for next to
nothing. One rate for all layers wastes what this table shows. Two cautions: one layer is pruned at a time, so errors do
not add up here; and without fine-tuning it all looks far worse than what training repairs.
"""

import torch

from methods import keep_largest, own_copy, weight_layers

from .common import digits_task, trained

DENSITIES = (0.5, 0.3, 0.2, 0.1, 0.05, 0.02)


def main() -> None:
    network, task = trained(), digits_task()
    print("kept:   " + "".join(f"{density:>8.0%}" for density in DENSITIES))
    found = {name: [score(network, task, name, density) for density in DENSITIES] for name in weight_layers(network)}
    for name, scores in found.items():
        weights = weight_layers(network)[name].weight.numel()
        print(f"layer {name:<2}" + "".join(f"{value:8.1f}" for value in scores) + f"   {weights:,} weights")
    assert found["8"][3] < found["6"][3]


def score(network, task, name: str, density: float) -> float:
    """Held-out top-1 with one layer pruned."""
    pruned = own_copy(network)
    with torch.no_grad():
        weight = weight_layers(pruned)[name].weight
        weight.mul_(keep_largest(weight.abs(), round(density * weight.numel())))
    return task.score(pruned)


if __name__ == "__main__":
    main()
