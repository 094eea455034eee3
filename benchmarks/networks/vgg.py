"""VGG networks for 32 x 32 images."""

import torch
from torch import Tensor, nn

POOL = "pool"
VGG16_LAYERS = (64, 64, POOL, 128, 128, POOL, 256, 256, 256, POOL, 512, 512, 512, POOL, 512, 512, 512, POOL)
VGG7_LAYERS = (128, 128, POOL, 256, 256, POOL, 512, 512, POOL)


def conv_layers(layers: tuple[int | str, ...], channels: int, bias: bool) -> nn.Sequential:
    """3 x 3 convolutions with batch norm and ReLU, and 2 x 2 max pools, as listed."""
    modules: list[nn.Module] = []
    for width in layers:
        if width == POOL:
            modules.append(nn.MaxPool2d(2))
        else:
            modules += [nn.Conv2d(channels, width, 3, padding=1, bias=bias), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
    return nn.Sequential(*modules)


@torch.no_grad()
def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                module.bias.zero_()


class VGG16(nn.Module):
    """13 convolutions (with biases, as torchvision's vgg16_bn has them) and one linear layer, 512 -> classes.

    Input [N, channels, 32, 32], output [N, classes].
    """

    def __init__(self, classes: int, channels: int):
        super().__init__()
        self.features = conv_layers(VGG16_LAYERS, channels, bias=True)
        self.classifier = nn.Linear(512, classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


class VGG7(nn.Module):
    """The network of Bayesian Bits (van Baalen et al. 2020): 6 convolutions, 8192 -> 1024 -> classes.

    Input [N, channels, 32, 32], output [N, classes].
    """

    def __init__(self, classes: int, channels: int):
        super().__init__()
        self.features = conv_layers(VGG7_LAYERS, channels, bias=False)
        self.classifier = nn.Sequential(nn.Linear(512 * 4 * 4, 1024, bias=False), nn.BatchNorm1d(1024),
                                        nn.ReLU(), nn.Linear(1024, classes))
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))
