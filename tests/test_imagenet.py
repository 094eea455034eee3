"""ImageNet's layout: files that are read batch by batch, in the views that torchvision gives of them."""

import hashlib
import importlib

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import _torchvision, pictures
from benchmarks.augment import crop_box, find_policy
from benchmarks.data import make_task, open_dataset, test_batches
from methods.core.errors import ConfigError

_torchvision.import_datasets()
transforms = importlib.import_module("torchvision.transforms")


def noise(width, height, seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def make_tree(root, per_class=6, test=2, classes=("n01440764", "n01443537")):
    for part, count in (("train", per_class), ("val", test)):
        for label, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                file = root / part / name / f"{name}_{part}_{i}.JPEG"
                noise(90 + 10 * i, 120 - 7 * label, 100 * label + i).save(file, quality=95)
    return root


@pytest.fixture
def tree(tmp_path):
    return make_tree(tmp_path / "few")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def refused(name, *words, **more):
    with pytest.raises(ConfigError) as error:
        open_dataset(name, **more)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value


class TestViews:
    @pytest.mark.parametrize("width, height", [(500, 375), (375, 500), (301, 300), (120, 90), (64, 400)])
    @pytest.mark.parametrize("size", [224, 65])
    def test_the_middle_is_torchvisions(self, tmp_path, width, height, size):
        file = tmp_path / "one.JPEG"
        noise(width, height, 0).save(file)
        theirs = transforms.Compose([transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size)])
        wanted = np.asarray(theirs(Image.open(file).convert("RGB")))
        assert np.array_equal(pictures.read_centre(file, size), wanted)

    def test_a_random_part_is_a_box_resized_and_half_of_them_mirrored(self, tmp_path):
        file = tmp_path / "one.JPEG"
        noise(130, 80, 0).save(file)
        whole, mirrored = Image.open(file).convert("RGB"), 0
        for seed in range(40):
            top, left, height, width = crop_box(80, 130, np.random.default_rng(seed))
            wanted = np.asarray(transforms.functional.resized_crop(whole, top, left, height, width, [32, 32]))
            found = pictures.read_random(file, 32, seed)
            mirrored += np.array_equal(found, wanted[:, ::-1])
            assert np.array_equal(found, wanted) or np.array_equal(found, wanted[:, ::-1])
        assert 10 <= mirrored <= 30

    @pytest.mark.parametrize("height, width", [(375, 500), (224, 224), (20, 400), (400, 20)])
    def test_boxes_are_distributed_as_torchvisions(self, height, width):
        image, drawn = torch.zeros(3, height, width), np.random.default_rng(0)
        theirs = np.array([transforms.RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3))
                           for _ in range(3000)], dtype=float)
        ours = np.array([crop_box(height, width, drawn) for _ in range(3000)], dtype=float)
        spread = theirs.std(axis=0) / np.sqrt(1500)
        assert (abs(ours.mean(axis=0) - theirs.mean(axis=0)) <= 5 * spread + 0.01).all()
        assert (abs(ours.std(axis=0) - theirs.std(axis=0)) <= 0.08 * theirs.std(axis=0) + 0.01).all()
        assert (ours[:, 0] + ours[:, 2] <= height).all() and (ours[:, 1] + ours[:, 3] <= width).all()

    def test_in_memory_pictures_take_the_same_policy(self):
        images = torch.from_numpy(np.stack([np.asarray(noise(24, 24, i)) for i in range(8)]))
        changed = find_policy("imagenet")(images, generator())
        assert changed.shape == images.shape and changed.dtype == torch.uint8 and not torch.equal(changed, images)
        constant = torch.full((4, 9, 9, 3), 77, dtype=torch.uint8)
        assert torch.equal(find_policy("imagenet")(constant, generator()), constant)


class TestSplits:
    def test_val_is_the_test_set_and_a_tenth_of_train_is_held_out(self, tmp_path):
        found = open_dataset(f"imagenet:{make_tree(tmp_path / 'few', per_class=10, test=3)}", image_size=32)
        assert [len(part) for part in (found.train, found.held_out, found.test)] == [18, 2, 6]
        assert found.held_out.labels.tolist() in ([0, 1], [1, 0]) and found.test.labels.bincount().tolist() == [3, 3]
        assert {path.parts[-3] for path in found.test.paths} == {"val"}
        assert not set(found.train.paths) & set(found.held_out.paths) and found.image_shape == (32, 32, 3)
        assert found.name == "imagenet:few" and found.class_names == ("n01440764", "n01443537") and found.classes == 2

    def test_labels_are_those_of_the_folders(self, tree):
        found = open_dataset(f"imagenet:{tree}")
        for part in (found.train, found.held_out, found.test):
            assert [found.class_names[label] for label in part.labels] == [path.parent.name for path in part.paths]
        assert found.image_shape == (224, 224, 3)

    def test_the_digest_tells_pictures_and_sizes_apart(self, tree, tmp_path):
        again = make_tree(tmp_path / "elsewhere")
        digests = [open_dataset(f"imagenet:{root}").digest for root in (tree, again)]
        assert digests[0] == digests[1]
        noise(91, 90, 5).save(next((again / "train" / "n01440764").iterdir()), quality=50)
        digests.append(open_dataset(f"imagenet:{again}").digest)
        assert len({digests[0], digests[2], open_dataset(f"imagenet:{tree}", image_size=64).digest}) == 3

    def test_imagenet_lies_in_the_data_directory(self, tmp_path):
        make_tree(tmp_path / "imagenet")
        assert open_dataset("imagenet", tmp_path).name == "imagenet"

    def test_no_picture_is_read_before_it_is_asked_for(self, tree):
        file = tree / "val" / "n01440764" / "n01440764_val_0.JPEG"
        file.write_bytes(b"no picture")
        found = open_dataset(f"imagenet:{tree}", image_size=32)
        assert len(list(make_task(found, batch_size=4, device="cpu").train.epoch(None))) == 3
        with pytest.raises(ConfigError, match="n01440764_val_0.JPEG cannot be read"):
            list(test_batches(found, batch_size=4, device="cpu").epoch(None))


