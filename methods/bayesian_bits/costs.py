"""What gates cost in bit operations: expected, in the loss; and thresholded, as the paper reports it."""

import torch
from torch import Tensor

from .gated import WIDTHS, log_open_probability
from .network import GatedNetwork
from .stored import INPUT_BITS


def gate_costs(network: GatedNetwork) -> Tensor:
    """[Q, 5] of each point: kappa_k (2, 4, 8, 16, 32), the price of its gates.

    Without pruning gates the first is 1, a constant; what a fixed width costs is constant too and joins the first.
    """
    rows = []
    for point in network.points:
        costs = [1.0] * 4 if point.kappa is None else [point.kappa * b for b in WIDTHS]
        base = 2 * point.kappa if point.channels else 1.0
        if point.bits is not None:
            base += sum(cost for cost, b in zip(costs, WIDTHS, strict=True) if b <= point.bits)
            costs = [0.0] * 4
        rows.append([base, *costs])
    return torch.tensor(rows, device=network.beta.device)


def regulariser(network: GatedNetwork, costs: Tensor) -> Tensor:
    """sum_k kappa_k E[2 q2 + 4 q2 q4 + 8 q2 q4 q8 + ...], with the mean of q2 over channels."""
    q = log_open_probability(network.phi).cumsum(1).exp()  # q4, q4 q8, q4 q8 q16, q4 q8 q16 q32
    q2 = {layer: part.mean() for layer, part in network.per_layer(log_open_probability(network.phi2).exp()).items()}
    kept = torch.stack([q2[p.name] if p.channels else costs.new_ones(()) for p in network.points])
    return (kept * (costs[:, 0] + (q * costs[:, 1:]).sum(1))).sum()


def relative_bops(network: GatedNetwork) -> float:
    """Percent of the bit operations at 32 x 32 bits, MACs b_w b_a p_out p_in, with thresholded gates."""
    bits = network.widths()
    kept = {layer: float(mask.double().mean()) for layer, mask in network.kept_channels().items()}
    total, wiring = 0.0, network.wiring
    for layer, macs in wiring.macs.items():
        read = network.at.get((False, wiring.sources[layer][0]))
        b_w, b_a = bits[network.at[True, layer]], INPUT_BITS if read is None else bits[read]
        total += macs * b_w * b_a * kept.get(layer, 1.0) * kept.get(wiring.feeders.get(layer), 1.0)
    return 100 * total / (32 * 32 * sum(wiring.macs.values()))
