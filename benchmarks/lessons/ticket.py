"""The lottery ticket (Frankle and Carbin 2019): a sparse network trained from its own first weights, and two controls.

What to see: prune a trained network, put the surviving weights back to where they *started*, train again: it learns as
well as the dense one or nearly. With the same mask and *other* first weights, or with a random mask of the same
density, it learns less. Digits are easy: the gaps are small, and one seed proves nothing; the papers' point needs
harder tasks, several rounds and seeds.
"""

import torch

from methods import MaskHooks, Recipe, apply_masks, keep_local, train, weight_layers

from .common import accuracy, convnet, digits_task, trained

DENSITY, EPOCHS = 0.1, 15


def main() -> None:
    weights = {name: layer.weight.detach() for name, layer in weight_layers(trained()).items()}
    masks = keep_local(weights, dict.fromkeys(weights, DENSITY))
    generator = torch.Generator().manual_seed(1)
    shuffled = {name: mask.flatten()[torch.randperm(mask.numel(), generator=generator)].reshape(mask.shape)
                for name, mask in masks.items()}
    results = {"dense": accuracy(trained()), "ticket": learned(masks, seed=0),
               "same mask, other first weights": learned(masks, seed=7), "random mask": learned(shuffled, seed=0)}
    for name, value in results.items():
        print(f"{name:<32}{value:6.2f} %")
    assert results["ticket"] > results["random mask"] and results["ticket"] > 80


def learned(masks: dict[str, torch.Tensor], seed: int) -> float:
    """Test accuracy of `convnet(seed)` trained under the masks."""
    network = convnet(seed)
    apply_masks(network, masks)
    recipe = Recipe(EPOCHS, 5e-3, optimizer="adam")
    train(network, digits_task(), recipe, torch.Generator().manual_seed(0), hooks=MaskHooks(masks))
    return accuracy(network.eval())


if __name__ == "__main__":
    main()
