"""What a method may see: a user's own loaders, calibration inputs, and scores that no global seed can move."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from methods import find_method
from methods import prune_then_quantize as pq
from methods.core.budget import Budget
from methods.core.errors import CompressError, ConfigError
from methods.core.file.storage import to_bytes
from methods.core.train.finetune import Recipe, train
from methods.core.train.layout import needs_contiguous
from methods.core.train.task import First, Task, top1


def loader(tiny, n=96, **settings):
    data = tiny.Batches(n, 1)
    return DataLoader(TensorDataset(data.inputs, data.targets), batch_size=24, **settings)


def test_a_shuffling_loader_gives_the_same_bytes_whatever_the_global_seed(tiny):
    found = []
    for seed in (1, 2):
        task = Task.from_loader(loader(tiny, shuffle=True), loader(tiny, 24, shuffle=True))
        model = tiny.model()
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        out = pq.compress(model, task, Budget(density=0.5, bits=4),
                          pq.Config(retrain=Recipe(1, 0.01), calibration_inputs=30), torch.Generator().manual_seed(0))
        task.score(model)
        assert torch.equal(torch.get_rng_state(), before)
        found.append(to_bytes(out)[0])
    assert found[0] == found[1]


def test_calibration_inputs_in_fixed_order(tiny):
    task = tiny.task()
    assert torch.equal(task.calibration_inputs(30), tiny.Batches(96, 1).inputs[:30])
    assert len(task.calibration_inputs(1000)) == 96
    own = Task.from_loader(loader(tiny, shuffle=True), [], calibration=loader(tiny, 48))
    assert torch.equal(own.calibration_inputs(40), tiny.Batches(48, 1).inputs[:40])
    shuffled = Task.from_loader(loader(tiny, shuffle=True), [])
    assert torch.equal(shuffled.calibration_inputs(40), shuffled.calibration_inputs(40))
    for n in (0, -5):
        with pytest.raises(ConfigError, match=f"calibration inputs = {n}"):
            task.calibration_inputs(n)
    for empty in (Task(None, task.held_out), Task.from_loader([], [])):
        with pytest.raises(CompressError, match="to calibrate on"):
            empty.calibration_inputs(5)


def test_a_small_set_is_the_first_of_a_data_set_and_stays_the_same(tiny):
    source = tiny.Batches(96, 1)
    found = list(First(source, n=3).epoch(torch.Generator()))
    assert len(First(source, n=3)) == 3 and len(First(source, n=9)) == len(First(source)) == 4
    assert torch.equal(torch.cat([inputs for inputs, _ in found]), source.inputs[:72])
    for count, batches in ((24, 1), (30, 2), (1000, 4)):
        inputs, targets = (torch.cat(part) for part in zip(*First(source, examples=count).epoch(None), strict=True))
        assert len(First(source, examples=count)) == batches
        assert torch.equal(inputs, source.inputs[:count]) and torch.equal(targets, source.targets[:count])
    before, small = torch.get_rng_state(), First(Task.from_loader(loader(tiny, shuffle=True), []).train, n=2)
    once, again = (torch.cat([inputs for inputs, _ in small.epoch(torch.Generator())]) for _ in range(2))
    assert torch.equal(once, again) and torch.equal(torch.get_rng_state(), before)


def test_a_device_may_be_given_by_name(tiny):
    assert tiny.task(device="cpu").device == torch.device("cpu")


def test_top1_counts_images_in_evaluation_mode(tiny):
    model, data = tiny.model().train(), tiny.Batches(50, 4)  # batches of 24, 24 and 2
    score = top1(model, data.epoch(None))
    assert model.training
    with torch.no_grad():
        right = int((model.eval()(data.inputs).argmax(1) == data.targets).sum())
    assert score == 100 * right / 50
    with pytest.raises(CompressError, match="nothing to score"):
        top1(model, [])


def test_channels_last_and_autocast(tiny):
    task = tiny.task(channels_last=True, autocast=torch.bfloat16)
    model = task.placed(tiny.model())
    inputs, _ = task.placed_batch((torch.randn(2, 3, 8, 8), torch.zeros(2)))
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (inputs, model.conv1.weight))
    with task.precision():
        assert model(inputs).dtype == torch.bfloat16
    budget, config = Budget(density=0.5, bits=4), pq.Config(aware=Recipe(1, 0.01))
    out = pq.compress(tiny.model(), task, budget, config, torch.Generator())
    assert all(value.is_contiguous() for value in out.state_dict().values())


class TestNarrowStridedConvs:
    """1x1 convs of stride 2 with fewer channels than oneDNN takes together: wrong gradients in channels_last."""

    @pytest.mark.parametrize("channels, expected", [(4, torch.contiguous_format), (16, torch.channels_last)])
    def test_they_are_trained_in_contiguous_memory(self, tiny, channels, expected):
        model = nn.Sequential(nn.Conv2d(3, channels, 3), nn.Conv2d(channels, 8, 1, 2), nn.AdaptiveAvgPool2d(1),
                              nn.Flatten(), nn.Linear(8, 4))
        seen = []
        model[1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        data = tiny.Batches(8, 1)
        inputs = data.inputs.contiguous(memory_format=torch.channels_last)
        task = Task.from_loader([(inputs, data.targets)], [], channels_last=True)
        train(model, task, Recipe(1, 0.1), torch.Generator().manual_seed(0))
        assert seen[0].is_contiguous(memory_format=expected) and needs_contiguous(model) == (channels == 4)

    @pytest.mark.parametrize("given", [torch.contiguous_format, torch.channels_last])
    def test_pictures_and_weights_of_one_channel_say_so_by_their_strides(self, given):
        """They are in both layouts, whatever the strides, which are what oneDNN goes by: the whole network follows."""
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 1, 2)).to(memory_format=given)
        x = torch.randn(2, 1, 9, 9).contiguous(memory_format=torch.channels_last).to(memory_format=given)
        x = x.as_strided(x.shape, (81, 1, 9, 1)) if given is torch.channels_last else x
        task = Task(None, [], channels_last=True).suited_to(model)
        (seen, _), placed = task.placed_batch((x, torch.zeros(2))), task.placed(model)
        assert seen.stride() == (81, 81, 9, 1) and torch.equal(seen, x)
        assert [p.stride() for p in placed.parameters() if p.ndim == 4] == [(9, 9, 3, 1), (4, 1, 1, 1)]
        assert placed[0](seen).stride()[1:] == (49, 7, 1)

    def test_a_tensor_that_others_share_keeps_its_layout(self):
        """Buffers, such as masks, can be a method's own tensors."""
        mask, layer = torch.ones(4, 3, 2, 2), nn.Conv2d(3, 4, 2)
        layer.register_buffer("mask", mask)
        Task(None, [], channels_last=True).placed(layer)
        assert mask.stride() == (12, 4, 2, 1) and layer.mask.stride() == layer.weight.stride() == (12, 1, 6, 3)

    def test_a_step_is_that_of_float64(self):
        """With two threads the wrong gradient ended the process."""
        model = nn.Sequential(nn.Conv2d(2, 4, 1, 2, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        before = model[0].weight.detach().double()
        x, y = torch.randn(5, 2, 16, 16), torch.randint(0, 4, (5,))
        weight = before.clone().requires_grad_()
        outputs = torch.nn.functional.conv2d(x.double(), weight, stride=2).mean((2, 3))
        torch.nn.functional.cross_entropy(outputs, y).backward()
        task = Task.from_loader([(x, y)], [], channels_last=True)
        train(model, task, Recipe(1, 0.1, momentum=0, weight_decay=0, schedule="constant", warmup=0),
              torch.Generator().manual_seed(0))
        moved = (model[0].weight.detach().double() - before) / -0.1
        assert torch.allclose(moved, weight.grad, rtol=1e-3, atol=1e-6)


class TestInputsAlone:
    """`Task.from_inputs`: what calibrates works on it, and gives what it gives with labels; the rest refuses it."""

    @staticmethod
    def calibrated(name, task, tiny):
        method = find_method(name)
        settings = {"rptq": {}, "sparq": {"calibration_inputs": 48}, "dfq": {"batchnorm": "data"}}[name]
        budget = {"rptq": {"size_ratio": 0.2}, "sparq": {}, "dfq": {"bits": 8}}[name]
        return to_bytes(method.compress(tiny.model(), task, Budget(**budget), method.Config(**settings),
                                        torch.Generator().manual_seed(0)))[0]

    @pytest.mark.parametrize("name", ["rptq", "sparq", "dfq"])
    def test_methods_that_calibrate_run_as_with_labels(self, name, tiny):
        batches = list(tiny.Batches(96, 1).epoch(None))
        labelled = Task.from_loader(batches, batches).seen_as("calibration")
        unread = Task.from_inputs([(inputs, object(), "label") for inputs, _ in batches])
        wanted = self.calibrated(name, labelled, tiny)
        assert self.calibrated(name, unread, tiny) == wanted
        assert self.calibrated(name, Task.from_inputs([inputs for inputs, _ in batches]), tiny) == wanted

    def test_one_tensor_arrays_and_loaders_give_the_same_inputs(self, tiny):
        x = tiny.Batches(96, 1).inputs
        given = (x, [x[:50], x[50:]], [x.double().numpy()], [[x]], DataLoader(x, batch_size=7),
                 DataLoader(TensorDataset(x), batch_size=96))
        for inputs in given:
            task = Task.from_inputs(inputs)
            assert task.train is None and torch.equal(task.calibration_inputs(60), x[:60])
            assert [targets for _, targets in task.held_out.epoch(None)] == [None] * len(task.held_out)
        other = Task.from_inputs(x, x[:5])
        assert torch.equal(next(iter(other.held_out.epoch(None)))[0], x[:5]) and len(other.calibration_inputs(96)) == 96
        assert len(Task.from_inputs(iter([x, x, x]), [x], steps=2).calibration_inputs(1000)) == 192

    @pytest.mark.parametrize("batch", [{"image": torch.zeros(2, 3)}, (), "ab", (None, torch.zeros(2)), 3.0])
    def test_a_batch_without_a_tensor_is_refused(self, batch):
        with pytest.raises(ConfigError, match="must be a tensor, or a tuple whose first part is one, not a ") as caught:
            Task.from_inputs([batch]).calibration_inputs(1)
        assert "\n" not in str(caught.value)

    def test_what_needs_labels_refuses_them(self, tiny):
        task, generator = Task.from_inputs(tiny.Batches(96, 1).inputs), torch.Generator().manual_seed(0)
        with pytest.raises(ConfigError, match="holds no training batches, and training needs them: Task.from_loader"):
            pq.compress(tiny.model(), task, Budget(density=0.5, bits=4), pq.Config(retrain=Recipe(1, 0.01)), generator)
        method = find_method("iterative_sensitivity")
        with pytest.raises(ConfigError, match="the loss needs targets, and this task has none: Task.from_loader"):
            method.compress(tiny.model(), task, Budget(), method.Config(calibration_inputs=24), generator)
        with pytest.raises(CompressError, match="there is no metric"):
            task.score(tiny.model())
