"""paper_configs/baselines.toml: how networks are trained on which data, and the size of pictures from files.

Tables are looked up from the particular to the general: [TASK.NETWORK], [TASK.default], the same of the task's kind
(of folder:pets it is folder), and [default]. TASK or its kind may hold `image_size`.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from methods.core.errors import ConfigError

from .rows import ROOT
from .settings import read_toml

RECIPES = ROOT / "paper_configs" / "baselines.toml"
SIZE = "image_size"


def setup_table(task: str, network: str, recipes: Path = RECIPES) -> Mapping[str, Any]:
    """The values of a `baselines.Setup` for a task and network; ConfigError if there are none."""
    for table in _tables_of(task, recipes):
        found = table.get(network, table.get("default"))
        if found is not None:
            return found
    found = read_toml(recipes).get("default")
    if found is None:
        raise ConfigError(f"{recipes.name} has no table [{task}.{network}], [{task}.default] or [default]")
    return found


def picture_size(task: str, recipes: Path = RECIPES) -> int | None:
    """Side in pixels of the pictures of a task, or None where its tables leave it open; ConfigError for a bad one."""
    for table in _tables_of(task, recipes):
        if SIZE in table:
            if type(table[SIZE]) is not int or table[SIZE] < 1:
                raise ConfigError(f"{recipes.name}: {SIZE} of {task} = {table[SIZE]!r}: allowed is 1 or more pixels")
            return table[SIZE]
    return None


def _tables_of(task: str, recipes: Path) -> Iterator[Mapping[str, Any]]:
    """Of a task and of its kind, as far as there are any."""
    tables = read_toml(recipes)
    for name in dict.fromkeys((task, task.partition(":")[0])):
        if not isinstance(tables.get(name, {}), Mapping):
            raise ConfigError(f"{recipes.name}: {name} must be a table")
        yield tables.get(name, {})
