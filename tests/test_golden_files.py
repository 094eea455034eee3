"""Files written once, kept as text: what they mean may never change."""

import base64

import pytest
import torch

from methods.core.artifact import (
    ActivationQuantizer,
    Affine,
    Codebook,
    CompressedModel,
    CompressedTensor,
    Levels,
    Topology,
    Window,
)
from methods.core.file.storage import from_bytes

MODES = ("paper", "best")


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def assert_same(a, b):
    assert list(a.weights) == list(b.weights) and list(a.rest) == list(b.rest)
    for name, one in a.weights.items():
        two = b.weights[name]
        assert torch.equal(one.mask, two.mask) and torch.equal(one.codes, two.codes) and one.bits == two.bits
        assert torch.equal(one.decode().view(torch.int32), two.decode().view(torch.int32))
        assert type(one.grid) is type(two.grid) and one.codes.dtype == two.codes.dtype
        for field, value in vars(one.grid).items():
            other = getattr(two.grid, field)
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other)), field
            assert getattr(value, "dtype", None) == getattr(other, "dtype", None), field
    for name, one in a.rest.items():
        two = b.rest[name]
        assert one.shape == two.shape and one.dtype == two.dtype
        assert one.contiguous().numpy(force=True).tobytes() == two.numpy(force=True).tobytes() if (
            one.dtype != torch.bfloat16) else torch.equal(one.view(torch.int16), two.view(torch.int16))
    assert (a.activations, a.windows, a.topology, a.ranges_by) == (b.activations, b.windows, b.topology, b.ranges_by)


