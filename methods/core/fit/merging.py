"""Removing channels whose part in the next layer is put together from the kept ones: UDFC's least squares.

A removed channel j becomes sum_i s_ij of the kept channels i; s goes into the next layer's weights.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor, nn

from ..graph.channels import (
    Filters,
    Pair,
    count_channels,
    identity_on,
    keep_channels,
    merge_channels,
    read_filters,
)

EPS = torch.finfo(torch.float64).eps
Combine = Callable[[Pair, Tensor, Filters, Tensor, Tensor], Tensor]


def merge_pairs(model: nn.Module, pairs: list[Pair], densities: Mapping[str, float], criterion: str,
                combine: Combine | None) -> dict[Pair, Tensor]:
    """Remove channels of every pair, in place: the kept ones are those of the highest criterion.

    combine  (pair, weight, filters, kept, removed) -> s [kept, removed]; None only prunes. Weight and filters are the
             original ones, also where a layer has itself lost inputs
    Returns {pair: indices of the channels it keeps}, without the pairs that keep all.
    """
    originals = {pair: (model.get_submodule(pair.first).weight.detach(), read_filters(model, pair)) for pair in pairs}
    left: dict[Pair, Tensor] = {}
    for pair, (weight, filters) in originals.items():
        n = len(weight)
        kept = keep_channels(weight, count_channels(pair.first, n, densities[pair.first]), criterion)
        removed = torch.tensor(sorted(set(range(n)) - set(kept.tolist())), dtype=torch.int64)
        if len(removed) == 0:
            continue
        z = identity_on(kept, n)
        if combine is not None:
            z[:, removed] = combine(pair, weight, filters, kept, removed)
        merge_channels(model, pair, kept, z)
        left[pair] = kept
    return left


def least_squares(kept: Filters, wanted: Filters, alpha: Tensor) -> Tensor:
    """argmin_s |wanted.r_j - s kept.r|^2 + alpha_j (wanted.k_j - s kept.k)^2 of least norm, as columns [n, p].

    (Q^T Q + alpha P P^T)^+ (Q^T V + alpha P K_j): one SVD of Q serves every j, and the bias is a rank-one update.
    """
    left, sigma, right = torch.linalg.svd(kept.r.T, full_matrices=False)  # [D, m] [m] [m, n]
    real = sigma > max(kept.r.shape) * EPS * sigma[0]
    left, sigma, right = left[:, real], sigma[real], right[real]
    s = right.T @ ((left.T @ wanted.r.T) / sigma[:, None])  # Eq. (20) with alpha1 = 0
    missed = wanted.k - kept.k @ s
    inside = right @ kept.k
    outside = kept.k - right.T @ inside
    if outside.norm() > 1e-10 * kept.k.norm():  # a combination of no filter at all changes the bias: meet it exactly
        return s + torch.outer(outside / outside.square().sum(), missed * (alpha > 0))  # Eq. (20), singular
    step = right.T @ (inside / sigma.square())  # (Q^T Q)^+ P
    return s + torch.outer(step, alpha * missed / (1 + alpha * (kept.k @ step)))  # Eq. (20)


def least_squares_nonneg(kept: Filters, wanted: Filters, alpha: Tensor) -> Tensor:
    """The same under s >= 0 (Lawson-Hanson), after an orthogonal reduction from D to at most n rows."""
    basis, square = torch.linalg.qr(kept.r.T)
    reduced = wanted.r @ basis
    columns = []
    for j, root in enumerate(alpha.sqrt()):
        matrix = torch.cat([square, root * kept.k[None]])
        columns.append(nnls(matrix.numpy(), torch.cat([reduced[j], root * wanted.k[j, None]]).numpy())[0])
    return torch.from_numpy(np.stack(columns, 1))
