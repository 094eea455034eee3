"""Where pictures come from: files, folders, and every way in which they can be wrong."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import _torchvision, sources
from benchmarks.data import make_task, open_dataset
from methods.core.errors import ConfigError


def labelled(split):
    """Each image with its label, as hashable bytes."""
    return [image.numpy().tobytes() + bytes([int(label)])
            for image, label in zip(split.images, split.labels, strict=True)]


@pytest.fixture
def any_pictures(monkeypatch):
    """Known sets are taken by their form alone."""
    free = {name: replace(spec, digest=None) for name, spec in sources.PUBLISHED.items()}
    monkeypatch.setattr(sources, "PUBLISHED", free)


@pytest.fixture(scope="module")
def fake_arrays():
    """Arrays of MNIST's shapes whose images all differ."""
    arrays = {}
    for part, count in (("train", 60_000), ("test", 10_000)):
        images = np.zeros((count, 28, 28), dtype=np.uint8)
        images.reshape(count, -1)[:, :4] = np.arange(count, dtype="<u4").view(np.uint8).reshape(count, 4)
        images[:, 5, 5] = part == "test"
        arrays[f"{part}_images"], arrays[f"{part}_labels"] = images, (np.arange(count) % 10).astype(np.uint8)
    return arrays


@pytest.fixture
def fake_mnist(fake_arrays, any_pictures):
    return fake_arrays


def test_noise_of_the_right_shape_is_not_mnist(fake_arrays, tmp_path):
    np.savez(tmp_path / "mnist.npz", **fake_arrays)
    with pytest.raises(ConfigError, match="mnist.npz does not hold mnist as it was published .digest [0-9a-f]{16}"):
        open_dataset("mnist", tmp_path)


def one_line(error, *words):
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert word in text
    return True


def write_picture(path, array):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def picture_tree(root, classes=("cat", "dog"), count=10, start=0):
    for i in range(count):
        for j, name in enumerate(classes):
            write_picture(root / name / f"{i}.png", np.full((4, 4, 3), start + 20 * j + i, dtype=np.uint8))


class TestSplits:
    def test_the_order_of_a_file_changes_nothing(self, fake_mnist, tmp_path):
        np.savez(tmp_path / "mnist.npz", **fake_mnist)
        one = open_dataset("mnist", tmp_path)
        shuffled = {}
        for part in ("train", "test"):
            order = np.random.default_rng(1).permutation(len(fake_mnist[f"{part}_labels"]))
            shuffled |= {key: fake_mnist[key][order] for key in (f"{part}_images", f"{part}_labels")}
        shuffled |= {key: shuffled[key].astype(np.int64) for key in shuffled if key.endswith("labels")}
        np.savez(tmp_path / "mnist.npz", **shuffled)
        two = open_dataset("mnist", tmp_path)
        assert one.digest == two.digest
        for part in ("train", "held_out", "test"):
            assert torch.equal(getattr(one, part).images, getattr(two, part).images)
        assert [len(one.train), len(one.held_out), len(one.test)] == [55_000, 5_000, 10_000]
        assert one.held_out.labels.bincount().tolist() == [500] * 10
        assert not set(labelled(one.train)) & set(labelled(one.held_out))
        assert one.image_shape == (28, 28, 1) and (one.mean, one.std) == ((0.1307,), (0.3081,))

    def test_another_pixel_is_another_digest(self, tmp_path):
        grey = {name: np.arange(300, dtype=np.uint8).reshape(10, 10, 3) for name in ("a", "b")}
        digests = set()
        for shift in (0, 1):
            root = tmp_path / str(shift)
            for label, image in grey.items():
                for i in range(5):
                    write_picture(root / label / f"{i}.png", image + np.uint8(10 * i + shift))
            digests.add(open_dataset(f"folder:{root}", image_size=10).digest)
        assert len(digests) == 2


