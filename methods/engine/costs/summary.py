"""Every hardware model applied to one compressed model, as JSON values for a row."""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass

from torch import Tensor, nn

from ...core.artifact import CompressedModel
from ...core.errors import ConfigError
from ...core.graph.build import apply
from ..exact import IntegerNetwork
from ..widths import FLOAT_BITS, operand_widths, runs_in_float
from . import bops, energy, formats, skipping, systolic, traffic
from .shapes import LayerShape, Traced

Part = tuple[dict[str, dict], dict[str, object]]  # {layer: columns}, {column: total}


@dataclass(frozen=True)
class _Layer:
    """One stored layer.

    bits      of a code; 32 for float weights
    widths    of the operands, weight and activation (see `widths`);  in_float  whether it runs in float
    sizes     {format: bits of the tensor};  smallest  the name of the smallest format
    """

    shape: LayerShape
    mask: Tensor
    bits: int
    widths: tuple[int, int]
    in_float: bool
    sizes: dict[str, float]
    smallest: str
    density: float


def hardware_costs(compressed: CompressedModel, skeleton: nn.Module, input_shape: tuple[int, ...],
                   integer_network: IntegerNetwork | None = None, sample: Tensor | None = None, *,
                   array: str = systolic.DEFAULT_ARRAY, batch: int = 1, sram: int = energy.DEFAULT_SRAM,
                   lanes: int = skipping.DEFAULT_LANES, traced: tuple[Traced, Traced] | None = None) -> dict:
    """{"setting", "layers": {layer: {column: value}}, "total": {column: value}} for one input.

    input_shape      of one input [C, H, W]
    sample           real inputs [N, C, H, W] on which `integer_network` counts effective multiply-accumulates;
                     those counts ("effective") are sums over the sample; layers that it runs in float multiply
                     32 x 32 bits
    array            a square systolic array, like ws32;  batch  inputs over which weights are reused
    sram             bits of the on-chip memory;  lanes  filters that zero-skipping hardware does at a time
    traced           the compressed network and the dense one, if somebody has traced them already
    """
    if (integer_network is None) != (sample is None):
        raise ConfigError("effective multiply-accumulates take both: an integer network and a sample of inputs")
    if traced is None:
        traced = Traced.of(apply(compressed, skeleton), input_shape), Traced.of(skeleton, input_shape)
    stored, dense = traced
    if not stored.shapes:
        raise ConfigError(f"hardware costs are those of convs and linears inside a network: {stored.graph.why_opaque()}"
                          f"{type(stored.model).__name__} has none")
    in_float = () if integer_network is None else integer_network.float_nodes
    layers = {name: _layer(compressed, stored.model, shape, in_float) for name, shape in stored.shapes.items()}
    skips = {} if sample is None else skipping.count_network(integer_network, [sample], lanes)
    effective = {name: count.both / len(sample) for name, count in skips.items()}
    parts = [_stored(layers, dense), _cycles(compressed, layers, systolic.array_named(array)),
             _bops(stored, layers, dense),
             _energy(compressed, stored, layers, dense, effective, batch, sram),
             _traffic(compressed, stored, layers, dense, batch), _effective(skips)]
    setting = {"array": array, "batch": batch, "sram_bits": sram, "lanes": lanes,
               "sample": 0 if sample is None else len(sample)}
    rows: dict[str, dict] = {}
    for columns, _ in parts:
        for name, values in columns.items():
            rows[name] = rows.get(name, {}) | values
    return {"setting": setting, "layers": rows, "total": {key: value for _, total in parts
                                                          for key, value in total.items()}}


def _layer(compressed: CompressedModel, model: nn.Module, shape: LayerShape, in_float: Collection[str]) -> _Layer:
    tensor = compressed.weights.get(shape.name)
    if tensor is None:
        mask = model.get_submodule(shape.name).weight.detach() != 0
        bits, zero_code = FLOAT_BITS, True
    else:
        mask, bits, zero_code = tensor.mask, tensor.bits, tensor.grid.has_zero()
    sizes = formats.format_bits(mask, bits, zero_code=zero_code)
    return _Layer(shape, mask, bits, operand_widths(compressed, shape.name, in_float),
                  runs_in_float(compressed, shape.name, in_float), sizes, formats.smallest(sizes),
                  float(mask.double().mean()))


def _stored(layers: Mapping[str, _Layer], dense: Traced) -> Part:
    rows = {name: {"macs": layer.shape.macs, "format": layer.smallest, "format_bits": layer.sizes}
            for name, layer in layers.items()}
    return rows, {"macs": sum(layer.shape.macs for layer in layers.values()),
                  "dense_macs": sum(shape.macs for shape in dense.shapes.values())}


