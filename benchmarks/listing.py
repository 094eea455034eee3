"""Commands that list: methods, the settings of one, what two rows or files differ in; and data fetched beforehand."""

import dataclasses
import json
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from methods import find_method, method_names
from methods.core.errors import ConfigError
from methods.core.file.describe import inspect

from .citations import authors, entries
from .docs.words import DATA, method_name
from .rows import read_row
from .settings import plain
from .sources import PUBLISHED, data_directory, read


def methods(options: Namespace, console: Console) -> None:
    """Every method: the data it needs, how many settings it has, its paper; of one, the settings themselves."""
    if options.method is not None:
        settings(options.method, console)
        return
    known = entries()
    table = _table("method", "data it needs", "settings", "paper")
    for name in method_names():
        module = find_method(name)
        paper = authors(known[name]) if name in known else "of this project"
        table.add_row(name, DATA.get(module.DATA, module.DATA), str(len(dataclasses.fields(module.Config))), paper)
    console.print(table)


def settings(method: str, console: Console) -> None:
    """The fields of a method's Config with their defaults, for --set; then what its docstring says of them."""
    module = find_method(method)
    table = _table("setting", "kind", "default")
    for name, kind, value in spelled(module.Config):
        table.add_row(name, kind, value)
    console.print(table)
    console.print(f"{method_name(method)}, --set SETTING=VALUE. " + " ".join((module.Config.__doc__ or "").split()),
                  soft_wrap=True)


def spelled(config: type, where: str = "") -> list[tuple[str, str, str]]:
    """(name, kind, default) of every field of a dataclass, nested ones with dots."""
    found = []
    for field in dataclasses.fields(config):
        factory = field.default_factory
        value = field.default if factory is dataclasses.MISSING else factory()
        name, kind = f"{where}{field.name}", getattr(field.type, "__name__", str(field.type))
        if dataclasses.is_dataclass(value):
            found += [(f"{name}.{inner}", "", json.dumps(plain(getattr(value, inner))))
                      for inner in (f.name for f in dataclasses.fields(value))]
        else:
            found.append((name, kind, "needed" if value is dataclasses.MISSING else json.dumps(plain(value))))
    return found


def diff(options: Namespace, console: Console) -> None:
    """What differs between two rows (.json) or two compressed files (.jc)."""
    suffixes = {path.suffix for path in (options.one, options.other)}
    if suffixes == {".json"}:
        pair = [dict(read_row(path)) for path in (options.one, options.other)]
    elif suffixes == {".jc"}:
        pair = [inspect(path) for path in (options.one, options.other)]
    else:
        raise ConfigError(f"{options.one} and {options.other}: two rows (.json) or two compressed files (.jc) can be "
                          "compared")
    table = _table("what", options.one.name, options.other.name)
    lines = differences(*pair)
    for name, one, other in lines:
        table.add_row(name, one, other)
    console.print(table if lines else "they say the same")


def differences(one: Mapping[str, Any], other: Mapping[str, Any], where: str = "") -> list[tuple[str, str, str]]:
    """(dotted key, value, value) wherever two nestings of plain values differ; long values are cut."""
    found = []
    for key in dict.fromkeys([*one, *other]):
        a, b = one.get(key), other.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{where}{key}.")
        elif a != b or (key in one) != (key in other):
            found.append((f"{where}{key}", _cut(a, key in one), _cut(b, key in other)))
    return found


def _cut(value: Any, there: bool) -> str:
    text = json.dumps(value, ensure_ascii=False) if there else "—"
    return text if len(text) <= 60 else f"{text[:57]}..."


def fetch(options: Namespace, console: Console) -> None:
    """Known data sets, downloaded now by torchvision, which checks their digests."""
    names = options.names if options.names else list(PUBLISHED)
    unknown = [name for name in names if name not in PUBLISHED]
    if unknown:
        raise ConfigError(f"unknown data set {unknown[0]!r}; there are: {', '.join(PUBLISHED)}")
    for name in names:
        source = read(name, options.data_dir, 0)
        console.print(f"{data_directory(options.data_dir) / (name + '.npz')}: {len(source.train[0]):,} training and "
                      f"{len(source.test[0]):,} test images", soft_wrap=True)


def completion(parser: ArgumentParser, shell: str) -> str:
    """A completion script for bash, zsh or tcsh."""
    import shtab
    return shtab.complete(parser, shell=shell)


def _table(*heads: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for head in heads:
        table.add_column(head, overflow="fold", no_wrap=head == "method")
    return table
