"""All hardware models on one compressed model: JSON, sums, and what each switch changes."""

import dataclasses
import json

import pytest
import torch
from torch import nn

from benchmarks import networks
from methods.core.artifact import ActivationQuantizer, Affine, Codebook, CompressedTensor, Topology, Window
from methods.core.errors import ConfigError
from methods.core.fit.calibrate import calibrate
from methods.core.graph.build import assemble, weight_layers
from methods.core.graph.graph import trace
from methods.engine.costs import hardware_costs
from methods.engine.costs.energy import Load, energy_ratios
from methods.engine.exact import IntegerNetwork
from methods.engine.layers import layer_costs

SHAPE = (3, 8, 8)
GRID, EIGHT = Affine(torch.tensor(0.1), torch.zeros((), dtype=torch.int32)), ActivationQuantizer(0.1)


def model():
    return networks.build("resnet18w8", 10, 3)


def compress(bits=8, keep=None, activations=True, **fields):
    """Plain rounding at `bits`; `keep(module) -> mask` prunes."""
    net, weights = model(), {}
    for name, module in weight_layers(net).items():
        w = module.weight.detach()
        top = (1 << bits - 1) - 1
        scale = w.abs().max() / top
        codes = torch.where(torch.round(w / scale) == 0, 1, torch.round(w / scale)).to(torch.int32)
        mask = None if keep is None else keep(w)
        weights[name] = CompressedTensor.of(codes, Affine(scale, GRID.zero), bits, mask)
    x = torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(0))
    ranges = calibrate(net, x) if activations else {}
    return assemble(net, weights, activations=ranges, **fields), x


def scattered(w):
    return torch.rand(w.shape, generator=torch.Generator().manual_seed(len(w))) < 0.1


def test_a_row_is_json_and_adds_up():
    compressed, _ = compress()
    costs = hardware_costs(compressed, model(), SHAPE)
    assert json.loads(json.dumps(costs, allow_nan=False)) == costs
    layers, total = costs["layers"], costs["total"]
    known = layer_costs(compressed, model(), SHAPE)
    assert total["macs"] == total["dense_macs"] == sum(cost.macs for cost in known.values())
    for key in ("cycles", "cycles_channels", "bb_bops", "uniq_bops", "macs"):
        assert sum(layers[name][key] for name in known) == pytest.approx(total[key])
    moved = sum(sum(row["traffic_bits"].values()) for row in layers.values())
    assert moved == total["traffic_bits_smallest"] == total["traffic_bits_dense"]  # nothing is pruned
    assert total["bb_bops"] == sum(cost.bops for cost in known.values()) and total["bb_bops_percent"] == 6.25
    assert total["cycles"] == total["cycles_channels"] == total["cycles_two_four"] == total["cycles_sparq"]
    assert total["energy_ratio"] == total["energy_ratio_sparse"] < 0.25 and "effective" not in total
    assert {"add", "avgpool"} <= set(layers) and set(layers["add"]) == {"traffic_bits"}


def test_scattered_zeros():
    dense, sparse = (hardware_costs(compress(keep=keep)[0], model(), SHAPE)["total"] for keep in (None, scattered))
    for key in ("cycles", "uniq_bops", "energy_ratio", "traffic_bits_dense"):
        assert sparse[key] == dense[key]  # a machine that skips nothing gains nothing
    for key in ("energy_ratio_sparse", "traffic_bits_smallest", "uniq_bops_density"):
        assert sparse[key] < 0.9 * dense[key]


def test_empty_filters():
    def half(w):
        return torch.arange(len(w)).reshape(-1, 1, 1, 1).expand(w.shape) % 2 == 0 if w.ndim == 4 else w == w

    costs = hardware_costs(compress(keep=half)[0], model(), SHAPE, array="ws4")
    total, block = costs["total"], costs["layers"]
    assert total["cycles_channels"] < 0.6 * total["cycles"]
    dense = 8 * 8
    assert block["layer1.0.conv1"]["bb_bops"] == block["layer1.0.conv1"]["macs"] * dense / 2
    assert block["layer1.0.conv2"]["bb_bops"] == block["layer1.0.conv2"]["macs"] * dense / 4


