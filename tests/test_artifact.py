"""The compressed model: grids decode by their definition, constructors refuse what breaks it, `apply` rebuilds."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

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
from methods.core.errors import CompressError
from methods.core.fit.quantize import fit_asymmetric, fit_symmetric, quantize
from methods.core.graph.build import apply, assemble, check_finite, weight_layers
from methods.core.graph.fold import fold_codes


def f32(*values):
    return torch.tensor(values, dtype=torch.float32)


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)


ONE, ZERO = torch.tensor(1.0), torch.tensor(0, dtype=torch.int32)
PAIR = torch.tensor([[0, 1]])


# --- decoding -----------------------------------------------------------------------------------------------


def test_affine_is_scale_times_code_minus_zero():
    grid = Affine(f32(0.5, 2.0), i32(1, 3), signed=False)
    tensor = CompressedTensor.of(torch.tensor([[0, 1, 2], [3, 4, 7]]), grid, 3)
    assert tensor.decode().tolist() == [[-0.5, 0.0, 0.5], [0.0, 2.0, 8.0]]
    assert tensor.mask.tolist() == [[True, False, True], [False, True, True]] and tensor.density == 4 / 6
    assert grid.integers(tensor.codes).tolist() == [[-1, 0, 1], [0, 1, 4]]
    assert Affine(ONE, ZERO).code_range(8) == (-128, 127) and grid.code_range(8) == (0, 255)


def test_levels_and_codebook_look_values_up():
    levels = CompressedTensor.of(torch.tensor([[0, 1], [2, 2]]), Levels(f32(0.5, 3.0), i32(-3, 1, 2)), 2)
    assert levels.decode().tolist() == [[-1.5, 0.5], [6.0, 6.0]] and levels.kept == 4
    book = CompressedTensor.of(torch.tensor([[0, 1], [2, 2]]), Codebook(f32(0.25, 0.0, -9.0)), 2)
    assert book.decode().tolist() == [[0.25, 0.0], [-9.0, -9.0]] and book.kept == 3


def test_pruned_codes_become_the_zero_code():
    mask = torch.tensor([[True, False, False]])
    codes = torch.tensor([[5, 6, 7]])
    assert CompressedTensor.of(codes, Affine(ONE, i32(2)[0]), 4, mask).codes.tolist() == [[5, 2, 2]]
    assert CompressedTensor.of(codes, Codebook(torch.arange(-4.0, 4.0)), 3, mask).codes.tolist() == [[5, 4, 4]]
    odd = CompressedTensor.of(codes, Levels(ONE, torch.arange(1, 17, 2, dtype=torch.int32)), 3, mask)
    assert odd.codes.tolist() == [[5, 0, 0]] and odd.decode().tolist() == [[11.0, 0.0, 0.0]]


def test_kept_weights_of_value_zero_count_as_pruned():
    grid = Codebook(f32(0.0, 1.0, -0.0))
    tensor = CompressedTensor.of(torch.tensor([[1, 2, 0]]), grid, 2, torch.tensor([[True, True, True]]))
    assert tensor.mask.tolist() == [[True, False, False]] and tensor.codes.tolist() == [[1, 0, 0]]
    assert not bool(torch.signbit(tensor.decode()).any())


def test_caller_keeps_his_tensors():
    codes, mask = torch.tensor([[1, 2, 3]]), torch.tensor([[True, False, True]])
    CompressedTensor.of(codes, Affine(ONE, ZERO), 4, mask)
    assert codes.tolist() == [[1, 2, 3]] and mask.tolist() == [[True, False, True]]


# --- constructors -------------------------------------------------------------------------------------------

T = torch.tensor([[True, True]])
UNIT = Affine(ONE, ZERO)
BAD = {
    "affine shapes": lambda: Affine(f32(1, 1), i32(0)),
    "affine matrix": lambda: Affine(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32)),
    "affine scale double": lambda: Affine(ONE.double(), ZERO),
    "affine zero int64": lambda: Affine(ONE, ZERO.long()),
    "affine scale 0": lambda: Affine(f32(1, 0), i32(0, 0)),
    "affine scale negative": lambda: Affine(-ONE, ZERO),
    "affine scale nan": lambda: Affine(f32(1, float("nan")), i32(0, 0)),
    "affine scale inf": lambda: Affine(ONE / 0, ZERO),
    "levels scale matrix": lambda: Levels(torch.ones(1, 1), i32(1)),
    "levels scale double": lambda: Levels(ONE.double(), i32(1)),
    "levels scale 0": lambda: Levels(ONE * 0, i32(1)),
    "levels empty": lambda: Levels(ONE, i32()),
    "levels int64": lambda: Levels(ONE, i32(1).long()),
    "levels matrix": lambda: Levels(ONE, i32(1)[None]),
    "levels equal": lambda: Levels(ONE, i32(1, 3, 1)),
    "codebook empty": lambda: Codebook(f32()),
    "codebook double": lambda: Codebook(f32(1).double()),
    "codebook matrix": lambda: Codebook(f32(1)[None]),
    "codebook nan": lambda: Codebook(f32(1, float("nan"))),
    "float codes": lambda: CompressedTensor.of(f32(0.4, 1)[None], UNIT, 4),
    "float mask": lambda: CompressedTensor.of(PAIR, UNIT, 4, torch.ones(1, 2)),
    "mask shape": lambda: CompressedTensor.of(PAIR, UNIT, 4, T[:, :1]),
    "mask is not decode != 0": lambda: CompressedTensor(T, PAIR.int(), UNIT, 4),
    "pruned but not the zero code": lambda: CompressedTensor(~T, PAIR.int(), UNIT, 4),
    "int64 codes": lambda: CompressedTensor(T, PAIR + 1, UNIT, 4),
    "vector": lambda: CompressedTensor.of(PAIR[0], UNIT, 4),
    "too few scales": lambda: CompressedTensor(T, PAIR.int() + 1, Affine(f32(1, 1), i32(0, 0)), 4),
    "code above": lambda: CompressedTensor.of(PAIR + 7, UNIT, 4),
    "code below": lambda: CompressedTensor.of(PAIR - 9, UNIT, 4),
    "unsigned code below": lambda: CompressedTensor.of(PAIR - 1, Affine(ONE, ZERO, signed=False), 4),
    "code beyond the levels": lambda: CompressedTensor.of(PAIR, Levels(ONE, i32(1)), 4),
    "code beyond the codebook": lambda: CompressedTensor.of(PAIR + 1, Codebook(f32(1, 2)), 4),
    "code beyond the bits": lambda: CompressedTensor.of(PAIR + 1, Codebook(f32(1, 2, 3)), 1),
    "0 bits": lambda: CompressedTensor.of(PAIR, UNIT, 0),
    "17 bits": lambda: CompressedTensor.of(PAIR, UNIT, 17),
    "zero point outside": lambda: CompressedTensor.of(PAIR, Affine(ONE, i32(9)[0]), 4, ~T),
    "activation scale 0": lambda: ActivationQuantizer(0.0),
    "activation scale nan": lambda: ActivationQuantizer(float("nan")),
    "activation scale inf": lambda: ActivationQuantizer(float("inf")),
    "activation 0 bits": lambda: ActivationQuantizer(1.0, bits=0, signed=True),
    "activation -1 bits": lambda: ActivationQuantizer(1.0, bits=-1),
    "activation 17 bits": lambda: ActivationQuantizer(1.0, bits=17),
    "activation zero above": lambda: ActivationQuantizer(1.0, 256),
    "activation zero below": lambda: ActivationQuantizer(1.0, -1),
    "activation signed zero": lambda: ActivationQuantizer(1.0, 128, signed=True),
    "stored twice": lambda: CompressedModel({"a": CompressedTensor.of(PAIR, UNIT, 4)}, {"a.weight": ONE}),
    "ranges by nobody": lambda: CompressedModel({}, {}, ranges_by="user"),
    "window without quantizer": lambda: CompressedModel({}, {}, windows={"a": Window(4, (0, 4))}),
}


@pytest.mark.parametrize("case", BAD)
def test_refused_in_one_line(case):
    with pytest.raises(CompressError) as caught:
        BAD[case]()
    assert "\n" not in str(caught.value)


# --- apply --------------------------------------------------------------------------------------------------


def compressed_of(model, fit=fit_symmetric, bits=4):
    return {name: quantize(layer.weight, fit(layer.weight, bits), bits) for name, layer in weight_layers(model).items()}


def test_apply_decodes_into_a_copy_of_the_skeleton(tiny):
    model, skeleton = tiny.model(), tiny.net()
    before = tiny.fingerprint(skeleton)
    compressed = assemble(model, compressed_of(model))
    network = apply(compressed, skeleton)
    assert tiny.same(tiny.fingerprint(skeleton), before) and not network.training
    state = network.state_dict()
    for name, value in model.state_dict().items():
        layer = name.removesuffix(".weight")
        wanted = compressed.weights[layer].decode() if layer in compressed.weights else value
        assert name.endswith("num_batches_tracked") or torch.equal(state[name], wanted)
    assert set(compressed.state_dict()) == {name for name in state if not name.endswith("num_batches_tracked")}


def test_layers_may_stay_float(tiny):
    model = tiny.model()
    some = {name: tensor for name, tensor in compressed_of(model).items() if name != "conv1"}
    compressed = assemble(model, some)
    assert torch.equal(apply(compressed, tiny.net()).conv1.weight, model.conv1.weight)
    model.conv1.weight.data.zero_()
    assert bool(compressed.rest["conv1.weight"].any())  # a copy, not a view of the model


class Other(nn.Module):
    """A skeleton made from named layers."""

    def __init__(self, layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)


def test_a_foreign_skeleton_is_refused(tiny):
    model = tiny.model()
    compressed = assemble(model, compressed_of(model))
    layers = dict(tiny.net().named_children())
    for fault, changed in {
        "lacks extra.weight, extra.bias": {**layers, "extra": nn.Linear(2, 2)},
        "holds unknown fc.weight, fc.bias": {name: layer for name, layer in layers.items() if name != "fc"},
        "has other shapes for fc.weight, fc.bias": {**layers, "fc": nn.Linear(12, 7)},
    }.items():
        with pytest.raises(CompressError, match=f"{fault}: it belongs to another network"):
            apply(compressed, Other(changed))
    with pytest.raises(CompressError, match="holds unknown conv1.weight, .* …: it belongs"):
        apply(compressed, nn.ReLU())


def test_folded_topology(tiny):
    model = tiny.model()
    folded, weights, topology = fold_codes(model, compressed_of(model, fit_asymmetric, 8))
    compressed = assemble(folded, weights, topology=topology)
    network = apply(compressed, tiny.net())
    assert isinstance(network.bn1, nn.Identity) and network.conv1.bias is not None
    x = tiny.Batches(24, 4).inputs
    with torch.no_grad():
        assert float((network(x) - model(x)).abs().max()) < 0.1  # 8 bits
    for bad in ({"nothing": "bn1"}, {"conv1": "nothing"}, {"conv1": "relu1"}, {"bn1": "bn2"}):
        with pytest.raises(CompressError, match="no layer 'nothing'|cannot be folded"):
            apply(CompressedModel(weights, compressed.rest, topology=Topology(folded=bad)), tiny.net())


def test_resized_topology(tiny):
    small = tiny.model()
    small.conv3, small.bn3, small.fc = nn.Conv2d(8, 5, 3, 2, 1, bias=False), nn.BatchNorm2d(5), nn.Linear(5, 4)
    widths = {"conv3": (5, 8), "bn3": (5, 5), "fc": (4, 5)}
    compressed = assemble(small, compressed_of(small, fit_symmetric, 8), topology=Topology(widths=widths))
    network = apply(compressed, tiny.net())
    assert (network.conv3.out_channels, network.bn3.num_features, network.fc.in_features) == (5, 5, 5)
    x = tiny.Batches(24, 4).inputs
    with torch.no_grad():
        for name, tensor in compressed.weights.items():
            small.get_submodule(name).weight.copy_(tensor.decode())
        assert torch.equal(network(x), small.eval()(x))
    for bad in ({"drop": (1, 1)}, {"nothing": (1, 1)}):
        with pytest.raises(CompressError, match="width|no layer"):
            apply(CompressedModel({}, {}, topology=Topology(widths=bad)), tiny.net())
    with pytest.raises(CompressError, match="other shapes"):
        apply(CompressedModel(compressed.weights, compressed.rest), tiny.net())


def test_weights_that_cannot_be_compressed_are_named(tiny):
    check_finite(tiny.model())
    for value in (float("nan"), float("inf")):
        model = tiny.model()
        model.bn2.running_var[3] = value
        with pytest.raises(CompressError, match="bn2.running_var holds NaN"):
            check_finite(model)
    with pytest.raises(CompressError, match="weight of conv1 is torch.float16"):
        check_finite(tiny.model().half())
    model = tiny.model()
    prune.l1_unstructured(model.conv2, "weight", amount=0.5)
    with pytest.raises(CompressError, match="weight of conv2 is computed"):
        check_finite(model)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    with pytest.raises(CompressError, match="0 and 1 share one weight"):
        check_finite(model)
    model[1] = model[0]  # one module of two names is one layer
    check_finite(model)
