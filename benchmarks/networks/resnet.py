"""Residual networks in their CIFAR form (He et al. 2016), with torchvision's parameter names.

`resnet18` is torchvision's with a 3 x 3 stem of stride 1 and no max pool; `thin` gives the ResNet-20 and
ResNet-56 of the CIFAR experiments (16, 32, 64 channels) with projection shortcuts (option B).
"""

import torch
from torch import Tensor, nn


def conv3x3(into: int, out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(into, out, 3, stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut.

    Each ReLU is a module of its own: a traced graph names a layer by its path and wants it called once. None
    works in place: whoever watches a graph run may keep what a layer returned.
    """

    def __init__(self, into: int, out: int, stride: int):
        super().__init__()
        self.conv1 = conv3x3(into, out, stride)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu1 = nn.ReLU()
        self.conv2 = conv3x3(out, out)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = None
        if stride != 1 or into != out:
            self.downsample = nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu2(out + shortcut)


class ResNet(nn.Module):
    """Stem, stages of `blocks[i]` basic blocks with `widths[i]` channels, global average pool, classifier.

    Every stage but the first halves the image. Input [N, channels, H, W], output [N, classes].
    """

    def __init__(self, widths: tuple[int, ...], blocks: tuple[int, ...], classes: int, channels: int):
        super().__init__()
        self.conv1 = conv3x3(channels, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        self.stages = [f"layer{i + 1}" for i in range(len(widths))]
        into = widths[0]
        for i, (name, width, count) in enumerate(zip(self.stages, widths, blocks, strict=True)):
            first, rest = BasicBlock(into, width, 1 if i == 0 else 2), range(count - 1)
            self.add_module(name, nn.Sequential(first, *(BasicBlock(width, width, 1) for _ in rest)))
            into = width
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(into, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet18(classes: int, channels: int, width: int) -> ResNet:
    """ResNet-18 with `width` channels in the first stage (64 as published)."""
    return ResNet((width, 2 * width, 4 * width, 8 * width), (2, 2, 2, 2), classes, channels)


def thin(blocks: int, classes: int, channels: int) -> ResNet:
    """The CIFAR ResNet of 6 * blocks + 2 layers."""
    return ResNet((16, 32, 64), (blocks,) * 3, classes, channels)