def _cycles(compressed: CompressedModel, layers: Mapping[str, _Layer], array: systolic.Array) -> Part:
    """Cycles of the dense array, and of arrays that drop empty channels, that use 2:4 weights where they fit, or
    that do two multiply-accumulates at a time where the method has windows (four on 2:4 weights)."""
    runs: dict[str, dict[str, systolic.Run]] = {}
    for name, layer in layers.items():
        window = compressed.windows.get(name)
        at_a_time = 1 if window is None else 4 if window.sparse24 else 2
        runs[name] = {
            "cycles": systolic.run_layer(layer.shape, array),
            "cycles_channels": systolic.run_layer(systolic.without_empty_channels(layer.shape, layer.mask), array),
            "cycles_two_four": systolic.run_layer(layer.shape, array, 2 if "2:4" in layer.sizes else 1),
            "cycles_sparq": systolic.run_layer(layer.shape, array, at_a_time),
        }
    kinds = next(iter(runs.values()))
    total = {kind: systolic.total(run[kind] for run in runs.values()) for kind in kinds}
    dense = total["cycles"]
    accesses = {"ifmap": dense.ifmap, "filter": dense.filter, "ofmap": dense.ofmap}
    rows = {name: {kind: run.cycles for kind, run in row.items()} | {"utilisation": row["cycles"].utilisation}
            for name, row in runs.items()}
    return rows, {kind: run.cycles for kind, run in total.items()} | {"utilisation": dense.utilisation,
                                                                      "array_accesses": accesses}


def _bops(stored: Traced, layers: Mapping[str, _Layer], dense: Traced) -> Part:
    operands = {name: bops.Operands(*layer.widths, bops.kept_filters(layer.mask), layer.density, layer.in_float)
                for name, layer in layers.items()}
    pruned = bops.bayesian_bits(stored.graph, stored.shapes, operands, bops.feeders(stored.model))
    rows = {}
    for name, mine in operands.items():
        shape, width = stored.shapes[name], bops.activation_width(stored.graph, name, mine)
        rows[name] = {"bb_bops": pruned[name], "uniq_bops": bops.uniq(shape, mine.weight_bits, width),
                      "uniq_bops_density": bops.uniq(shape, mine.weight_bits, width, mine.density)}
    total = {key: sum(row[key] for row in rows.values()) for key in ("bb_bops", "uniq_bops", "uniq_bops_density")}
    return rows, total | {"bb_bops_percent": bops.relative(pruned, dense.shapes)}


def _energy(compressed: CompressedModel, stored: Traced, layers: Mapping[str, _Layer], dense: Traced,
            effective: Mapping[str, float], batch: int, sram: int) -> Part:
    """Ratios to float32 of three machines: one that skips nothing and stores dense codes; one that skips pruned
    weights and stores them in the smallest format; and, with a sample, one that skips zero activations as well."""
    ranges = compressed.activations

    def load(name: str, macs: float, weights: float) -> energy.Load:
        shape = stored.shapes[name]
        return energy.Load(macs, *layers[name].widths, weights,
                           shape.in_elements * traffic.edge_width(ranges, name),
                           shape.out_elements * traffic.output_width(stored.graph, ranges, name))

    machines = {
        "energy_ratio": {name: load(name, layer.shape.macs, layer.sizes["dense"]) for name, layer in layers.items()},
        "energy_ratio_sparse": {name: load(name, layer.shape.macs * layer.density, layer.sizes[layer.smallest])
                                for name, layer in layers.items()}}
    if effective:
        machines["energy_ratio_skipping"] = {  # a layer that runs in float skips nothing
            name: load(name, effective.get(name, layer.shape.macs), layer.sizes[layer.smallest])
            for name, layer in layers.items()}
    float32 = {name: energy.float32_load(shape) for name, shape in dense.shapes.items()}
    found = {key: energy.energy_ratios(loads, float32, batch, sram) for key, loads in machines.items()}
    rows = {name: {key: ratios["layers"][name] for key, ratios in found.items()} for name in layers}
    return rows, {key: ratios["total"] for key, ratios in found.items()} | {
        "energy_shares": found["energy_ratio"]["shares"]}


def _traffic(compressed: CompressedModel, stored: Traced, layers: Mapping[str, _Layer], dense: Traced,
             batch: int) -> Part:
    """Bits moved with the weights as dense codes, with each tensor in its smallest format, and in float32."""
    def moved(weights: dict[str, float]) -> dict[str, traffic.Traffic]:
        return traffic.traffic_of(stored.graph, stored.sizes, compressed.activations, weights, batch)

    codes = moved({name: layer.sizes["dense"] for name, layer in layers.items()})
    smallest = moved({name: layer.sizes[layer.smallest] for name, layer in layers.items()})
    float32 = traffic.traffic_of(dense.graph, dense.sizes, {}, {
        name: FLOAT_BITS * shape.weights for name, shape in dense.shapes.items()}, batch)
    total = {f"traffic_bits_{name}": sum(row.total for row in rows.values())
             for name, rows in (("dense", codes), ("smallest", smallest), ("float32", float32))}
    macs = sum(layer.shape.macs for layer in layers.values())
    return {name: {"traffic_bits": asdict(row)} for name, row in smallest.items()}, total | {
        "macs_per_byte": 8 * macs / total["traffic_bits_smallest"]}


def _effective(skips: Mapping[str, skipping.Skips]) -> Part:
    if not skips:
        return {}, {}
    total = asdict(sum(skips.values(), skipping.NOTHING)) | {"layers": len(skips)}
    return {name: {"effective": asdict(count)} for name, count in skips.items()}, {"effective": total}