def golden_model():
    """A model defined by arithmetic, not by a random generator; it takes every coder of both modes."""
    n = torch.arange(480)
    mask = (n * n % 19 < 3).reshape(12, 40)
    skewed = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 3]).int()[n * n * 7 % 11]
    weights = {
        "fc1": CompressedTensor.of(skewed.reshape(12, 10, 2, 2) * 2 - 3, Affine(torch.tensor(0.5), ints(-3)[0]), 3),
        "fc2": CompressedTensor.of(skewed.reshape(12, 40), Levels(torch.tensor(0.25), ints(-3, -1, 1, 3)), 2, mask),
        "fc3": CompressedTensor.of((n[:64] // 8).reshape(8, 8), Codebook(torch.arange(8) / 4), 3),
    }
    return CompressedModel(weights, {"fc2.bias": torch.arange(3) / 8, "steps": torch.tensor(3)},
                           {"fc1": ActivationQuantizer(0.5)}, {"fc1": Window(4, (0, 2, 4))}, Topology({"fc1": "bn1"}))


def newer_golden_model():
    """The same with what version 2 added: classes of rows, 16-bit scales, fields of floats, implied biases, widths."""
    old, n = golden_model(), torch.arange(2400)
    mask = ((n // 60 % 4 == 1) & (n % 5 < 2) & (n * n % 31 < 16)).reshape(40, 60)
    fc4 = CompressedTensor.of((n % 3).reshape(40, 60) - 1, Affine(torch.tensor(0.30078125), ints(-2)[0]), 3, mask)
    rest = {"fc1.bias": torch.arange(12) / 7, **old.rest, "norm": torch.arange(40) ** 2 / 3}
    return CompressedModel({**old.weights, "fc4": fc4}, rest, old.activations, old.windows,
                           Topology({"fc1": "bn1"}, {"fc4": (40, 60), "bn1": (12, 12)}))


GOLDEN = {
    "paper":
        "ikpDTQEATIPRQKOUQG7WMTTQMdIBuh/oXpCoEUTUBOgvI4iIMVDEQscCpCJWB2oaUB3McpBotFJxSWoBiBcLUgOODoiIFVosgKy1UgL6SKm2FgAI"
        "AAAAPwAFDt0CBQApKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpCQMEBQEAEAAsGBgYGBgYGBgYGBgYGBgYGBgYGBgY"
        "GBgYGBgYGBgYGBgYGBgYGBgYGBgYGBgBAACAPgQNBRANDn8DAAgBAAAACBCMMcYYY4wxxhhjjDHGGGMMAwEFYQgwAB6LFfupqPFFOysq/lGjxYr9"
        "VNT4op0VFf+o0WLFfioCCAAAAAAAAIA+AAAAPwAAQD8AAIA/AACgPwAAwD8AAOA/DjkDAAgBAAAACAgBAAAAAAAAAA0ASJIkkSRJ2rZtI0mSbNu2"
        "tW3b/v//BxmLNtCBOcRCx0DHAGQQlG+iEw1ylgnY0lgAAAAAPwAAAAAAAAAAPgAAgD4DAAAAAAAAALuZpBzY5kUP",
    "best":
        "ikpDTQEBTIPRQKOUQG7WMTTQMdIBuh/oXpCoEUTUBOgvI4iIMVDEQscCpCJWB2oaUB3McpBotFJxSWoBiBcLUgOODoiIFVosgKy1UgL6SKm2FgAI"
        "AAAAPwAFC90CggAESWQi4B0KtgVLnboIkmTE3qFNOqJgCGuF5cxsO/VE6OgAGA2pXYIEBQkABySU2p4Q85mKVFB4aTDciaLcS8z2O+CcvA9a99vP"
        "hD3Z6ZuNd2sBAACAPgQNBRANFk1iABEHAAAAAAAGCVkLIFj/bEo/mmIABDUKDhN77GFvG6J8LL/RxQFlAggAAAAAAACAPgAAAD8AAEA/AACAPwAA"
        "oD8AAMA/AADgPwANAAAAAEmSJJIkSdu2bSRJkm3btrZt2////xmLNtCBOcRCx0DHAGQQlG+iEw1ylgnY0lgAAAAAPwAAAAAAAAAAPgAAgD4DAAAA"
        "AAAAACgpSWJwxxMW",
}
GOLDEN_2 = (
    "ikpDTQIBbl2RvQ6AIAyE34W5A1ZiSN+F0dGfqJOJ7+5dAQcnuA9yufb6CavAzDJEUUF+5CXVShPm0kpGkCz5+5GgU5QpkhRp/vDrcbCN5tXJ6OC8"
    "5p3KxbodixsVeniB9d1+vTGoBeyAxEvk3Ty6FrA7WH5eKAA4AAUL3QKCAARJZCLgHQq2BUudugiSZMTeoU06omAIa4XlzGw79UTo6AAYDaldggQF"
    "CQAHJJTanhDzmYpUUHhpMNyJotxLzPY74Jy8D1r328+EPdnpm413ayEANAQNBRANFk1iABEHAAAAAAAGCVkLIFj/bEo/mmIABDUKDhN77GFvG6J8"
    "LL/RxQFlIggAAAA0ADgAOgA8AD0APgA/AA0AAAAASZIkkiRJ27ZtJEmSbdu2tm3b////KNA0AAMFBQAiIiIiIgUAY4wxxhhjjAEANh3A0WjM7nHK"
    "PBtbMyJL6KGu6Dal4v0uge8fE6LZVGYCA7sMHSgPs+h02rhgI0z/sssnrdjwTUe+6Lj3dWUHbcPdGYs20IF5ykLHQMcAZAeUb6ITDfKiCdi5sQAA"
    "AAA/AeAA4wCVXQAAaIem+/2QGzHDvfC1YTWojZyk9hDhpWxCR8tRk7/cf9lYgY3V0PTnWvKeQpUprQcK1IE14Ke9QeirI1NqpwOv9cYLtQvi1GUB"
    "9u4e38SGRbR3ZXJt436eXBS8N4cyoObYt1FGeKb3rBbXvRSw1F5TrOwfGL7FRo9C49OQyepZ1gj/1hp9ZDIgz9A+7LQdqjcJRE4AAAAckkHVoOcs"
    "7Q=="
)


GOLDEN_3 = (
    "ikpDTQMBLYPRQKOUQG7WMTTQMdIBut84NhYaUiApKyWgraCwSwGqVoI6FKhDCRQwSrG1ACgAOAAFC90CggAESWQi4B0KtgVLnboIkmTE3qFNOqJg"
    "CGuF5cxsO/VE6OgAGA2pXYIEBQkABySU2p4Q85mKVFB4aTDciaLcS8z2O+CcvA9a99vPhD3Z6ZuNd2sAAHkeRWPo8WIc"
)


@pytest.mark.parametrize("mode", MODES)
def test_files_of_version_1_stay_readable(mode):
    assert_same(golden_model(), from_bytes(base64.b64decode(GOLDEN[mode])))


def test_files_of_this_version_stay_readable():
    """Whoever changes the format raises VERSION; a new release of a library must not change it unnoticed."""
    assert_same(newer_golden_model(), from_bytes(base64.b64decode(GOLDEN_2)))
    removed = Topology({"fc1": "bn1"}, removed=("layer1.1", "head"))
    assert_same(CompressedModel({"fc1": golden_model().weights["fc1"]}, {}, topology=removed),
                from_bytes(base64.b64decode(GOLDEN_3)))
