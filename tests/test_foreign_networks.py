"""Networks as people write them: the graph computes as the module, the integer network as its int64 definition."""

import math

import pytest
import torch

from methods.core.fit.calibrate import calibrate
from methods.core.fit.quantize import fit_symmetric, quantize
from methods.core.graph.build import apply, assemble, weight_layers
from methods.core.graph.graph import trace
from methods.engine.exact import IntegerNetwork
from methods.engine.fast import FastNetwork
from methods.engine.reference import ReferenceRun
from tests.foreign import NETS, Net, b


@pytest.fixture(params=NETS)
def network(request):
    run, layers = NETS[request.param]
    return Net(run, **layers).eval()


def compressed_8_bit(model, inputs):
    weights = {name: quantize(layer.weight, fit_symmetric(layer.weight, 8), 8)
               for name, layer in weight_layers(model).items()}
    plain = assemble(model, weights)
    return assemble(model, weights, activations=calibrate(apply(plain, model), inputs, 8))


@torch.no_grad()
def test_graph_integers_and_definition(network):
    x = torch.randn(4, 3, 8, 8)
    kept = x.clone()
    want = network(x.clone())
    assert torch.equal(trace(network).run(x), want) and torch.equal(x, kept)
    compressed = compressed_8_bit(network, x)
    fast = FastNetwork(compressed, network)
    exact = fast.exact(x)
    assert float((exact - want).abs().max()) < 0.1 * float(want.abs().max()) + 0.02  # 8 bits are near
    reference = ReferenceRun(fast.exact, x)
    assert torch.equal(torch.from_numpy(reference.real(fast.graph.output)), exact)
    assert torch.equal(fast(x), exact) and torch.equal(x, kept)
    for layer in (node.name for node in fast.graph.layers()):
        assert layer in fast.layers, f"{layer} does not run in integers"


def test_codes_go_through_what_moves_clamps_and_joins():
    """Nothing is decoded between the layers: the only real values are those that need to be."""
    for name in ("view", "cat", "cat of itself", "chunk", "split", "slices", "shuffle", "relu6", "clamps", "pads once",
                 "nearest", "pixel shuffle", "grouped", "channels last", "cat of a sum and a pool"):
        run, layers = NETS[name]
        model = Net(run, **layers).eval()
        assert IntegerNetwork(compressed_8_bit(model, torch.randn(4, 3, 8, 8)), model).float_nodes == [], name


def test_a_clamp_of_codes_is_the_codes_of_the_clamp():
    model = Net(lambda m, x: m.b(x.clamp(-0.21, 0.37)), b=b()).eval()
    x = torch.randn(4, 3, 8, 8)
    network = IntegerNetwork(compressed_8_bit(model, x), model)
    q = network.ranges["b"]
    sums = ReferenceRun(network, x).real("a")
    want = torch.from_numpy(sums).clamp(-0.21, 0.37)
    got = q.decode(torch.from_numpy(ReferenceRun(network, x).codes("clamp", q)))
    assert float((got - want).abs().max()) <= 0.5001 * q.scale and math.isclose(q.scale, 0.58 / 255, rel_tol=0.02)
