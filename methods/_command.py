"""The console script `jointcompress`: what a file holds, and its plain weights. The harness runs from the clone."""

import argparse
import json
import sys
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    from . import __version__

    top = argparse.ArgumentParser(prog="jointcompress", description="Look into compressed networks.",
                                  epilog="Compressing, measuring and comparing: python -m benchmarks, in the clone.")
    top.add_argument("--version", action="version", version=f"jointcompress {__version__}")
    subs = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    subs.add_parser("methods", help="the methods that are installed")
    sub = subs.add_parser("inspect", help="what a file holds and what its bytes are for, as JSON")
    sub.add_argument("file", type=Path)
    sub = subs.add_parser("decode", help="a file as plain float weights")
    sub.add_argument("file", type=Path)
    sub.add_argument("out", type=Path, help="a .safetensors file")
    return top


def answer(options: argparse.Namespace) -> str:
    """What the command says; imports wait until they are needed."""
    if options.command == "methods":
        from . import method_names

        return "\n".join(method_names())
    from .core.file.storage import decode, inspect

    if options.command == "inspect":
        return json.dumps(inspect(options.file), indent=2)
    import safetensors.torch

    from .core.errors import ConfigError
    from .core.file.container import write_file

    if options.out.suffix != ".safetensors":
        raise ConfigError(f"{options.out}: written are only .safetensors")
    state = {name: tensor.contiguous() for name, tensor in decode(options.file).state_dict().items()}
    write_file(options.out, safetensors.torch.save(state))
    return f"{options.out}: {len(state)} tensors"


def main(words: list[str] | None = None) -> int:
    from .core.errors import CompressError

    try:
        sys.stdout.write(answer(parser().parse_args(words)) + "\n")
    except (CompressError, OSError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 1
    return 0
