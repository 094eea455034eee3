"""Data: the splits of digits, batches, and what a task can reach."""

import gc
import time
from collections import Counter

import numpy as np
import pytest
import torch

from benchmarks import augment
from benchmarks.data import TensorBatches, make_task, open_dataset, test_batches
from methods.core.errors import ConfigError
from methods.core.train.task import LoaderBatches, Task


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(n, height=6, width=5, channels=3, seed=0):
    return torch.randint(0, 256, (n, height, width, channels), dtype=torch.uint8, generator=generator(seed))


def labelled(split):
    """Each image with its label, as hashable bytes."""
    return [image.numpy().tobytes() + bytes([int(label)])
            for image, label in zip(split.images, split.labels, strict=True)]


@pytest.fixture(scope="module")
def digits():
    return open_dataset("digits")


def one_line(error, *words):
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert word in text
    return True


class TestSplits:
    def test_digits_are_all_there_once(self, digits):
        from sklearn.datasets import load_digits

        found = load_digits()
        published = Counter(np.round(image / 16 * 255).astype(np.uint8).tobytes() + bytes([label])
                            for image, label in zip(found.images, found.target, strict=True))
        assert [len(digits.train), len(digits.held_out), len(digits.test)] == [1293, 144, 360]
        ours = labelled(digits.train) + labelled(digits.held_out) + labelled(digits.test)
        assert Counter(ours) == published
        assert digits.image_shape == (8, 8, 1) and digits.classes == 10 and digits.channels == 1
        assert digits.train.images.dtype == torch.uint8 and digits.train.labels.dtype == torch.int64

    def test_digits_are_stratified(self, digits):
        whole = sum(part.labels.bincount() for part in (digits.train, digits.held_out, digits.test))
        for part in (digits.train, digits.held_out, digits.test):
            share = whole * len(part) / 1797
            assert bool(((part.labels.bincount() - share).abs() < 1.2).all())

    def test_scaling_of_digits_is_that_of_its_training_images(self, digits):
        values = digits.train.images.double() / 255
        assert digits.mean == pytest.approx([float(values.mean())], abs=1e-12)
        assert digits.std == pytest.approx([float(values.std(correction=0))], abs=1e-12)

class TestBatches:
    def test_normalisation_and_memory_order(self):
        images, mean, std = pictures(7), (0.1, 0.5, 0.9), (0.2, 0.3, 1.1)
        batches = TensorBatches(images, torch.arange(7), 7, mean, std)
        inputs, targets = next(batches.epoch(None))
        wanted = (images.double() / 255 - torch.tensor(mean).double()) / torch.tensor(std).double()
        assert inputs.dtype == torch.float32 and targets.tolist() == list(range(7))
        assert torch.allclose(inputs.double(), wanted.permute(0, 3, 1, 2), atol=1e-5)
        assert inputs.is_contiguous(memory_format=torch.channels_last)

    def test_caffe_scaling_is_exactly_the_pixel_over_256(self):
        images = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1)
        inputs, _ = next(TensorBatches(images, torch.zeros(1), 1, (0.0,), (256 / 255,)).epoch(None))
        assert torch.equal(inputs, images.permute(0, 3, 1, 2) / 256)

    @pytest.mark.parametrize("n, size, lengths", [(10, 4, [4, 4, 2]), (9, 4, [4, 5]), (8, 4, [4, 4]), (1, 4, [1]),
                                                  (3, 1, [1, 1, 1]), (5, 4, [5]), (3, 8, [3])])
    def test_no_image_is_left_out_and_no_batch_has_one(self, n, size, lengths):
        batches = TensorBatches(pictures(n), torch.arange(n), size, (0.5,), (0.5,))
        assert len(batches) == len(lengths)
        for rng in (None, generator()):
            found = [targets for _, targets in batches.epoch(rng)]
            assert [len(targets) for targets in found] == lengths
            assert sorted(torch.cat(found).tolist()) == list(range(n))

    def test_shuffled_epochs_follow_the_generator_alone(self):
        images = pictures(50)
        batches = TensorBatches(images, torch.arange(50), 8, (0.0,), (1.0,), augment.find_policy("cifar10"))
        def read(seed):
            torch.manual_seed(int(time.time_ns() % 1000))  # the global generator must not matter
            return list(batches.epoch(generator(seed)))
        one, two, other = read(3), read(3), read(4)
        assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(one, two, strict=True))
        assert torch.cat([targets for _, targets in one]).tolist() != torch.cat([t for _, t in other]).tolist()

    def test_images_keep_their_labels_when_shuffled(self):
        images = torch.arange(40, dtype=torch.uint8).reshape(40, 1, 1, 1)
        for inputs, targets in TensorBatches(images, torch.arange(40), 7, (0.0,), (1 / 255,)).epoch(generator()):
            assert torch.equal(inputs.reshape(-1), targets.float())

    @pytest.mark.parametrize("arguments, word", [((0, (0.5,), (0.5,)), "batch_size"),
                                                 ((4, (0.5, 0.5), (0.5,)), "1 or 3"),
                                                 ((4, (0.5,), (0.0,)), "positive")])
    def test_bad_arguments(self, arguments, word):
        with pytest.raises(ConfigError) as error:
            TensorBatches(pictures(4), torch.arange(4), *arguments)
        assert one_line(error, word)


class TestTask:
    def test_views(self, digits):
        task = make_task(digits, batch_size=100, device="cpu", augment="digits", scaling=((0.0,), (1 / 255,)))
        assert isinstance(task, Task) and task.device == torch.device("cpu") and task.channels_last
        assert torch.equal(task.calibration_inputs(200), digits.train.images[:200].permute(0, 3, 1, 2).float())
        assert sum(len(t) for _, t in task.held_out.epoch(None)) == 144
        plain = torch.cat([x for x, _ in task.held_out.epoch(generator())]).sum()
        assert float(plain) == float(digits.held_out.images.sum())  # shuffled perhaps, never augmented
        moved, again = (task.training_inputs(200, generator()) for _ in range(2))
        pictures = digits.train.images.permute(0, 3, 1, 2).flatten(1).tolist()
        assert torch.equal(moved, again) and len(moved) == 200
        assert sum(picture in pictures for picture in moved.byte().flatten(1).tolist()) < 100  # augmented
        calibrating = Task(None, task.held_out, calibration=task.calibration)
        assert torch.equal(calibrating.training_inputs(200, generator()), moved)
        assert len(list(test_batches(digits, batch_size=100, device="cpu").epoch(None))) == 4

    def test_nothing_in_a_task_reaches_the_test_set(self, digits):
        task = make_task(digits, batch_size=100, device="cpu", augment="cifar10_cutout")
        forbidden = {part.untyped_storage().data_ptr() for part in (digits.test.images, digits.test.labels)}
        assert not forbidden & reachable_storages(task)
        leaky = Task(task.train, LoaderBatches([(digits.test.images, digits.test.labels)]))
        assert forbidden <= reachable_storages(leaky)  # the search does find tensors

    def test_unknown_augmentation(self, digits):
        with pytest.raises(ConfigError) as error:
            make_task(digits, batch_size=10, device="cpu", augment="mirror")
        assert one_line(error, "mirror", "none", "cifar10_cutout")


def reachable_storages(root):
    """Storages of all tensors that `root` leads to through attributes and containers (not code)."""
    seen, queue, storages = set(), [root], set()
    while queue:
        item = queue.pop()
        if id(item) in seen or isinstance(item, type) or callable(item):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            storages.add(item.untyped_storage().data_ptr())
        queue += gc.get_referents(item)
    return storages
