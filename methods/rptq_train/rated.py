"""Weights that are read through a quantizer with prices, and the hook that sets the prices while they train."""

import copy
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..core.fit.rates import LAM, MOST, between, entropy_bits, magnitude_bits, steered, thresholds
from ..core.graph.fold import norm_ratio, norms_after
from ..core.graph.graph import trace
from ..core.graph.live import live_and_constant
from ..core.graph.weights import layer_of, place_of, weight_layers
from ..core.train.hooks import Hooks

EVERY = 8  # steps between two looks at the codes
ROUNDS = 3  # prices follow codes and codes prices at each look: with fewer the steering runs behind and overshoots
TINY = 1e-12
TOP = (1 << 15) - 1  # largest code


class Rated(nn.Module):
    """Parametrization w -> sign(w) code(|w| / step) step, with a straight-through gradient.

    step   one number, or [C_out], kept as [C_out, 1, ...];  edges [top] thresholds that count the code;  first
    [C_out, C_in, 1, ...] those of code 1, where contexts price each place on its own, else empty
    bits   [top + 1] of each magnitude; zero, other [C_out, C_in] of "is 0" and "is not", in contexts
    live   bool, shape of the weight: elsewhere the code is 0 and no file holds it
    held   bool, shape of the weight: elsewhere the code is 0, there it is not; empty before `hold`
    """

    def __init__(self, weight: Tensor, step: float | Tensor, contexts: bool):
        super().__init__()
        flat = [1] * (weight.ndim - 1)
        self.register_buffer("step", torch.as_tensor(step).float().cpu().expand(len(weight)).reshape(-1, *flat).clone())
        top = min(max(2 * int((weight.abs().cpu() / self.step).max().round()), 7), TOP)
        self.register_buffer("edges", torch.arange(top) + 0.5)
        self.register_buffer("live", torch.ones_like(weight, dtype=torch.bool, device="cpu"))
        self.register_buffer("held", torch.empty(0, dtype=torch.bool), persistent=False)
        bits, one = self.edges.new_zeros(top + 1), weight.new_zeros(1, 1)
        for name, value in (("bits", bits), ("zero", one), ("other", one)):
            self.register_buffer(name, value, persistent=False)
        self.register_buffer("first", torch.full((*weight.shape[:2], *flat[1:]), 0.5) if contexts else torch.empty(0))

    def codes(self, weight: Tensor) -> Tensor:
        """Signed codes, as float32."""
        size = (weight.detach().abs() / self.step).contiguous()  # channels_last is no order for bucketize
        codes = torch.bucketize(size, self.edges, right=True)
        if self.first.numel():
            codes = torch.where(size >= self.first, codes.clamp_min(1), 0)
        if self.held.numel():
            codes = torch.where(self.held, codes.clamp_min(1), 0)
        return codes * weight.detach().sign() * self.live

    def hold(self, weight: Tensor) -> None:
        """From now on what is 0 in `weight` stays 0, and nothing else becomes it."""
        self.held = self.codes(weight) != 0

    def above(self, weight: Tensor) -> Tensor:
        """How far |w| / step is above the threshold of code 1."""
        edge = self.first if self.first.numel() else self.edges[0]
        return weight.detach().abs() / self.step - edge

    def forward(self, weight: Tensor) -> Tensor:
        return (self.codes(weight) * self.step) + (weight - weight.detach())  # value of the first term, exactly

    def price(self, weight: Tensor) -> float:
        """Set what codes cost after those of `weight`; returns the bits that these take."""
        total, prices = self.counted(weight)
        for name, value in prices.items():
            setattr(self, name, value)
        return total

    def counted(self, weight: Tensor) -> tuple[float, dict[str, Tensor]]:
        """The bits that the codes of `weight` take, the live ones, and the prices {buffer: values} after them."""
        codes = self.codes(weight)
        counts = torch.bincount(codes.abs().long().reshape(-1), minlength=len(self.edges) + 1)
        counts[0] -= self.live.numel() - self.live.sum()
        signs = float(counts[1:].sum())
        if not self.first.numel():
            return entropy_bits(counts) + signs, {"bits": magnitude_bits(counts)}
        counts[0] = 0  # bits are those among codes that are not 0
        zero, other = zero_bits(codes != 0)
        places, kept = (where.reshape(*codes.shape[:2], -1).sum(2) for where in (self.live, codes != 0))
        return (float((kept * other + (places - kept) * zero).sum()) + entropy_bits(counts) + signs,
                {"bits": magnitude_bits(counts), "zero": zero, "other": other})

    def charge(self, lam: float) -> None:
        """Set the thresholds for `lam` and the prices of the codes."""
        if not self.first.numel():
            self.edges = thresholds(self.bits, lam)
            return
        self.edges = torch.cat([self.edges.new_tensor([0.5]), thresholds(self.bits[1:], lam) + 1])
        jump = (self.other - self.zero + self.bits[1]).clamp_min(0)
        self.first = (0.5 + lam / 2 * jump).reshape(self.first.shape)


