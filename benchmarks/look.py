"""What a compressed file holds, as a table. Nothing here loads torch: a look at a file takes half a second."""

from argparse import Namespace
from collections.abc import Mapping

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from methods.core.file.describe import inspect

PARTS = ("codes", "positions", "codebook")


def inspect_file(options: Namespace, console: Console) -> None:
    found = inspect(options.file)
    if options.json:
        console.print_json(data=found)
        return
    console.print(as_table(found))
    console.print(summary(found), soft_wrap=True)


def as_table(found: Mapping) -> Table:
    """A row a layer, then what the file holds beside them."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("layer", overflow="fold")
    for header in ("shape", "grid", "bits", "kept", "%", "bytes", "share"):
        table.add_column(header, justify="left" if header in ("shape", "grid") else "right", no_wrap=True)
    for layer in found["layers"]:
        size = sum(layer["bytes"][part] for part in PARTS)
        table.add_row(layer["name"], "x".join(map(str, layer["shape"])), layer["grid"], str(layer["bits"]),
                      f"{layer['kept']:,}", f"{100 * layer['density']:.2f}", f"{size:,}", _share(size, found["bytes"]))
    for part, name in (("rest", f"{len(found['rest'])} float tensors"),
                       ("activations", f"{found['activations']} activation ranges"), ("header", "header")):
        size = found["split"][part]
        table.add_row(name, "", "", "", "", "", f"{size:,}", _share(size, found["bytes"]))
    return table


def summary(found: Mapping) -> str:
    """Lines below the table."""
    split = ", ".join(f"{part} {size:,}" for part, size in found["split"].items())
    floats = ", ".join(f"{name} {size:,} B" for name, size in found["float_layers"].items())
    ranges = f"{found['activations']} by the {found['ranges_by']}, {found['windows']} with bit windows"
    share = f"{found['float_share']:.1%} of the float32 network"
    return (f"{found['bytes']:,} bytes, format {found['version']}, mode {found['mode']}: {split}\n"
            f"activation ranges: {ranges}\n"
            f"weights that stay float: {floats if floats else 'none'}, {share}")


def _share(size: int, whole: int) -> str:
    return f"{100 * size / whole:.1f} %"
