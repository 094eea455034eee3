"""The command line: `python -m benchmarks COMMAND`. Everything a person reads is printed from here."""

import argparse
import ast
import importlib
import io
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from methods.core.errors import CompressError

from .rows import RESULTS, visible

EPILOG = "Data: --data-dir, else $JOINTCOMPRESS_DATA, else the user's cache folder. Progress goes to stderr."


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks", description="Compress, store, decode, measure, compare.",
                                  epilog=EPILOG)
    subs = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = argparse.ArgumentParser(add_help=False)
    _add_data(run)
    run.add_argument("--results", type=Path, default=RESULTS, help="folder for rows, models and reports")
    run.add_argument("--device", default="cpu", help="cpu or cuda")
    run.add_argument("--seed", type=_seed, help="of the method (default: the job's, else 0); train: of the training")
    run.add_argument("--checkpoint", type=Path, help="start from this one (.safetensors, .pt, .pth, .tar, .npz)")
    run.add_argument("--epochs", type=int, help="train the baseline now, so long, though one is shipped")
    run.add_argument("--setup", nargs="+", default=[], metavar="KEY=VALUE",
                     help="in place of baselines.toml: batch_size and augment, with which methods train, too, or "
                          "recipe.lr, recipe.epochs ... of a baseline that is trained now")
    run.add_argument("--resume", action="store_true",
                     help="continue an interrupted run of the same command; what is finished is not done again")

    def command(name, function, text, parents=()):
        sub = subs.add_parser(name, help=text, description=text, parents=list(parents), allow_abbrev=False)
        sub.set_defaults(function=function)
        return sub

    sub = command("compare", "commands.compare", "every method on one task: a table and a report", [run])
    sub.add_argument("--task", default="digits", help="digits, mnist, cifar10, folder:DIR or imagenet:DIR")
    sub.add_argument("--network", help="default: the one usual for the task")
    sub.add_argument("--methods", nargs="+", default=[], help="only these")
    _add_rows(command, run)
    sub = command("train", "commands.train", "train a baseline by paper_configs/baselines.toml", [run])
    sub.add_argument("--task", required=True)
    sub.add_argument("--network", required=True)
    sub.add_argument("--out", type=Path, help="checkpoint to write (default: a new one among the baselines)")
    sub = command("compress", "commands.compress", "one method on one network", [run])
    sub.add_argument("method")
    sub.add_argument("--task", default="digits")
    sub.add_argument("--network", help="default: the one usual for the task")
    sub.add_argument("--budget", nargs="+", default=[], metavar="KEY=VALUE", help="such as density=0.1 bits=4")
    sub.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE",
                     help="configuration, such as retrain.epochs=3")
    sub.add_argument("--index-bits", type=int, default=5)
    sub.add_argument("--no-shrink", action="store_true", help="leave dead units in the file")
    sub.add_argument("--name", help="of the row and file (default: method, budget and settings)")
    sub.add_argument("--rows-name", default="own", help="table of the row: a folder under results/rows (default: own)")
    _add_reports(command, run)
    _add_listings(command)
    sub = command("completion", _completion, "a completion script for a shell, to be evaluated there")
    sub.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    _add_tools(command)
    return top


def _add_rows(command, run) -> None:
    sub = command("reproduce", "commands.reproduce", "the rows of one paper table, beside the printed numbers",
                  [run, _making()])
    sub.add_argument("config", type=Path, help="a file of paper_configs")
    _add_choice(sub)
    sub = command("sweep", "sweep.sweep", "the rows of several paper tables at once, or on a cluster", [run, _making()])
    sub.description, sub.formatter_class = _documentation("sweep"), argparse.RawDescriptionHelpFormatter
    sub.add_argument("configs", nargs="+", type=Path, metavar="CONFIG", help="files of paper_configs")
    _add_choice(sub)
    sub.add_argument("--seeds", type=int, default=1, help="of every row, counted from its own")
    sub.add_argument("--workers", type=int, default=1, help="processes here; 0: one row after the other (default: 1)")
    sub.add_argument("--cluster", metavar="ADDRESS", help="of a Dask scheduler, in place of --workers")
    sub.add_argument("--threads", type=int, help="of each row (default: the cores here over the workers)")
    sub = command("remeasure", "again.remeasure", "rows from the files that they name, with what the harness measures "
                  "today; nothing is compressed", [run])
    sub.add_argument("configs", nargs="+", type=Path, metavar="CONFIG", help="files of paper_configs")
    _add_choice(sub)


def _add_choice(sub) -> None:
    sub.add_argument("--row", nargs="+", default=[], help="only the rows of these names")
    sub.add_argument("--network", nargs="+", default=[], help="only the rows of these networks")


