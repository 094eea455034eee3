"""The mu of weights that follows the bytes of the file: how a `size_ratio` is met by one training.

mu is a price, and what file it leads to is known only when the training is over. Instead of a training for each mu,

    every 8 steps:  mu *= (bits of all codes / wanted)^0.2, by a tenth at most
        wanted falls from what the start takes to the budget over the first half of phase 1, then stays
    after each epoch: the file as it would be now is weighed, and the goal corrected by what it takes
    once it fits, each gate is set to what it is at test time, and the rest of phase 1 trains weights and ranges

A gate needs a hundred steps or so to close, and those of bits stay closed. So the bits that turn mu are those of where
the logits will be in 64 steps if they go on as in the last 8: looked at as they are, mu rises for as long as nothing
has closed yet, and then all closes at once. For the same reason gates are set as soon as the file fits: those that are
on their way would go on, below what was asked for, and a lower mu does not open them again.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..core.artifact import MAX_BITS
from ..core.fit.rates import between, entropy_bits, steered
from .gated import thresholded, to_codes
from .network import GatedNetwork

EVERY, AHEAD, FALLING, POWER = 8, 64, 0.5, 0.2  # see above
AIM = 0.9  # of the budget: what codes take goes on rising when the gates are set, and weights that have to go after the
# training cost more than bytes that are left
SET = 12.0  # |logit| of a gate that is set: closed in 1 draw of 800,000, open in 1 of 30,000


@torch.no_grad()
def coded_bits(network: GatedNetwork, phi: Tensor, phi2: Tensor) -> float:
    """The bits that all weights take with these logits thresholded: codes by their own entropy, 32 of a float.

    Not counted: channels whose gate is closed, and the weights that read such a channel of the layer before.
    """
    kept, total = network.kept_channels(phi2), 0.0
    weights, feeders = network.folded_weights(), network.wiring.feeders
    for point, bits, beta in zip(network.points, network.widths(phi), network.beta, strict=True):
        if not point.weight:
            continue
        weight = weights[point.name]
        for dim, layer in enumerate((point.name, feeders.get(point.name))):
            mask = kept.get(layer)
            if mask is not None and len(mask) == weight.shape[dim]:  # a flattened channel is several columns
                weight = weight.index_select(dim, mask.nonzero().flatten())
        if bits > MAX_BITS:
            total += 32.0 * weight.numel()
        else:
            codes = to_codes(weight, beta, point.signed, bits).flatten()
            total += entropy_bits(torch.bincount(codes - codes.min())) if len(codes) else 0.0
    return total


class Steering:
    """mu, turned after the bits of the codes.

    limit    bytes of the file;  total  steps of phase 1;  weigh  bytes of the file of a network as it is now
    """

    def __init__(self, mu: float, limit: int, total: int, network: GatedNetwork, weigh: Callable[[GatedNetwork], int]):
        self.mu, self.limit, self.falling, self.weigh = mu, limit, FALLING * total, weigh
        self.steps, self.goal, self.settled = 0, 0.0, False
        self.last = network.phi.detach().clone(), network.phi2.detach().clone()
        self.correct(network)
        self.start = max(coded_bits(network, *self.last), self.goal)

    def correct(self, network: GatedNetwork) -> None:
        """The goal, in bits of codes, after what the file takes for those that there are."""
        now = max(coded_bits(network, network.phi, network.phi2), 1.0)
        self.goal = now * AIM * self.limit / self.weigh(network)

    def wanted(self) -> float:
        return between(self.start, self.goal, self.steps, self.falling)

    def step(self, network: GatedNetwork) -> None:
        self.steps += 1
        if self.settled or self.steps % EVERY:
            return
        if coded_bits(network, network.phi, network.phi2) <= self.goal:
            self.settle(network)
            return
        now = network.phi.detach().clone(), network.phi2.detach().clone()
        ahead = [x + AHEAD / EVERY * (x - before) for x, before in zip(now, self.last, strict=True)]
        self.last = now
        self.mu *= steered(coded_bits(network, *ahead), self.wanted(), power=POWER)

    @torch.no_grad()
    def settle(self, network: GatedNetwork) -> None:
        self.settled = True
        for phi in (network.phi, network.phi2):
            phi.copy_(torch.where(thresholded(phi).bool(), SET, -SET))

    def state(self) -> dict:
        return {key: getattr(self, key) for key in ("mu", "steps", "start", "goal", "settled", "last")}

    def restore(self, state: dict) -> None:
        for key in ("mu", "steps", "start", "goal", "settled"):
            setattr(self, key, state[key])
        self.last = tuple(x.to(self.last[0].device) for x in state["last"])