class TestArchives:
    def test_where_the_file_is_looked_for(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.delenv("JOINTCOMPRESS_DATA", raising=False)
        assert sources.data_directory() == tmp_path / "cache" / "jointcompress"
        monkeypatch.setenv("JOINTCOMPRESS_DATA", str(tmp_path / "data"))
        assert sources.data_directory() == tmp_path / "data"
        assert sources.data_directory(tmp_path) == tmp_path

    def test_a_download_is_converted_once(self, fake_mnist, monkeypatch, tmp_path):
        calls = []
        monkeypatch.setattr(_torchvision, "download", lambda name, folder: calls.append(name) or fake_mnist)
        first, second = open_dataset("mnist", tmp_path / "new"), open_dataset("mnist", tmp_path / "new")
        assert calls == ["mnist"] and first.digest == second.digest
        assert [file.name for file in (tmp_path / "new").iterdir()] == ["mnist.npz"]

    @pytest.mark.parametrize("fault", [OSError("no route"), RuntimeError("mirror\nis down"), ImportError("no tv")])
    def test_without_file_and_network_both_remedies_are_named(self, fault, monkeypatch, tmp_path):
        def download(name, folder):
            raise fault
        monkeypatch.setattr(_torchvision, "download", download)
        with pytest.raises(ConfigError) as error:
            open_dataset("cifar10", tmp_path)
        assert one_line(error, str(tmp_path / "cifar10.npz"), "train_images", "JOINTCOMPRESS_DATA", "network access")
        assert list(tmp_path.iterdir()) == []

    def test_malformed_files(self, fake_mnist, tmp_path):
        small = {key: value[:10] for key, value in fake_mnist.items()}
        cases = [
            ({key: value for key, value in small.items() if key != "test_labels"}, "test_labels"),
            (small, "[60000, 28, 28, 1]"),
            (fake_mnist | {"train_images": fake_mnist["train_images"].astype(np.float32)}, "uint8"),
            (fake_mnist | {"train_labels": fake_mnist["train_labels"].astype(np.float32)}, "integers"),
            (fake_mnist | {"test_labels": fake_mnist["test_labels"] + np.uint8(1)}, "0..9"),
            (small | {"test_labels": np.array([{}] * 10)}, "plain arrays"),
        ]
        for arrays, word in cases:
            np.savez(tmp_path / "mnist.npz", **arrays)
            with pytest.raises(ConfigError) as error:
                open_dataset("mnist", tmp_path)
            assert one_line(error, word, str(tmp_path / "mnist.npz"))
        (tmp_path / "mnist.npz").write_bytes(b"not a zip")
        with pytest.raises(ConfigError):
            open_dataset("mnist", tmp_path)

    def test_unknown_name(self):
        with pytest.raises(ConfigError) as error:
            open_dataset("cifar11")
        assert one_line(error, "cifar11", "digits", "mnist", "cifar10", "folder:DIR")

    def test_torchvision_imports_beside_this_torch(self):
        pytest.importorskip("PIL")
        datasets = _torchvision.import_datasets()
        assert datasets.CIFAR10 and datasets.MNIST and _torchvision.import_datasets() is datasets

    @pytest.mark.parametrize("name, sizes", [("cifar10", [45_000, 5_000, 10_000]), ("mnist", [55_000, 5_000, 10_000])])
    def test_published_files(self, name, sizes):
        folder = os.environ.get("JOINTCOMPRESS_DATA")
        if folder is None or not (Path(folder) / f"{name}.npz").is_file():
            pytest.skip(f"no {name}.npz in $JOINTCOMPRESS_DATA")
        found = open_dataset(name)
        assert [len(found.train), len(found.held_out), len(found.test)] == sizes
        whole = torch.cat([found.train.labels, found.held_out.labels]).bincount()
        assert bool(((found.held_out.labels.bincount() - whole * 5000 / sum(sizes[:2])).abs() < 1).all())
        pixels = found.train.images.double() / 255  # the constants are averages over 50,000 or 60,000 images
        assert pixels.mean((0, 1, 2)).tolist() == pytest.approx(found.mean, abs=2e-3)


class TestFolders:
    def test_one_folder_per_class(self, tmp_path):
        picture_tree(tmp_path / "pets")
        (tmp_path / "pets" / "cat" / "notes.txt").write_text("not a picture")
        (tmp_path / "pets" / ".hidden").mkdir()
        found = open_dataset(f"folder:{tmp_path / 'pets'}", image_size=6)
        assert found.name == "folder:pets" and found.class_names == ("cat", "dog")
        assert [len(found.train), len(found.held_out), len(found.test)] == [14, 2, 4]
        assert found.test.labels.bincount().tolist() == [2, 2] and found.image_shape == (6, 6, 3)
        values = torch.cat([part.images[:, 0, 0, 0] for part in (found.train, found.held_out, found.test)])
        labels = torch.cat([part.labels for part in (found.train, found.held_out, found.test)])
        assert sorted(values.tolist()) == [*range(10), *range(20, 30)]
        assert torch.equal(labels, (values >= 20).long())

    @pytest.mark.parametrize("part", ["test", "val"])
    def test_parts_that_are_there_are_used(self, tmp_path, part):
        picture_tree(tmp_path / "train")
        picture_tree(tmp_path / part, count=3, start=100)
        found = open_dataset(f"folder:{tmp_path}")
        assert [len(found.train), len(found.held_out), len(found.test)] == [18, 2, 6]
        assert int(found.test.images.min()) >= 100 > int(found.train.images.max())

    def test_val_is_held_out_where_there_is_a_test(self, tmp_path):
        for part, count, start in (("train", 10, 0), ("val", 2, 80), ("test", 3, 150)):
            picture_tree(tmp_path / part, count=count, start=start)
        found = open_dataset(f"folder:{tmp_path}")
        assert [len(found.train), len(found.held_out), len(found.test)] == [20, 4, 6]
        assert {int(value) for value in found.held_out.images[:, 0, 0, 0]} == {80, 81, 100, 101}

    def test_a_constant_channel_has_a_finite_scaling(self, tmp_path):
        for name in ("cat", "dog"):
            for i in range(10):
                write_picture(tmp_path / name / f"{i}.png", np.full((4, 4, 3), (i, 0, 7), dtype=np.uint8))
        found = open_dataset(f"folder:{tmp_path}")
        inputs, _ = next(make_task(found, batch_size=4, device="cpu").train.epoch(None))
        assert bool(inputs.isfinite().all())

    def test_what_cannot_be_used(self, tmp_path):
        def refused(root, *words, **options):
            with pytest.raises(ConfigError) as error:
                open_dataset(f"folder:{root}", **options)
            return one_line(error, *words)

        assert refused(tmp_path / "none", "no folder")
        picture_tree(tmp_path / "one", classes=("cat",))
        assert refused(tmp_path / "one", "2 or more")
        picture_tree(tmp_path / "empty")
        (tmp_path / "empty" / "emu").mkdir()
        assert refused(tmp_path / "empty", "emu")
        picture_tree(tmp_path / "broken")
        (tmp_path / "broken" / "cat" / "x.png").write_bytes(b"\x89PNG\r\n\x1a\nno picture")
        assert refused(tmp_path / "broken", "x.png")
        picture_tree(tmp_path / "differ" / "train")
        picture_tree(tmp_path / "differ" / "test", classes=("cat", "cow"))
        assert refused(tmp_path / "differ", "cow", "dog")
        picture_tree(tmp_path / "few", count=1)
        assert refused(tmp_path / "few", "too few")
        assert refused(tmp_path / "broken", "image_size", image_size=0)
