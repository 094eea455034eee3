"""Why the file did not shrink although nine of ten weights are zero.

What to see: `torch.save` writes every float32, zero or not. A sparse format pays for positions: 32-bit indices eat what
the zeros save. General compressors find the zeros, not the structure. An entropy coder on codes and positions comes
close to the information that is there; what then weighs is all that was left in float.
"""

import io
import lzma
import tempfile
import zlib
from pathlib import Path

import torch

from methods import Budget, apply, encode, prune_then_quantize

from .common import digits_task, trained


def main() -> None:
    network = trained()
    made = prune_then_quantize.compress(network, digits_task(), Budget(density=0.1, bits=4),
                                        prune_then_quantize.Config(), torch.Generator().manual_seed(0))
    state = apply(made, network).state_dict()
    floats = saved(state)
    sparse = saved({name: value.to_sparse() if value.ndim > 1 else value for name, value in state.items()})
    with tempfile.TemporaryDirectory() as folder:
        size = encode(made, Path(folder) / "net.jc")
    print(f"torch.save, dense float32     {len(floats):7,} B   every zero has four bytes")
    print(f"torch.save, sparse tensors    {len(sparse):7,} B   an int64 index for each dimension of each kept weight")
    print(f"zlib of the dense file        {len(zlib.compress(floats, 9)):7,} B")
    print(f"xz of the dense file          {len(lzma.compress(floats)):7,} B")
    print(f"codes and positions, coded    {size.total:7,} B   {size}")
    assert size.total < len(lzma.compress(floats)) < len(floats)


def saved(state: dict) -> bytes:
    out = io.BytesIO()
    torch.save(state, out)
    return out.getvalue()


if __name__ == "__main__":
    main()
