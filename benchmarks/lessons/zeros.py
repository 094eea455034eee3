"""Why zeros get lost: prune a network, then quantize it with an ordinary grid.

What to see: an asymmetric grid from the least to the largest weight need not hold 0. The pruned weights land on its
nearest code, all a little beside 0, and not one zero is left: the pruning is undone. A grid on which 0 *is* a code
keeps every zero, whatever the rounding; and a method that returns codes under a mask cannot lose one.
"""

import torch

from methods import Budget, prune_then_quantize

from .common import digits_task, trained

BITS = 4


def rounded(weights: torch.Tensor, low: float, step: float) -> torch.Tensor:
    """To the nearest of low, low + step, low + 2 step, ..."""
    return torch.round((weights - low) / step) * step + low


def main() -> None:
    weights = trained()[6].weight.detach()
    pruned = torch.where(weights.abs() >= weights.abs().flatten().quantile(0.9), weights, 0.0)
    step = float(pruned.max() - pruned.min()) / (2**BITS - 1)
    naive = rounded(pruned, float(pruned.min()), step)
    aligned = rounded(pruned, -step * round(-float(pruned.min()) / step), step)
    made = prune_then_quantize.compress(trained(), digits_task(), Budget(density=0.1, bits=BITS),
                                        prune_then_quantize.Config(scheme="asymmetric"), torch.Generator())
    print(f"pruned                         {share(pruned):5.1f} % zeros")
    print(f"quantized from min to max      {share(naive):5.1f} % zeros, the least weight is {naive.abs().min():.4f}")
    print(f"quantized, 0 is a code         {share(aligned):5.1f} % zeros")
    print(f"codes under a mask (library)   {share(made.weights['6'].decode()):5.1f} % zeros")
    assert share(naive) == 0 and share(aligned) >= share(pruned) and share(made.weights["6"].decode()) >= 89.9


def share(values: torch.Tensor) -> float:
    return 100 * float((values == 0).float().mean())


if __name__ == "__main__":
    main()