def test_removed_channels():
    """2 of 4 filters are gone from the file: costs are those of the small layers, ratios refer to the large ones."""
    def net(filters):
        return nn.Sequential(nn.Conv2d(1, filters, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * filters, 3))

    small = net(2)
    weights = {name: CompressedTensor.of(torch.ones(module.weight.shape, dtype=torch.int32), GRID, 4)
               for name, module in weight_layers(small).items()}
    topology = Topology(widths={"0": (2, 1), "3": (3, 8)})
    compressed = assemble(small, weights, topology=topology, activations={"0": EIGHT, "3": EIGHT})
    costs = hardware_costs(compressed, net(4), (1, 4, 4), array="ws2")
    total, rows = costs["total"], costs["layers"]
    assert total["macs"] == 4 * 18 + 24 and total["dense_macs"] == 4 * 36 + 48
    assert total["bb_bops"] == (4 * 18 + 24) * 4 * 8
    assert total["bb_bops_percent"] == 100 * total["bb_bops"] / (1024 * total["dense_macs"])
    assert rows["0"]["cycles"] == 5 * 1 * (4 + 2 + 4 - 2)  # K = 9, N = 2
    assert rows["0"]["traffic_bits"] == {"weights": 18 * 4, "reads": 8 * 16, "writes": 8 * 8}
    assert total["traffic_bits_float32"] == 32 * (36 + 48 + 16 + 2 * 16 + 3)


def test_loads_of_the_three_machines_by_hand():
    """Two layers with half their weights, from a network twice as wide; windows of 4 bits at the second."""
    def net(filters):
        return nn.Sequential(nn.Conv2d(1, filters, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * filters, 3))

    weights = {name: CompressedTensor.of(torch.ones(m.weight.shape, dtype=torch.int32), GRID, 5,
                                         torch.arange(m.weight.numel()).reshape(m.weight.shape) % 2 == 0)
               for name, m in weight_layers(net(2)).items()}
    compressed = assemble(net(2), weights, topology=Topology(widths={"0": (2, 1), "3": (3, 8)}),
                          activations={"0": EIGHT, "3": EIGHT}, windows={"3": Window(4, (0, 1, 2, 3, 4))})
    x = torch.rand(6, 1, 4, 4)
    costs = hardware_costs(compressed, net(4), (1, 4, 4), IntegerNetwork(compressed, net(4)), x)
    rows, total = costs["layers"], costs["total"]
    small = {name: row["format_bits"][row["format"]] for name, row in rows.items()}
    float32 = {"0": Load(4 * 36, 32, 32, 32 * 36, 32 * 16, 32 * 16), "3": Load(48, 32, 32, 32 * 48, 32 * 16, 32 * 3)}
    done = {"energy_ratio": {"0": 72, "3": 24}, "energy_ratio_sparse": {"0": 36, "3": 12},
            "energy_ratio_skipping": {name: row["effective"]["both"] / 6 for name, row in rows.items()}}
    assert 0 < done["energy_ratio_skipping"]["3"] <= 12
    for machine, macs in done.items():
        bits = {"0": 18 * 5, "3": 24 * 5} if machine == "energy_ratio" else small
        loads = {"0": Load(macs["0"], 5, 8, bits["0"], 16 * 8, 8 * 8),
                 "3": Load(macs["3"], 5, 4, bits["3"], 8 * 8, 3 * 32)}
        assert total[machine] == pytest.approx(energy_ratios(loads, float32)["total"], rel=1e-12)


def test_stored_energy_of_resnet18():
    """2.28 mJ of 11.0 mJ: W8A8, adds in the accumulators, float32 logits."""
    net = networks.build("resnet18", 10, 3)
    weights = {name: CompressedTensor.of(torch.ones(module.weight.shape, dtype=torch.int32), GRID, 8)
               for name, module in weight_layers(net).items()}
    skipped = trace(net).accumulator_edges()
    ranges = {edge: EIGHT for edge in trace(net).edges() if edge not in skipped}
    total = hardware_costs(assemble(net, weights, activations=ranges), net, (3, 32, 32))["total"]
    assert total["energy_ratio"] == pytest.approx(2.2775 / 10.9985, rel=2e-4)
    assert total["cycles"] == 1_568_652 and round(total["bb_bops"] / 1e9, 2) == 35.55


