"""Every method on a second device, pretended: CPU tensors that are marked, and refuse to meet unmarked ones.

What a real accelerator refuses is refused here: an operation on tensors of two devices, save for scalars, for CPU
indices into a marked tensor and for copies; and `numpy()` of a marked tensor.
"""

import contextlib

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten

from benchmarks.jobs import all_tables
from benchmarks.settings import build
from methods import find_method, method_names
from methods.core.budget import Budget
from methods.core.file.storage import to_bytes
from methods.core.train import finetune
from methods.core.train.finetune import Recipe, train

CPU, OTHER = torch.device("cpu"), torch.device("cuda")  # "cuda" is only a name here: nothing touches a driver
COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)
INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default,
            torch.ops.aten._index_put_impl_.default)


class Marks:
    """Which storages lie on the other device. They are kept alive, so that no address is used twice."""

    def __init__(self):
        self.storages = {}

    def put(self, tensor):
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = storage
        return tensor

    def __contains__(self, tensor):
        return tensor.untyped_storage()._cdata in self.storages


class Refuse(TorchDispatchMode):
    """Passes the mark on to results, and refuses operations that mix devices."""

    def __init__(self, marks):
        super().__init__()
        self.marks = marks

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = [x for x in tree_flatten((args, kwargs or {}))[0] if isinstance(x, torch.Tensor)]
        marked = [x in self.marks for x in given]
        if any(marked) and function not in COPIES:
            indices = function in INDEXING and marked[0]
            plain = [x for x, mark in zip(given, marked, strict=True) if not mark and x.ndim and not indices]
            assert not plain, f"{function} mixes devices: {[(tuple(x.shape), x in self.marks) for x in given]}"
        result = function(*args, **kwargs or {})
        source = marked[0] if function in COPIES else any(marked)
        for tensor in tree_flatten(result)[0] if source else ():
            if isinstance(tensor, torch.Tensor):
                self.marks.put(tensor)
        return result


class Pretend(TorchFunctionMode):
    """Gives marked tensors their device and moves tensors by marking copies."""

    def __init__(self, marks):
        super().__init__()
        self.marks = marks

    def move(self, tensor, device, dtype=None, copy=False, layout=torch.preserve_format):
        here = OTHER if tensor in self.marks else CPU
        if device.type == here.type and not copy and layout is torch.preserve_format:
            return tensor if dtype is None else tensor.to(dtype)
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            fresh = tensor.detach().clone(memory_format=layout)
            fresh = fresh if dtype is None else fresh.to(dtype)
        return self.marks.put(fresh) if device.type == OTHER.type else fresh

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function == torch.Tensor.device.__get__:
            return OTHER if args[0] in self.marks else CPU
        if function is torch.Tensor.numpy:
            assert args[0] not in self.marks, "numpy() of a tensor on the other device"
        if function is torch.Tensor.cpu:
            return self.move(args[0], CPU)
        if function is torch.Tensor.to:
            devices = [x for x in (*args[1:], kwargs.get("device")) if isinstance(x, (torch.device, str))]
            if devices:
                dtypes = [x for x in (*args[1:], kwargs.get("dtype")) if isinstance(x, torch.dtype)]
                return self.move(args[0], torch.device(devices[0]), dtypes[0] if dtypes else None,
                                 kwargs.get("copy", False), kwargs.get("memory_format", torch.preserve_format))
        elif kwargs.get("device") is not None and function is not torch.Generator:
            device = torch.device(kwargs.pop("device"))
            result = function(*args, **kwargs)
            return self.marks.put(result) if device.type == OTHER.type else result
        return function(*args, **kwargs)


@pytest.fixture
def pretend(monkeypatch):
    """A context in which `OTHER` works; it yields the marks."""
    fork = torch.random.fork_rng
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices=(), **more: fork(devices=[], **more))

    @contextlib.contextmanager
    def inside():
        marks = Marks()
        with Pretend(marks), Refuse(marks):
            yield marks

    return inside


