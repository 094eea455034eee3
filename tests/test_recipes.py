"""How baselines are trained on pictures of one's own: tables, options, and a word where nothing was learned."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest

from benchmarks import recipes, sources
from benchmarks.__main__ import main
from benchmarks.baselines import Setup, changed, find_setup
from benchmarks.chance import at_chance
from benchmarks.data import open_dataset
from benchmarks.recipes import picture_size
from benchmarks.rows import read_rows
from methods.core.errors import ConfigError
from methods.core.train.finetune import Recipe

TABLES = """
[default]
batch_size = 1
recipe = { epochs = 1, lr = 0.1 }
[folder]
image_size = 12
[folder.default]
batch_size = 2
recipe = { epochs = 1, lr = 0.2 }
["folder:pets"]
image_size = 10
["folder:pets".vgg16]
batch_size = 3
recipe = { epochs = 1, lr = 0.3 }
["folder:plants".default]
batch_size = 4
recipe = { epochs = 1, lr = 0.4 }
["folder:bad"]
image_size = 0
"""
TRAIN = ["--network", "resnet18w2", "--setup", "recipe.lr=0.05", "recipe.epochs=2", "batch_size=4", "augment=none"]


@pytest.fixture
def tables(tmp_path):
    path = tmp_path / "baselines.toml"
    path.write_text(TABLES)
    return path


@pytest.fixture
def pets(tmp_path):
    """Black and white pictures of 20 x 20, 10 of each; noise tells them apart."""
    for name, level in (("black", 20), ("white", 220)):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(20):
            noise = np.random.default_rng(1000 * level + i).integers(0, 30, (20, 20, 3))
            Image.fromarray((level + noise).clip(0, 255).astype(np.uint8)).save(
                tmp_path / "pets" / name / f"{i}.png")
    return tmp_path / "pets"


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words):
        code = main([*map(str, words), "--results", str(tmp_path / "results")])
        out, err = capsys.readouterr()
        return code, out, err
    return run


def test_tables_are_looked_up_from_the_particular_to_the_general(tables):
    wanted = {("folder:pets", "vgg16"): 3, ("folder:pets", "resnet20"): 2, ("folder:plants", "vgg16"): 4,
              ("folder:other", "vgg16"): 2, ("mnist", "vgg16"): 1}
    for (task, network), batch_size in wanted.items():
        assert find_setup(task, network, tables).batch_size == batch_size, task
    assert {task: picture_size(task, tables) for task in ("folder:pets", "folder:plants", "mnist")} == {
        "folder:pets": 10, "folder:plants": 12, "mnist": None}
    with pytest.raises(ConfigError, match="image_size of folder:bad = 0: allowed is 1 or more pixels"):
        picture_size("folder:bad", tables)


def test_the_tables_that_are_shipped_give_folders_and_imagenet_a_setup():
    assert find_setup("folder:any", "resnet18").batch_size == 128
    assert find_setup("imagenet:any", "torchvision:alexnet").augment == "imagenet"


def test_a_folder_takes_its_size_from_its_table_or_the_option(tables, pets, monkeypatch):
    assert open_dataset(f"folder:{pets}").image_shape == (32, 32, 3)
    monkeypatch.setattr("benchmarks.data.picture_size", lambda task: picture_size(task, tables))
    assert open_dataset(f"folder:{pets}").image_shape == (10, 10, 3)
    assert open_dataset(f"folder:{pets}", image_size=6).image_shape == (6, 6, 3)
    for name in ("digits", "mnist"):
        with pytest.raises(ConfigError, match=f"image_size = 6: {name} has pictures of one size"):
            open_dataset(name, image_size=6)


def test_setups_are_changed_key_by_key():
    setup = Setup(Recipe(epochs=5, lr=0.1, weight_decay=0.3), batch_size=7)
    found = changed(setup, {"augment": "imagenet", "recipe": {"lr": 0.2}})
    assert found == Setup(Recipe(epochs=5, lr=0.2, weight_decay=0.3), batch_size=7, augment="imagenet")


@pytest.mark.parametrize("labels", [[0, 1] * 5, [0] * 30 + [1] * 10, [0, 1, 2, 3] * 25])
def test_chance_is_a_binomial_test_against_the_commonest_class(labels):
    labels = torch.tensor(labels)
    n, guess = len(labels), float(labels.bincount().max()) / len(labels)
    for right in range(n + 1):
        p = binomtest(right, n, guess, alternative="greater").pvalue
        assert at_chance(100 * right / n, labels) == (p > 0.025), (right, p)


class TestCommandLine:
    def test_options_reach_training_and_the_row(self, run, pets, tmp_path):
        code, out, err = run("compress", "dfq", "--task", f"folder:{pets}", *TRAIN, "--image-size", 16,
                             "--budget", "bits=8", "--name", "one")
        assert code == 0 and "chance" not in err, err
        (row,) = read_rows(tmp_path / "results" / "rows" / "own", lambda line: None)
        assert row["setup"] == {"batch_size": 4, "augment": "none", "autocast": False}
        assert row["data"] == open_dataset(f"folder:{pets}", image_size=16).digest
        assert row["baseline_top1"] == 100 and row["task"] == "folder:pets"
        code, out, err = run("measure", tmp_path / "results" / "models" / row["file"], "--task", f"folder:{pets}",
                             "--network", "resnet18w2", "--image-size", 16)
        assert code == 0 and '"top1_float": 100.0' in out, err
        code, out, err = run("train", "--task", f"folder:{pets}", *TRAIN, "--image-size", 16)
        assert code == 0 and "test 100.00 %" in out.replace("\n", " ")

    def test_a_baseline_at_chance_is_said_in_one_line(self, run, pets):
        words = ["--task", f"folder:{pets}", *TRAIN]
        words[words.index("recipe.lr=0.05")] = "recipe.lr=1e-9"
        for command in (["train"], ["compress", "dfq", "--budget", "bits=8"]):
            code, _, err = run(*command, *words, "--image-size", 8)
            said = [line for line in err.splitlines() if "chance" in line]
            assert code == 0 and len(said) == 1 and "of 8 test pictures of folder:pets" in said[0], err

    def test_mistakes_are_one_line_before_pictures_are_read(self, run, pets, monkeypatch):
        monkeypatch.setattr(sources, "read", None)
        words = ["compress", "dfq", "--task", f"folder:{pets}", "--network", "resnet18w2"]
        for more, fault in ((["--setup", "recipe.rate=1"], "unknown key --setup recipe.'rate'"),
                            (["--setup", "recipe.lr=fast"], "--setup recipe.lr = 'fast': needed is a number"),
                            (["--setup", "augment=mirror"], "unknown augmentation 'mirror'"),
                            (["--setup", "batch_size=0"], "--setup batch_size = 0"),
                            (["--setup", "lr=0.1"], "unknown key --setup 'lr'; allowed are: recipe, batch_size"),
                            (["--image-size", "-1"], "image_size = -1: allowed is 1 or more pixels")):
            code, out, err = run(*words, *more)
            assert code == 1 and not out and err.startswith("error: ") and err.count("\n") == 1 and fault in err, err

    def test_a_recipe_is_no_use_with_a_checkpoint(self, run, pets, tmp_path):
        code, _, err = run("compress", "dfq", "--task", f"folder:{pets}", *TRAIN, "--checkpoint", tmp_path / "x.pth")
        assert code == 1 and err == "error: --setup recipe... trains a baseline, --checkpoint gives one: choose\n"


def test_the_file_of_tables_is_the_projects():
    assert recipes.RECIPES.name == "baselines.toml" and recipes.RECIPES.is_file()
