"""LeNets for 28 x 28 images of one channel, in the three forms that the papers compress. No batch norm.

Layers are called as in Caffe's examples (conv1, conv2, ip1, ip2); input [N, 1, 28, 28], output [N, classes].
"""

import math

import torch
from torch import Tensor, nn


@torch.no_grad()
def _caffe_xavier(model: nn.Module) -> None:
    """Caffe's "xavier" filler: uniform within sqrt(3 / fan-in), biases 0 (torch's averages both fans)."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            bound = math.sqrt(3 / module.weight[0].numel())
            module.weight.uniform_(-bound, bound)
            module.bias.zero_()


class LeNet300(nn.Module):
    """LeNet-300-100 of Deep Compression: 784 -> 300 -> 100 -> classes; 266,200 weights with 10 classes."""

    def __init__(self, classes: int, channels: int):
        super().__init__()
        self.ip1 = nn.Linear(28 * 28 * channels, 300)
        self.relu1 = nn.ReLU()
        self.ip2 = nn.Linear(300, 100)
        self.relu2 = nn.ReLU()
        self.ip3 = nn.Linear(100, classes)
        _caffe_xavier(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.ip1(torch.flatten(x, 1)))
        return self.ip3(self.relu2(self.ip2(x)))


class LeNet5Caffe(nn.Module):
    """Caffe's LeNet: 20 and 50 maps of 5 x 5, 800 -> 500 -> classes; 430,500 weights with 10 classes.

    As in Caffe's example there is no ReLU after the convolutions.
    """

    def __init__(self, classes: int, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 20, 5)
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.pool2 = nn.MaxPool2d(2)
        self.ip1 = nn.Linear(50 * 4 * 4, 500)
        self.relu1 = nn.ReLU()
        self.ip2 = nn.Linear(500, classes)
        _caffe_xavier(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.conv1(x))
        x = self.pool2(self.conv2(x))
        return self.ip2(self.relu1(self.ip1(torch.flatten(x, 1))))


class LeNet5ReLU(nn.Module):
    """LeNet-5 with a ReLU after every layer but the last: `maps` of 5 x 5 per convolution, `hidden` units."""

    def __init__(self, classes: int, channels: int, maps: tuple[int, int], hidden: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, maps[0], 5)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(maps[0], maps[1], 5)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.ip1 = nn.Linear(maps[1] * 4 * 4, hidden)
        self.relu3 = nn.ReLU()
        self.ip2 = nn.Linear(hidden, classes)
        _caffe_xavier(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.relu1(self.conv1(x)))
        x = self.pool2(self.relu2(self.conv2(x)))
        return self.ip2(self.relu3(self.ip1(torch.flatten(x, 1))))


def lenet5_caffe_relu(classes: int, channels: int) -> LeNet5ReLU:
    """Caffe's LeNet with ReLU after the convolutions, as ADMM's TensorFlow code has it; 430,500 weights."""
    return LeNet5ReLU(classes, channels, (20, 50), 500)


def lenet5_bayesian_bits(classes: int, channels: int) -> LeNet5ReLU:
    """The LeNet-5 of Bayesian Bits: 32 and 64 maps, 1024 -> 512 -> classes; 581,408 weights."""
    return LeNet5ReLU(classes, channels, (32, 64), 512)