def test_the_pretence_refuses_what_a_device_refuses(pretend):
    with pretend() as marks:
        here, there = torch.ones(3), torch.ones(3).to(OTHER)
        assert (there.device, here.device, (2 * there).device) == (OTHER, CPU, OTHER)
        assert torch.equal((there * torch.tensor(2.0)).cpu(), 2 * here) and there[torch.tensor([0])].device == OTHER
        assert torch.zeros(2, device=OTHER) in marks and here.copy_(there).device == CPU
        for mixed in (lambda: here + there, lambda: torch.where(here > 0, there, there), lambda: here[there.long()],
                      lambda: there.numpy()):
            with pytest.raises(AssertionError):
                mixed()


def test_training_and_resuming_on_another_device(tiny, pretend):
    recipe = Recipe(epochs=2, lr=0.01, ema=0.5)
    plain = tiny.model()
    train(plain, tiny.task(), recipe, torch.Generator().manual_seed(0))
    with pretend():
        states = {}
        with pytest.raises(tiny.Interrupted):
            train(tiny.model(), tiny.task(device=OTHER), recipe, torch.Generator().manual_seed(0),
                  run=tiny.Run(states, 4))
        model = tiny.model()
        train(model, tiny.task(device=OTHER), recipe, torch.Generator().manual_seed(0), run=tiny.Run(states))
        assert {value.device for value in model.parameters()} == {OTHER}
        found = {name: value.cpu() for name, value in model.state_dict().items()}
    assert states and tiny.same(found, dict(plain.state_dict()))


@pytest.mark.parametrize("name", method_names())
@pytest.mark.parametrize("start", ["cpu", "other"])
def test_a_method_works_on_another_device(name, start, tiny, pretend):
    method = find_method(name)
    smoke = next(table.smoke for table in all_tables() if table.method == name and table.smoke)
    budget, config = build(Budget, smoke["budget"]), build(method.Config, smoke.get("config", {}))

    def compress(model, task):
        return method.compress(model, task.seen_as(method.DATA), budget, config, torch.Generator().manual_seed(0))

    wanted = compress(tiny.model(), tiny.task())
    with pretend() as marks:
        model = tiny.model()
        model = model.to(OTHER) if start == "other" else model
        out = compress(model, tiny.task(device=OTHER))
        assert {value in marks for value in model.parameters()} == {start == "other"}  # the input model stays put
        assert not any(value in marks for value in out.state_dict().values())
        assert all(not any(part in marks for part in (t.mask, t.codes)) for t in out.weights.values())
    assert to_bytes(out)[0] == to_bytes(wanted)[0]


class Moves(TorchDispatchMode):
    """Counts what leaves the other device: whoever trains there waits for it."""

    def __init__(self, marks):
        super().__init__()
        self.marks, self.count = marks, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        looks = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        self.count += function in looks and args[0] in self.marks
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("name", ["admm", "bayesian_bits", "deep_compression", "prune_then_quantize",
                                  "quantize_then_prune", "rptq_train"])
def test_a_step_of_training_moves_its_batch_and_nothing_else(name, tiny, pretend, monkeypatch):
    """A copy to or from a GPU waits for all that it has to do; what a stage prepares in its first step is left out."""
    method = find_method(name)
    smoke = next(table.smoke for table in all_tables() if table.method == name and table.smoke)
    budget, config = build(Budget, smoke["budget"]), build(method.Config, smoke.get("config", {}))
    step, move, moves, steps = finetune.training_step, Pretend.move, [], []

    def moved(self, tensor, device, *given, **more):
        moves.append((tensor in self.marks) != (device.type == OTHER.type))
        return move(self, tensor, device, *given, **more)

    def counted(*given):
        moves.clear()
        with Moves(marks) as looks:
            out = step(*given)
        steps.append((sum(moves), looks.count))
        return out

    monkeypatch.setattr(Pretend, "move", moved)
    monkeypatch.setattr(finetune, "training_step", counted)
    with pretend() as marks:
        method.compress(tiny.model(), tiny.task(device=OTHER), budget, config, torch.Generator().manual_seed(0))
    assert steps and sum(one == (2, 0) for one in steps) >= len(steps) / 2 and steps[-1] == (2, 0)