class TestFaults:
    def test_each_is_one_line(self, tree, tmp_path):
        refused(f"imagenet:{tmp_path / 'absent'}", "there is no folder", "val/CLASS/*.JPEG")
        refused("imagenet", "there is no folder", "imagenet/train", data_dir=tmp_path)
        refused("imagenet:", "imagenet:DIR")
        refused(f"imagenet:{tree}", "image_size = 0", image_size=0)
        (tree / "val" / "n01443537").rename(tree / "val" / "n01484850")
        refused(f"imagenet:{tree}", "only one of them has: n01443537, n01484850")
        make_tree(tmp_path / "flat", test=0)
        refused(f"imagenet:{tmp_path / 'flat'}", "holds no picture")
        make_tree(tmp_path / "one", per_class=1)
        refused(f"imagenet:{tmp_path / 'one'}", "too few images")

    def test_an_unknown_policy_and_a_batch_of_none(self, tree):
        found = open_dataset(f"imagenet:{tree}")
        for options in ({"batch_size": 0}, {"batch_size": 4, "augment": "imagenot"}):
            with pytest.raises(ConfigError):
                make_task(found, device="cpu", **options)


class TestBatches:
    def test_plain_ones_are_the_middles_in_order_and_scaled(self, tree):
        found = open_dataset(f"imagenet:{tree}", image_size=48)
        task = make_task(found, batch_size=3, device="cpu", augment="imagenet")
        inputs = task.calibration_inputs(len(found.train))
        middles = np.stack([pictures.read_centre(path, 48) for path in found.train.paths]) / 255
        wanted = (middles - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
        assert torch.allclose(inputs.double(), torch.from_numpy(wanted).permute(0, 3, 1, 2), atol=1e-5)
        assert inputs.dtype == torch.float32 and inputs[:2].is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(torch.cat([labels for _, labels in task.train.epoch(None)]), found.train.labels)

    def test_training_is_shuffled_cropped_and_repeatable(self, tree, monkeypatch):
        found = open_dataset(f"imagenet:{tree}", image_size=32)
        batches = make_task(found, batch_size=4, device="cpu", augment="imagenet").train
        first = list(batches.epoch(generator(1)))
        monkeypatch.setattr("benchmarks.batches.READERS", 1)
        again, other = list(batches.epoch(generator(1))), list(batches.epoch(generator(2)))
        assert all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(first, again, strict=True))
        assert any(not torch.equal(a, c) for (a, _), (c, _) in zip(first, other, strict=True))
        plain = {hashlib.sha256(x.numpy().tobytes()).digest() for inputs, _ in batches.epoch(None) for x in inputs}
        seen = {hashlib.sha256(x.numpy().tobytes()).digest() for inputs, _ in first for x in inputs}
        assert not plain & seen and len(seen) == len(found.train)
        labels = torch.cat([labels for _, labels in first])
        assert torch.equal(labels.bincount(), found.train.labels.bincount())

    def test_labels_stay_with_their_pictures(self, tmp_path):
        root = tmp_path / "colours"
        for part in ("train", "val"):
            for level, name in enumerate(("a", "b", "c")):
                (root / part / name).mkdir(parents=True)
                for i in range(4):
                    Image.new("RGB", (40 + i, 50), (80 * level,) * 3).save(root / part / name / f"{i}.png")
        found = open_dataset(f"imagenet:{root}", image_size=8)
        batches = found.train.batches(5, (0.0,), (1 / 255,), "imagenet", "cpu")
        for inputs, labels in batches.epoch(generator()):
            assert torch.allclose(inputs.mean((1, 2, 3)), 80.0 * labels)

    def test_only_two_batches_are_read_ahead(self, tree, monkeypatch):
        read = []
        monkeypatch.setattr("benchmarks.batches.read_centre", lambda path, size: read.append(path) or np.zeros(
            (size, size, 3), dtype=np.uint8))
        found = open_dataset(f"imagenet:{tree}", image_size=8)
        epoch = make_task(found, batch_size=2, device="cpu").train.epoch(None)
        next(epoch)
        epoch.close()  # waits for what is being read
        assert len(read) <= 4 < len(found.train)

    def test_large_pictures_come_in_smaller_test_batches(self, tree):
        found = open_dataset(f"imagenet:{tree}")
        assert [len(labels) for _, labels in test_batches(found, batch_size=25, device="cpu").epoch(None)] == [2, 2]
