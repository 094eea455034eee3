"""Networks as people wrap them, and tensors no file holds: worked on inside, or refused in one line before any work."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

from methods import find_method
from methods.core.budget import Budget
from methods.core.errors import CompressError
from methods.core.file.storage import encode, from_bytes, load, to_bytes
from methods.core.graph.build import apply, float_bytes, own_copy
from methods.core.graph.wrapped import inside

PQ = find_method("prune_then_quantize")


def compress(model, task):
    return PQ.compress(model, task, Budget(density=0.5, bits=8), PQ.Config(calibration_inputs=24), torch.Generator())


def compiled_part(model):
    model.conv2 = torch.compile(model.conv2, backend="eager")
    return model


WRAPPED = {"compiled": lambda m: torch.compile(m, backend="eager"), "parallel": nn.DataParallel,
           "both": lambda m: nn.DataParallel(torch.compile(m, backend="eager")), "a compiled part": compiled_part}


@pytest.mark.parametrize("kind", WRAPPED)
def test_the_network_inside_is_compressed(kind, tiny):
    plain, model = compress(tiny.model(), tiny.task()), WRAPPED[kind](tiny.model())
    before = tiny.fingerprint(model)
    out = compress(model, tiny.task())
    assert tiny.same(out.state_dict(), plain.state_dict()) and list(out.weights) == ["conv1", "conv2", "conv3", "fc"]
    assert tiny.same(tiny.fingerprint(model), before)
    network = apply(out, model)  # a wrapped skeleton gives the network inside
    assert type(network) is tiny.net and tiny.same(network.state_dict(), apply(plain, tiny.net()).state_dict())


def test_inside_is_the_module_itself():
    model = nn.Linear(2, 2)
    assert inside(nn.DataParallel(nn.DataParallel(model))) is model and inside(model) is model

    class Own(nn.Module):  # an attribute called `module` is no wrapper
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(2, 2)

    assert inside(own := Own()) is own


class Counting(nn.Sequential):
    def get_extra_state(self):
        return {"classes": ["cat", "dog"]}

    def set_extra_state(self, state):
        self.restored = state


def test_extra_state_stays_with_the_skeleton(tiny, tmp_path):
    model = Counting(*copy.deepcopy(list(tiny.model().children()))[:3], nn.Flatten(), nn.Linear(512, 4))
    out = compress(model, tiny.task())
    assert not any("extra" in name for name in out.state_dict())
    network = apply(from_bytes(to_bytes(out)[0]), model)
    assert network.get_extra_state() == model.get_extra_state()
    encode(out, tmp_path / "own.jc")
    assert tiny.same(load(tmp_path / "own.jc", model)[0].state_dict(), network[0].state_dict())


def test_a_size_counts_every_tensor_once_and_tensors_alone():
    layer, plain = nn.Linear(3, 3), nn.Linear(3, 3)
    assert float_bytes(plain) == 4 * 12 == float_bytes(Counting(layer, nn.ReLU(), layer))
    assert float_bytes(nn.BatchNorm2d(3)) == 4 * 12  # scale, shift, mean, variance; the count of batches is no float


def lazy(model):
    model.fc = nn.LazyLinear(4)
    return model


def buffer(values):
    def add(model):
        model.register_buffer("extra", values)
        return model
    return add


def locked(model):
    model.lock = threading.Lock()
    return model


REFUSED = {
    "lazy": (lazy, "fc.weight has no shape yet: run the network once"),
    "meta": (lambda m: m.to("meta"), "conv1.weight lies on the meta device"),
    "complex": (buffer(torch.zeros(2, dtype=torch.complex64)), "extra is complex64: a file holds dense tensors"),
    "sparse": (buffer(torch.eye(3).to_sparse()), "extra is sparse"),
    "uncopyable": (locked, "TinyNet cannot be copied"),
    "script": (lambda m: torch.jit.trace(m, torch.zeros(1, 3, 8, 8)), "TorchScript"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_stored_is_refused_in_one_line(kind, tiny):
    wrap, said = REFUSED[kind]
    with pytest.raises(CompressError, match=said) as caught:
        compress(wrap(tiny.model()), tiny.task())
    assert "\n" not in str(caught.value)


def test_a_compressed_model_holds_nothing_of_the_wrapper(tiny):
    out = compress(torch.compile(tiny.model(), backend="eager"), tiny.task())
    back = pickle.loads(pickle.dumps(out.state_dict()))
    assert back.keys() == compress(tiny.model(), tiny.task()).state_dict().keys()
    assert own_copy(nn.DataParallel(tiny.model())).conv1.weight.requires_grad