def test_two_four_and_sparq_halve_the_reduction():
    def two_four(w):
        return (torch.arange(w.shape[1]) % 4 < 2).reshape(1, -1, *[1] * (w.ndim - 2)).expand(w.shape)

    compressed, _ = compress(keep=two_four)
    windows = {"layer2.0.conv2": Window(4, (0, 1, 2, 3, 4)), "layer2.1.conv1": Window(2, (0, 1), sparse24=True)}
    plain = hardware_costs(compressed, model(), SHAPE, array="os4")
    costs = hardware_costs(dataclasses.replace(compressed, windows=windows), model(), SHAPE, array="os4")
    wide, windowed = plain["layers"], costs["layers"]
    row = windowed["layer2.0.conv2"]  # M = 16, N = 16, K = 16 * 9 = 144: 16 folds
    assert (row["cycles"], row["cycles_two_four"], row["cycles_sparq"]) == (16 * 150, 16 * 78, 16 * 78)
    assert windowed["layer2.1.conv1"]["cycles_sparq"] == 16 * 42
    for name in ("layer2.0.conv2", "layer2.1.conv1"):
        bits = windows[name].bits
        assert windowed[name]["bb_bops"] == wide[name]["bb_bops"] * bits / 8
        assert windowed[name]["energy_ratio"] < wide[name]["energy_ratio"]
        assert windowed[name]["traffic_bits"] == wide[name]["traffic_bits"]  # stored at 8 bits


def test_effective_macs():
    compressed, x = compress(keep=scattered)
    network = IntegerNetwork(compressed, model())
    costs = hardware_costs(compressed, model(), SHAPE, network, x)
    assert json.loads(json.dumps(costs, allow_nan=False)) == costs
    total = costs["total"]["effective"]
    assert total["macs"] == len(x) * costs["total"]["macs"] and total["layers"] == len(network.layers)
    assert 0 < total["both"] < min(total["weights"], total["activations"]) < total["macs"]
    assert sum(row["effective"]["both"] for row in costs["layers"].values() if "effective" in row) == total["both"]
    assert costs["total"]["energy_ratio_skipping"] < costs["total"]["energy_ratio_sparse"]
    for arguments in ((network, None), (None, x)):
        with pytest.raises(ConfigError, match="both"):
            hardware_costs(compressed, model(), SHAPE, *arguments)


def test_what_stays_float():
    """Float activations, and a layer without codes, compute in float32 and move 32 bits."""
    compressed, _ = compress(activations=False)
    costs = hardware_costs(compressed, model(), SHAPE)
    stem, later = costs["layers"]["conv1"], costs["layers"]["layer1.0.conv1"]
    assert stem["bb_bops"] == stem["macs"] * 8 * 8 and later["bb_bops"] == later["macs"] * 8 * 32
    compressed, _ = compress()
    weights = {name: t for name, t in compressed.weights.items() if name != "fc"}
    rest = {**compressed.rest, "fc.weight": compressed.weights["fc"].decode()}
    row = hardware_costs(dataclasses.replace(compressed, weights=weights, rest=rest), model(), SHAPE)["layers"]["fc"]
    assert row["format_bits"]["dense"] == 32 * 640 and row["traffic_bits"]["weights"] == 32 * 640


def test_a_codebook_multiplies_at_the_width_of_its_table():
    compressed, _ = compress(bits=2)
    tensor = compressed.weights["fc"]
    book = Codebook(torch.tensor([-0.5, 0.0, 0.25, 1.0]))
    codes = torch.where(tensor.codes < 0, 0, 2).to(torch.int32)
    shared = dataclasses.replace(compressed, weights={**compressed.weights, "fc": CompressedTensor.of(codes, book, 2)})
    one, other = (hardware_costs(c, model(), SHAPE)["layers"]["fc"] for c in (compressed, shared))
    assert one["format_bits"] == other["format_bits"] and other["bb_bops"] == 4 * one["bb_bops"]  # 8 bits, not 2
    assert one["energy_ratio"] < other["energy_ratio"]


def test_settings():
    compressed, _ = compress()
    one = hardware_costs(compressed, model(), SHAPE)
    many = hardware_costs(compressed, model(), SHAPE, array="os16", batch=64, sram=8 * 8192 * 8)
    assert one["setting"] == {"array": "ws32", "batch": 1, "sram_bits": 256 * 8192, "lanes": 16, "sample": 0}
    assert many["total"]["macs_per_byte"] > one["total"]["macs_per_byte"]
    assert many["total"]["cycles"] != one["total"]["cycles"]
    with pytest.raises(ConfigError, match="ws32"):
        hardware_costs(compressed, model(), SHAPE, array="tpu")