def zero_bits(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Bits [C_out, C_in] of "is 0" and of "is not" after the use of rows and columns in `kept` [C_out, C_in, ...]."""
    used = kept.reshape(*kept.shape[:2], -1).float().mean(2)
    half = 0.5 / kept[0, 0].numel()
    row, column = used.mean(1, keepdim=True), used.mean(0, keepdim=True)
    row, column = row + half / used.shape[1], column + half / used.shape[0]
    p = (row * column / (used.mean() + half / used.numel())).clamp(TINY, 0.5)
    return -(1 - p).log2(), -p.log2()


class RateAware(Hooks):
    """Trains a model whose weights are read through `Rated`; use as a context around `train`.

    units    {layer: step of the folded weight};  goal  bits of all codes at the end;  falling  steps until then
    settling  step from which prices stay: weights gather at the thresholds, and these must not move away from them.
             lam may rise, so that the size stays below the goal
    holding  step from which zeros stay, and no more come
    damping  how fast weights go back to the value of their code, in units of the learning rate
    weigh    bytes of the file as it would be now; `limit` bytes are what it may take: after each epoch the goal is
             corrected by what the file takes besides and less, and codes that reach no output are gone for good: else
             the bytes that they leave to others would be spent twice when they come back. None: never
    lam, entropy   price of a bit in units of step^2, and the bits of all codes when they were looked at last
    Inside the context the weights are parametrized; on leaving it they are the float weights behind the codes.
    """

    def __init__(self, model: nn.Module, units: Mapping[str, float], goal: float, falling: int, contexts: bool, *,
                 settling: float = math.inf, holding: float = math.inf, damping: float = 0.0,
                 weigh: Callable[["RateAware"], int] | None = None, limit: float = 0.0):
        self.model, self.units, self.goal, self.falling = model, dict(units), goal, falling
        self.settling, self.holding, self.damping = settling, holding, damping
        self.weigh, self.limit = weigh, limit
        self.before, self.norms = copy.deepcopy(model).cpu(), norms_after(model)
        self.quantizers = {name: Rated(layer.weight.detach(), self.step_of(name), contexts)
                           for name, layer in weight_layers(model).items()}
        self.lam, self.steps, self.start, self.entropy = LAM, 0, 0.0, 0.0

    def step_of(self, name: str) -> float | Tensor:
        """Of a layer's weight as it is, from that of the folded one: [C_out] where a batch norm follows."""
        if name not in self.norms:
            return self.units[name]
        return self.units[name] / norm_ratio(self.model.get_submodule(self.norms[name])).abs().clamp_min(TINY)

    def __enter__(self):
        for name, quantizer in self.quantizers.items():
            layer = layer_of(self.model, name)
            parametrize.register_parametrization(*place_of(layer), quantizer.to(layer.weight.device))
        self.refresh(steer=False)
        self.start = max(self.entropy, self.goal)
        self.hold()
        return self

    def __exit__(self, *error):
        for name in self.quantizers:
            module, attribute = place_of(layer_of(self.model, name))
            behind = self.behind(name).detach().clone()
            parametrize.remove_parametrizations(module, attribute, leave_parametrized=True)
            setattr(module, attribute, nn.Parameter(behind))

    def bare(self) -> nn.Module:
        """A copy of the model as it was, with the float weights behind the codes and all else as they are now."""
        found = copy.deepcopy(self.before)  # a parametrized module and its copy share a class
        state = {key: value for key, value in self.model.state_dict().items()
                 if "parametrizations" not in key.split(".")}
        modules = list(self.model.named_modules(remove_duplicate=False))  # a layer may have several names
        for name in self.quantizers:
            module, attribute = place_of(layer_of(self.model, name))
            state |= {f"{path}.{attribute}".removeprefix("."): self.behind(name)
                      for path, one in modules if one is module}
        found.load_state_dict(state)
        return found

    def behind(self, name: str) -> Tensor:
        """The float weight of a layer, inside the context."""
        module, attribute = place_of(layer_of(self.model, name))
        return module.parametrizations[attribute].original

    def wanted(self) -> float:
        """Bits of all codes that the steering aims at now."""
        return between(self.start, self.goal, self.steps, self.falling)

    @property
    def settled(self) -> bool:
        return self.steps >= self.settling

    @torch.no_grad()
    def refresh(self, steer: bool = True) -> None:
        """Prices and thresholds of all layers after their weights, and lam after the bits."""
        bits = 0.0
        for name, quantizer in self.quantizers.items():
            if self.settled:
                bits += quantizer.counted(self.behind(name))[0]
                continue
            for _ in range(ROUNDS):
                size = quantizer.price(self.behind(name))
                quantizer.charge(self.lam)
            bits += size
        self.entropy = bits
        if steer:
            self.lam *= steered(bits, self.wanted(), 1.0 if self.settled else 1 / MOST)
            for quantizer in self.quantizers.values():
                quantizer.charge(self.lam)

    def after_step(self, model: nn.Module, lr: float) -> None:
        self.steps += 1
        self.hold()
        if self.steps % EVERY == 0:
            self.damp(lr)
            self.refresh()

    def hold(self) -> None:
        """Hold the zeros, if it is time."""
        for name, quantizer in self.quantizers.items() if self.steps == self.holding else ():
            quantizer.hold(self.behind(name))

    @torch.no_grad()
    def damp(self, lr: float) -> None:
        """Weights a little nearer to what their codes stand for, for the steps since the last look."""
        share = min(EVERY * lr * self.damping, 1.0)
        for name, quantizer in self.quantizers.items() if share > 0 else ():
            weight = self.behind(name)
            weight.lerp_(quantizer.codes(weight) * quantizer.step, share)

    def after_epoch(self, model: nn.Module, epoch: int) -> None:
        if self.weigh is not None and self.steps >= self.falling:
            self.drop_dead()
            self.refresh(steer=False)
            self.goal = max(self.entropy, 1.0) * self.limit / self.weigh(self)

    @torch.no_grad()
    def drop_dead(self) -> None:
        """Codes that can change no output become 0 and stay so; the constant that they add becomes bias."""
        network = self.bare()
        for name, quantizer in self.quantizers.items():
            layer_of(network, name).weight.copy_(quantizer(self.behind(name)))
        for _ in range(2):  # a unit whose readers lost their weights in the first round loses its own in the second
            graph = trace(network)
            for name, (live, constant) in live_and_constant(graph).items():
                if name not in self.quantizers:
                    continue
                layer_of(network, name).weight.mul_(live)
                self.quantizers[name].live &= live.to(self.quantizers[name].live.device)
                for model in (network, self.model) if bool(constant.any()) else ():
                    bias, norm = layer_of(model, name).bias, graph.norm_after(name)
                    if bias is not None:
                        bias.add_(constant.to(bias))
                    else:
                        mean = model.get_submodule(norm).running_mean
                        mean.sub_(constant.to(mean))

    def state(self) -> dict:
        prices = {name: (x.bits, x.zero, x.other, x.held) for name, x in self.quantizers.items()}
        return {**{key: getattr(self, key) for key in ("lam", "steps", "start", "entropy", "goal")}, "prices": prices}

    def restore(self, state: dict) -> None:
        self.lam, self.steps, self.start, self.entropy, self.goal = (
            state[key] for key in ("lam", "steps", "start", "entropy", "goal"))
        for name, prices in state["prices"].items():
            quantizer = self.quantizers[name]
            quantizer.bits, quantizer.zero, quantizer.other, quantizer.held = (
                x.to(quantizer.edges.device) for x in prices)