def _making() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(add_help=False)
    found.add_argument("--no-measure", action="store_true", help="make the files only; the same command with --resume "
                       "measures them, also on another machine that the results folder was copied to")
    return found


def _add_sensitivity(command, run) -> None:
    sub = command("sensitivity", "sensitivity.sensitivity", "which layer can be pruned or rounded how far, one at a "
                  "time, on held-out data: curves, a picture, and rates of layers for a budget", [run])
    sub.add_argument("--task", default="digits")
    sub.add_argument("--network", help="default: the one usual for the task")
    sub.add_argument("--rates", nargs="+", type=float, metavar="KEPT", help="kept shares (default: 0.95 0.9 ... 0.05)")
    sub.add_argument("--bits", nargs="*", type=int, help="round to these widths in place of pruning (default: 8 ... 2)")
    sub.add_argument("--criterion", default="level", help="what pruning ranks by (default: level)")
    sub.add_argument("--granularity", default="weight", help="of pruning: weight (default) or channel")
    sub.add_argument("--scheme", default="symmetric", help="grid of --bits: symmetric (default), mse or asymmetric")
    sub.add_argument("--budget", nargs="+", default=[], metavar="KEY=VALUE",
                     help="density=D or bits=B, the mean: also list the rates of layers whose errors rise alike")


def _add_data(sub) -> None:
    sub.add_argument("--data-dir", type=Path, help="folder with cifar10.npz, mnist.npz or imagenet/")
    sub.add_argument("--image-size", type=int, metavar="PIXELS",
                     help="of pictures from files (default: as baselines.toml says, else 32; of ImageNet 224)")


def _completion(options: argparse.Namespace, console: Console) -> None:
    from .listing import completion
    print(completion(parser(), options.shell))


def _add_listings(command) -> None:
    sub = command("methods", "listing.methods", "all methods, the data they need, their papers; of one, its settings")
    sub.add_argument("method", nargs="?", help="list the settings of this one, with defaults")
    sub = command("diff", "listing.diff", "what two rows or two compressed files differ in")
    sub.add_argument("one", type=Path)
    sub.add_argument("other", type=Path)
    sub = command("fetch", "listing.fetch", "download known data sets beforehand")
    sub.add_argument("names", nargs="*", metavar="NAME", help="mnist, cifar10 (default: all)")
    sub.add_argument("--data-dir", type=Path)


def _add_reports(command, run) -> None:
    _add_sensitivity(command, run)
    sub = command("report", "commands.report", "table and page from existing rows")
    sub.add_argument("name", nargs="?", default="compare_digits", help="table: a folder under results/rows")
    sub.add_argument("--rows", type=Path, help="any other folder of rows")
    sub.add_argument("--results", type=Path, default=RESULTS)
    sub = command("claims", "tools.claims", "what is said of the field, put to the rows")
    sub.add_argument("--results", type=Path, default=RESULTS)
    sub = command("docs", "commands.docs", "the site: a page a paper and a table, an index, the library's pages")
    sub.add_argument("--out", type=Path, default=Path("site"), help="folder (default: site)")
    sub.add_argument("--no-api", action="store_true", help="without the pages of the library")
    sub.add_argument("--readme", action="store_true", help="refresh README, its picture and results/TABLES.md, too")
    sub.add_argument("--results", type=Path, default=RESULTS)
    sub = command("cite", "tools.cite", "BibTeX of methods")
    sub.add_argument("methods", nargs="*", metavar="METHOD", help="default: all")


def _add_networks(command) -> None:
    sub = command("networks", "tools.try_networks", "torchvision's classifiers, random weights, under the methods")
    sub.add_argument("--networks", nargs="+", default=[], help="only these")
    sub.add_argument("--methods", nargs="+", default=[], help="only these")
    sub.add_argument("--out", type=Path, default=RESULTS / "networks.json",
                     help="what is known already, and is not tried again")


