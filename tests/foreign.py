"""Small networks written as people write them. A module of its own: pytest rewrites the assertions of its tests."""

import torch
import torch.nn.functional as F
from torch import nn


class Net(nn.Module):
    """conv a (3 -> 8, 8 x 8) -> `run`, which may use all of `layers` -> whatever it returns."""

    def __init__(self, run, **layers):
        super().__init__()
        self.run, self.a = run, nn.Conv2d(3, 8, 3, padding=1)
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x, return_features=False, scale=None, *more, **other):
        assert x.ndim == 4 and x.shape[1] == 3, "pictures expected"
        if x.size(0) < 1:
            raise ValueError(f"{x.size(0)} pictures are too few")
        features = self.a(x)
        return (self.run(self, features), features) if return_features else self.run(self, features)


def b(out=8):
    return nn.Conv2d(8, out, 1)


def shuffled(x, groups=2):
    n, c, h, w = x.size()
    return torch.transpose(x.view(n, groups, c // groups, h, w), 1, 2).contiguous().view(n, c, h, w)


def halves(m, x):
    left, right = x.chunk(2, 1)
    return m.b(torch.cat([right, left.relu()], 1))


def gated(m, x):
    return m.b(x * torch.sigmoid(m.g(F.silu(x.mean((2, 3), keepdim=True)))))


def tokens(m, x):
    n, c, h, w = x.shape
    x = x.reshape(n, c, h * w).permute(0, 2, 1)
    x = torch.cat([m.token.expand(n, -1, -1), x], dim=1) + m.place
    x = x + m.attention(m.norm(x), m.norm2(x), x, need_weights=False)[0]
    return m.f(m.h(F.gelu(m.e(x)))[:, 0] + x.mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.LSTM(8, 5, batch_first=True)

    def forward(self, x):
        out, (h, c) = self.cell(x.flatten(2).transpose(1, 2))
        return out[:, -1] + h[0] * c[-1]


class Branching(nn.Module):
    def forward(self, x):
        return x.relu() if x.mean() > 0 else -x


NETS = {
    "view": (lambda m, x: m.f(x.relu().view(x.size(0), -1)), {"f": nn.Linear(512, 4)}),
    "view of sizes": (lambda m, x: m.f(x.view(-1, 512)), {"f": nn.Linear(512, 4)}),
    "reshape": (lambda m, x: m.f(torch.reshape(x, (x.shape[0], -1))), {"f": nn.Linear(512, 4)}),
    "flatten of two": (lambda m, x: m.b(x.flatten(2).unflatten(2, (8, 8))), {"b": b()}),
    "cat": (lambda m, x: m.b(torch.cat([x.relu(), x], 1)), {"b": nn.Conv2d(16, 4, 1)}),
    "cat of itself": (lambda m, x: m.b(torch.cat((x, x), dim=1)), {"b": nn.Conv2d(16, 4, 1)}),
    "cat of a sum and a pool": (lambda m, x: m.b(torch.cat([m.c(x) + x, F.avg_pool2d(x, 3, 1, 1)], 1).relu()),
                                {"b": nn.Conv2d(16, 4, 1), "c": b()}),
    "cat, norm": (lambda m, x: m.b(m.n(torch.cat([x, m.c(x)], 1)).relu()),
                  {"b": nn.Conv2d(16, 4, 1), "c": b(), "n": nn.BatchNorm2d(16)}),
    "chunk": (halves, {"b": b()}),
    "split": (lambda m, x: (lambda p: m.b(torch.cat([p[1], p[0], p[2]], 1)))(torch.split(x, [2, 3, 3], 1)),
              {"b": b()}),
    "split, one part": (lambda m, x: m.b(torch.cat(torch.split(x, [2, 3, 3], 1)[:2], 1)), {"b": nn.Conv2d(5, 4, 1)}),
    "slices": (lambda m, x: m.b(x[:, :, 1:-1, ::2]) + m.b2(x[:, ::2, 1:7, :4]), {"b": b(), "b2": nn.Conv2d(4, 8, 1)}),
    "shuffle": (lambda m, x: m.b(shuffled(m.c(x.relu())).relu()), {"b": b(), "c": b()}),
    "relu6": (lambda m, x: m.b(m.r(m.d(m.r2(x)))), {"b": b(), "r": nn.ReLU6(), "r2": nn.Hardtanh(-0.2, 0.3, True),
                                                    "d": nn.Conv2d(8, 8, 3, padding=1, groups=8)}),
    "clamps": (lambda m, x: m.b(F.relu6(x.clamp(max=0.4).clamp_min(-0.3))), {"b": b()}),
    "curves": (lambda m, x: m.b(m.s(m.c(m.t(x)))), {"b": b(), "c": b(), "s": nn.SiLU(), "t": nn.Hardswish(True)}),
    "gate": (gated, {"b": b(), "g": b()}),
    "normalised": (lambda m, x: m.b((x - m.mean) / m.std), {"b": b(), "mean": nn.Parameter(torch.full((8, 1, 1), 0.1)),
                                                            "std": nn.Parameter(torch.full((8, 1, 1), 0.3))}),
    "softmax": (lambda m, x: F.log_softmax(m.f(x.mean([-2, -1])), dim=1), {"f": nn.Linear(8, 4)}),
    "pads": (lambda m, x: m.b(F.pad(m.z(x), (0, 1, 2, 0))) + m.b(F.pad(x, (1, 1, 2, 2), "reflect"))[..., 1:],
             {"b": b(), "z": nn.ZeroPad2d((0, 0, 1, 1))}),
    "pads once": (lambda m, x: m.b(F.pad(m.z(x), (1, 1, 2, 2), "reflect")),
                  {"b": b(), "z": nn.ZeroPad2d((0, 2, 1, 1))}),
    "nearest": (lambda m, x: m.b(F.interpolate(x, scale_factor=2)), {"b": b()}),
    "bilinear": (lambda m, x: m.b(F.interpolate(x, size=(5, 6), mode="bilinear", align_corners=False)), {"b": b()}),
    "pixel shuffle": (lambda m, x: m.b(F.pixel_shuffle(x, 2)), {"b": nn.Conv2d(2, 4, 1)}),
    "in place": (lambda m, x: (lambda y: m.b(m.r(y)) + m.b2(y))(m.c(x)),
                 {"b": b(), "b2": b(), "c": b(), "r": nn.ReLU(inplace=True)}),
    "grouped": (lambda m, x: m.b(m.g(x)), {"b": nn.Conv2d(12, 4, 1), "g": nn.Conv2d(8, 12, 3, groups=4)}),
    "channels last": (lambda m, x: m.f(x.permute(0, 2, 3, 1)).relu().mean((1, 2)), {"f": nn.Linear(8, 6)}),
    "tokens": (tokens, {"token": nn.Parameter(torch.randn(1, 1, 8)), "place": nn.Parameter(torch.randn(1, 65, 8)),
                        "attention": nn.MultiheadAttention(8, 2, batch_first=True), "norm": nn.LayerNorm(8),
                        "norm2": nn.LayerNorm(8), "e": nn.Linear(8, 16), "h": nn.Linear(16, 8), "f": nn.Linear(8, 4)}),
    "recurrent": (lambda m, x: m.f(m.r(x)), {"r": Recurrent(), "f": nn.Linear(5, 4)}),
    "branching": (lambda m, x: m.b(m.o(x)), {"b": b(), "o": Branching()}),
    "transposed": (lambda m, x: m.b(m.t(x)), {"b": b(), "t": nn.ConvTranspose2d(8, 8, 2, 2)}),
    "called twice": (lambda m, x: m.b(m.c(m.c(x))), {"b": b(), "c": b()}),
    "no part of the output": (lambda m, x: (m.b(x), m.f(x.mean((2, 3))))[1], {"b": b(), "f": nn.Linear(8, 4)}),
}
