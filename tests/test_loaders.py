"""Loaders as people have them: what is read, what is refused in one line before any training, unknown lengths."""

from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from methods import deep_compression as dc
from methods.core.budget import Budget
from methods.core.errors import CompressError, ConfigError
from methods.core.train.finetune import Recipe, train
from methods.core.train.loaders import LoaderBatches, call, cut, describe, first_batch, read_batch, size_of
from methods.core.train.task import Task

X, Y = torch.arange(24.0).reshape(4, 6), torch.tensor([0, 1, 2, 0])
SHORT = dc.Config(rounds=1, retrain=Recipe(1, 1e-3), tune=Recipe(1, 1e-4))


class Stream(IterableDataset):
    def __init__(self, n):
        self.n = n

    def __iter__(self):
        return iter([(X[0], 1)] * self.n)


@pytest.mark.parametrize("batch", [
    (X, Y), [X, Y], (X, Y.int()), (X, Y.to(torch.uint8)), (X, Y.tolist()), (X.numpy(), Y.numpy()), (X.double(), Y),
    (X.half().numpy(), Y.numpy().astype(np.int16)), (X.tolist(), Y)])
def test_pairs_of_any_number_type_are_read(batch):
    inputs, targets = read_batch(batch)
    assert inputs.dtype == torch.float32 and torch.equal(inputs, X)
    assert targets.dtype == torch.int64 and torch.equal(targets, Y)


def test_what_is_kept_as_it_is():
    assert read_batch((X.long(), Y))[0].dtype == torch.int64  # indices of an embedding
    assert read_batch((X, Y > 0))[1].dtype == torch.bool and read_batch((X, X.double()))[1].dtype == torch.float32
    inputs, targets = read_batch((X, {"box": X.double(), "names": ["a"]}))
    assert targets["box"].dtype == torch.float32 and targets["names"] == ["a"]


@pytest.mark.parametrize("batch, said", [
    ({"image": X, "label": Y}, r"not a dict of image, label; unpack= takes a function"), ((X, Y, Y), "a tuple of 3"),
    (X, r"float32 \[4, 6\]"), ((X,), "a tuple of 1"), ((X, "cat"), "a tuple of 2"), (None, "a NoneType"),
    (([], Y), "of 2"), ("ab", "a str")])
def test_other_batches_are_refused_in_one_line(batch, said):
    with pytest.raises(ConfigError, match=said) as caught:
        read_batch(batch)
    assert "\n" not in str(caught.value)


def test_unpack_reads_any_batch():
    assert torch.equal(read_batch({"x": X, "y": Y.int()}, lambda b: (b["x"], b["y"]))[1], Y)
    with pytest.raises(ConfigError, match=r"unpack cannot read a dict of x, y: 'z'"):
        read_batch({"x": X, "y": Y}, lambda b: b["z"])
    with pytest.raises(ConfigError, match=r"unpack must return \(inputs, targets\).*not float32"):
        read_batch({"x": X, "y": Y}, lambda b: b["x"])


def test_several_inputs_reach_the_network():
    collated = next(iter(DataLoader([((X[i], X[i]), Y[i]) for i in range(4)], batch_size=4)))
    inputs, targets = read_batch(collated)  # a DataLoader makes lists of tuples
    assert torch.equal(call(lambda a, b: a + b, inputs), 2 * X) and torch.equal(targets, Y)
    assert torch.equal(call(lambda *, a, b: a - b, {"a": X, "b": X}), X - X) and call(len, [X, X]) == 2
    assert size_of(inputs) == 4 and size_of(cut(inputs, 3)) == 3


def test_describe_is_one_short_line():
    assert describe((X, {"a": 1}, "b\nc")) == "a tuple of 3 (float32 [4, 6], a dict of a, a str)"
    assert describe(OrderedDict(k=1)) == "a OrderedDict of k"


def test_a_loader_without_a_length_says_how_many_batches_or_is_refused():
    stream = DataLoader(Stream(24), batch_size=8)
    with pytest.raises(ConfigError, match=r"a DataLoader without a length needs steps.*steps = None"):
        Task.from_loader(stream, stream)
    task = Task.from_loader(stream, stream, steps=3)
    assert len(task.train) == 3 and len(list(task.train.epoch(None))) == 3
    assert len(list(LoaderBatches(stream, steps=2).epoch(None))) == 2
    assert torch.equal(first_batch(task.train)[0], X[:1].expand(8, 6))
    assert first_batch(LoaderBatches([])) is None


def test_a_pass_that_gives_fewer_batches_than_announced_is_refused():
    for loader in (DataLoader(Stream(16), batch_size=8), iter([(X, Y)] * 3)):
        task = Task.from_loader(loader, [], steps=3)
        with pytest.raises(ConfigError, match=r"gave [02] batches in an epoch, of 3 that were announced"):
            train(nn.Linear(6, 3), task, Recipe(2, 0.01), torch.Generator())


def test_a_loader_that_gives_more_than_its_length_stops_there():
    class Long(list):
        def __len__(self):
            return 2

    assert len(list(LoaderBatches(Long([(X, Y)] * 5)).epoch(None))) == 2


@pytest.mark.parametrize("batch, loss, said", [
    ((X[:, :5], Y), None, r"Sequential cannot take the inputs of the training data, float32 \[4, 5\]"),
    ((X, Y.float()), None, r"the loss cannot take outputs float32 \[4, 3\] and targets float32 \[4\]"),
    ((X, Y), lambda o, t: (o.argmax(1) == t).float().mean(), "the loss has no gradient"),
    ((X, Y), lambda o, t: o.sum(1), r"the loss of a batch is float32 \[4\]"),
    ((X, Y), lambda o, t: 1.0, "the loss of a batch is a float"),
    ((X, Y), lambda o: o.sum(), r"the loss takes \(o\)"),
    ({"x": X}, None, "a batch must be")])
def test_what_cannot_work_is_said_before_any_training(batch, loss, said, monkeypatch):
    monkeypatch.setattr(dc, "train", lambda *_, **__: pytest.fail("it trained"))
    with pytest.raises(CompressError, match=said) as caught:
        task = Task.from_loader([batch], [batch], **({} if loss is None else {"loss": loss}))
        dc.compress(nn.Sequential(nn.Linear(6, 3)), task, Budget(density=0.5, bits=4), SHORT, torch.Generator())
    assert "\n" not in str(caught.value)


def test_label_smoothing_without_classes_is_refused_before_any_training():
    config = dc.Config(rounds=1, retrain=Recipe(0, 1e-3), tune=Recipe(1, 1e-4, label_smoothing=0.1))
    task = Task.from_loader([(X, X[:, :3])], [], loss=nn.functional.mse_loss)
    with pytest.raises(ConfigError, match="label_smoothing = 0.1 needs outputs"):
        dc.compress(nn.Sequential(nn.Linear(6, 3)), task, Budget(density=0.5, bits=4), config, torch.Generator())