def _add_elsewhere(command) -> None:
    for name, function, text in (
            ("export", "elsewhere.export_file", "a file as an ONNX graph of 8-bit integers, or as a C header"),
            ("bench", "elsewhere.bench_file", "CPU time of a file here and in other engines")):
        sub = command(name, function, text)
        sub.add_argument("file", type=Path)
        if name == "export":
            sub.add_argument("out", type=Path, help="a .onnx file, or a .h file: codes, tables, scales, geometry")
            sub.add_argument("--opset", type=int, help="13 (default), or 21 for weights of 4 bits")
            sub.add_argument("--residual", help="accumulators that an add takes: float (default) or int8")
            sub.add_argument("--arithmetic", help="qdq (default): engines run it in their integers; exact: the codes "
                             "that it has here, spelled out in float32")
            sub.add_argument("--windows", default="refuse", help="SPARQ's bit windows: refuse (default) or drop")
            sub.add_argument("--inputs", type=int, help="test inputs to compare on (default: 10000)")
        else:
            sub.add_argument("--batch", type=int, default=64)
            sub.add_argument("--rounds", type=int, default=7)
            sub.add_argument("--threads", type=int, default=1)
        sub.add_argument("--task", required=True)
        sub.add_argument("--network", required=True)
        _add_data(sub)
        sub.add_argument("--float-policy", nargs="*", default=[], metavar="LAYER", help="layers to run in float")


def _add_tools(command) -> None:
    _add_networks(command)
    for name, function, text in (
            ("measure", "tools.measure_file", "everything a row says about a file"),
            ("verify", "tools.verify_file", "compare the fast integer kernels with the exact ones, code by code")):
        sub = command(name, function, text)
        sub.add_argument("file", type=Path)
        sub.add_argument("--task", required=True)
        sub.add_argument("--network", required=True)
        _add_data(sub)
        sub.add_argument("--float-policy", nargs="*", default=[], metavar="LAYER", help="layers to run in float")
        if name == "measure":
            sub.add_argument("--index-bits", nargs="+", default=["5"], metavar="BITS",
                             help="one number, auto, LAYER=BITS for each layer, or row: those of the file's row")
            sub.add_argument("--results", type=Path, default=RESULTS, help="where that row is looked for")
        else:
            sub.add_argument("--inputs", type=int, default=10_000, help="test inputs")
            sub.add_argument("--reference", type=int, default=100, help="of them through the int64 reference too")
    _add_elsewhere(command)
    sub = command("speed", "tools.speed", "CPU time of the integer kernels beside float32, and of a training step of "
                  "each method beside a plain one, on random pictures")
    sub.add_argument("files", type=Path, nargs="*", help="compressed files of --network (default: forms made of it)")
    sub.add_argument("--part", choices=("all", "kernels", "training"), default="all")
    sub.add_argument("--network", default="resnet18")
    sub.add_argument("--batch", type=int, default=64, help="of the kernels")
    sub.add_argument("--train-batch", type=int, default=256, help="of the training steps")
    sub.add_argument("--rounds", type=int, default=7)
    sub.add_argument("--threads", type=int, default=1)
    sub = command("inspect", "look.inspect_file", "what a compressed file holds, layer by layer")
    sub.add_argument("file", type=Path)
    sub.add_argument("--json", action="store_true")
    sub = command("shrink", "tools.shrink_files", "what removing dead units makes of files: sizes, channels, outputs")
    sub.add_argument("files", type=Path, nargs="*", help="default: the stored files of all MNIST rows")
    sub.add_argument("--task", help="default: as the row of the file says; so the network")
    sub.add_argument("--network")
    _add_data(sub)
    sub.add_argument("--results", type=Path, default=RESULTS)
    sub.add_argument("--json", action="store_true")
    sub = command("decode", "tools.decode_file", "a compressed file as plain float weights")
    sub.add_argument("file", type=Path)
    sub.add_argument("out", type=Path, help="a .safetensors file")


def _function(target: Callable | str) -> Callable:
    """A command's function; "module.name" is imported only now, since most of them load torch."""
    if callable(target):
        return target
    module, name = target.split(".")
    return getattr(importlib.import_module(f".{module}", __package__), name)


def _documentation(module: str) -> str | None:
    """The docstring of a module beside this one, which is not imported for it."""
    return ast.get_docstring(ast.parse((Path(__file__).parent / f"{module}.py").read_text()))


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r}: a seed is a whole number from 0 to 2^63 - 1")
    return int(text)


class Terminal(Console):
    """A console that shows control characters of names and paths instead of obeying them."""

    def print(self, *objects, **more):
        super().print(*(visible(one) if isinstance(one, str) else one for one in objects), **more)


def _text(error: Exception) -> str:
    """Of an error of the system its reason, and the file it refused if that is known."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def main(words: list[str]) -> int:
    options = parser().parse_args(words)
    options.words = words
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without, say, dashes is no reason to fail
    try:
        _function(options.function)(options, Terminal(markup=False, emoji=False))
    except (CompressError, OSError) as error:
        print(f"error: {visible(' '.join(_text(error).split()))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        hint = "; the same command with --resume continues" if hasattr(options, "resume") else ""
        print(f"interrupted{hint}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
