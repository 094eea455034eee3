"""Is the fast network bit-identical to the exact one, and that to its definition in int64? Counted code by code."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..core.artifact import ActivationQuantizer
from ..core.train.task import Batch
from .bytecodes import to_float
from .exact import Form, IntegerNetwork
from .fast import FastNetwork
from .outputs import tensors_in
from .reference import ReferenceRun


@dataclasses.dataclass
class Verdict:
    """Over `inputs` inputs: codes (and real values) of `values` places compared, and how many of them differ.

    reference_inputs  how many of the inputs went through the int64 reference as well, and what differed there
    """

    inputs: int = 0
    values: int = 0
    codes: int = 0
    wrong: int = 0
    wrong_outputs: int = 0
    reference_inputs: int = 0
    reference_codes: int = 0
    reference_wrong: int = 0


Recorded = dict[tuple[str, Form], Tensor]


def recorded(network: IntegerNetwork | FastNetwork, x: Tensor) -> tuple[Any, Recorded]:
    """Output (a tensor, or several), and {(node, form): a copy of the value in float32}."""
    seen, step = {}, network._step

    def watched(node, given, values):
        forms = step(node, given, values)
        for form, value in forms.items():
            if isinstance(value, Tensor) and not isinstance(form, tuple):
                bytes_ = value.dtype == torch.uint8
                seen[node.name, form] = (to_float(form, value) if bytes_ else value).clone()
        return forms

    network._step = watched
    try:
        return network(x), seen
    finally:
        network._step = step


def verify(fast: FastNetwork, batches: Iterable[Batch], inputs: int, reference_inputs: int = 0) -> Verdict:
    """On the first `inputs` of `batches`; the first `reference_inputs` of them against the int64 reference too."""
    verdict = Verdict()
    for x, _ in batches:
        x = x[:inputs - verdict.inputs]
        want, codes = recorded(fast.exact, x)
        got, found = (want, codes) if fast.unsupported else recorded(fast, x)
        verdict.inputs += len(x)
        verdict.values = len(codes)
        verdict.wrong_outputs += sum(int((one != other).sum()) for one, other in zip(
            tensors_in(got), tensors_in(want), strict=True))
        verdict.codes += sum(value.numel() for value in codes.values())
        verdict.wrong += sum(int((found[key] != value).sum()) for key, value in codes.items())
        some = min(reference_inputs - verdict.reference_inputs, len(x))
        if some > 0:
            x = x[:some]  # what computes in float may round differently in a batch of another size
            _against_reference(verdict, fast.exact, x, recorded(fast.exact, x)[1])
        if verdict.inputs >= inputs:
            break
    return verdict


def _against_reference(verdict: Verdict, exact: IntegerNetwork, x: Tensor, codes: Recorded) -> None:
    run = ReferenceRun(exact, x)
    verdict.reference_inputs += len(x)
    for (name, form), value in codes.items():
        want = run.codes(name, form) if isinstance(form, ActivationQuantizer) else run.real(name)
        verdict.reference_codes += value.numel()
        verdict.reference_wrong += int((torch.from_numpy(want).float() != value).sum())
