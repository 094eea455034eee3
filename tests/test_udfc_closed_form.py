"""UDFC's closed form of pruning: its equations against least squares, scipy and its own gradient."""

import numpy as np
import pytest
import scipy.optimize
import torch

from methods import udfc
from methods.core.graph.channels import Filters
from methods.udfc import Config, solve

PLAIN = Config(alpha1=0.01)


def random_filters(n, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    gain, k = (torch.randn(n, dtype=torch.float64, generator=generator) for _ in range(2))
    return Filters(gain[:, None] * torch.randn(n, d, dtype=torch.float64, generator=generator), k, gain)


@pytest.mark.parametrize("n, d, alpha1", [(4, 27, 0.01), (28, 27, 0.01), (27, 27, 1.0), (44, 27, 0.01), (44, 27, 0.0),
                                          (12, 4, 0.5)])
def test_eq20_against_least_squares_on_the_printed_matrices(n, d, alpha1):
    """min |V - Q s|^2 + alpha1 (K_j - P s)^2 with Q = [gamma_i sigma_j / (sigma_i gamma_j) W_i], for each j."""
    kept, removed = random_filters(n, d, 1), random_filters(5, d, 2)
    ours = solve(kept, removed, Config(alpha1=alpha1))
    assert ours.shape == (n, 5) and ours.isfinite().all()
    for j in range(5):
        raw_kept = kept.r / kept.gain[:, None]  # W_i
        q = ((kept.gain / removed.gain[j])[:, None] * raw_kept).T.numpy()  # D x n
        v = (removed.r[j] / removed.gain[j]).numpy()  # W_j
        stacked = np.vstack([q, np.sqrt(alpha1) * kept.k.numpy()])
        target = np.append(v, np.sqrt(alpha1) * float(removed.k[j]))
        best = np.linalg.lstsq(stacked, target, rcond=None)[0]
        assert np.abs(ours[:, j].numpy() - best).max() < 1e-9 * max(1, np.abs(best).max())
        if n > d + 1:
            assert np.abs(stacked @ ours[:, j].numpy() - target).max() < 1e-9
            assert float(ours[:, j].norm()) == pytest.approx(np.linalg.norm(best), rel=1e-9)


def loss(s, kept, removed, j, alpha):
    return ((removed.r[j] - s @ kept.r) ** 2).sum() + alpha[j] * (removed.k[j] - s @ kept.k) ** 2


@pytest.mark.parametrize("form", udfc.FORMS)
def test_gradient_is_zero_and_the_hessian_positive(form):
    kept, removed = random_filters(5, 9, 3), random_filters(3, 9, 4)
    alpha = 0.01 * removed.gain**2 if form == "paper" else torch.full((3,), 0.01, dtype=torch.float64)
    ours = solve(kept, removed, Config(form=form))
    for j in range(3):
        s = ours[:, j].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(s, kept, removed, j, alpha), s)
        assert gradient.abs().max() < 1e-10
        hessian = torch.autograd.functional.hessian(lambda s, j=j: loss(s, kept, removed, j, alpha), ours[:, j])
        assert torch.linalg.eigvalsh(hessian).min() >= -1e-12
        assert torch.allclose(hessian, 2 * (kept.r @ kept.r.T + alpha[j] * torch.outer(kept.k, kept.k)), atol=1e-12)


def test_the_loss_is_least_among_the_alternatives():
    kept, removed = random_filters(6, 12, 5), random_filters(4, 12, 6)
    alpha = 0.01 * removed.gain**2
    ours, fewer = solve(kept, removed, PLAIN), solve(kept[torch.arange(5)], removed, PLAIN)
    for j in range(4):
        best = loss(ours[:, j], kept, removed, j, alpha)
        zero = torch.zeros(6, dtype=torch.float64)
        assert best <= loss(zero, kept, removed, j, alpha)
        assert best <= loss(torch.cat([fewer[:, j], zero[:1]]), kept, removed, j, alpha) + 1e-12
        for i in range(6):  # neuron merging: one stand-in, scaled
            one = zero.clone()
            one[i] = removed.r[j].norm() / kept.r[i].norm()
            assert best <= loss(one, kept, removed, j, alpha)


def test_forms_agree_where_their_weights_do():
    kept, removed = random_filters(5, 9, 7), random_filters(4, 9, 8)
    paper = solve(kept, removed, Config(alpha1=0.03))
    for j in range(4):
        one = removed[torch.tensor([j])]
        alpha = 0.03 * float(removed.gain[j]) ** 2
        assert torch.allclose(paper[:, [j]], solve(kept, one, Config(alpha1=alpha, form="folded")), rtol=0, atol=1e-12)


def test_nonneg_against_scipy_on_its_own_stack():
    kept, removed = random_filters(6, 20, 9), random_filters(4, 20, 10)
    for form in udfc.FORMS:
        ours = solve(kept, removed, Config(nonneg=True, form=form, alpha1=0.3))
        assert (ours >= 0).all()
        for j in range(4):
            root = np.sqrt(0.3) * (abs(float(removed.gain[j])) if form == "paper" else 1.0)
            stack = np.vstack([kept.r.T.numpy(), root * kept.k.numpy()])
            best = scipy.optimize.nnls(stack, np.append(removed.r[j].numpy(), root * float(removed.k[j])))[0]
            assert np.allclose(ours[:, j], best, atol=1e-10)


def test_degenerate_filters_give_finite_coefficients():
    kept, removed = random_filters(5, 9, 11), random_filters(3, 9, 12)
    kept.r[0], kept.gain[1], kept.r[1] = 0.0, 0.0, 0.0  # a dead filter; gamma_i = 0
    removed.r[0], removed.gain[1], removed.r[1] = 0.0, 0.0, 0.0  # a dead filter; gamma_j = 0
    for config in (PLAIN, Config(form="folded"), Config(alpha1=0.0), Config(nonneg=True)):
        assert solve(kept, removed, config).isfinite().all()
    silent = Filters(torch.zeros(5, 9), torch.zeros(5), torch.zeros(5))
    silent = Filters(*(part.double() for part in vars(silent).values()))
    assert torch.equal(solve(silent, removed, PLAIN), torch.zeros(5, 3, dtype=torch.float64))
    constant = solve(kept, removed, PLAIN)[:, 1]  # gamma_j = 0 matches the bias alone, by the folded weight
    stack = np.vstack([kept.r.T.numpy(), 0.1 * kept.k.numpy()])
    target = np.append(np.zeros(9), 0.1 * float(removed.k[1]))
    assert np.allclose(constant, np.linalg.lstsq(stack, target, rcond=None)[0], atol=1e-10)
