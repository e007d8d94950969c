"""ResNet-50 in plain torch: bottlenecks with the stride in their 3 x 3 convolution.

161 parameters, those of timm's and torchvision's; neither of the two is needed. Nothing here knows
the package: it is what a user's model is.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


def convolution(into: int, out: int, width: int, stride: int = 1) -> nn.Sequential:
    """Returns a convolution, normalised."""
    layer = nn.Conv2d(into, out, width, stride, padding=width // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(out))


class Bottleneck(nn.Module):
    """Three convolutions around a narrow middle, and what goes past them."""

    def __init__(self, into: int, width: int, stride: int, is_first: bool):
        super().__init__()
        self.narrow = convolution(into, width, 1)
        self.middle = convolution(width, width, 3, stride)
        self.widen = convolution(width, 4 * width, 1)
        self.past = convolution(into, 4 * width, 1, stride) if is_first else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Returns [batch, 4 * width, height, width]."""
        y = functional.relu(self.narrow(x))
        y = functional.relu(self.middle(y))
        return functional.relu(self.widen(y) + self.past(x))


class ResNet(nn.Module):
    """An image classifier; the defaults are ResNet-50."""

    def __init__(
        self, blocks: tuple[int, ...] = (3, 4, 6, 3), width: int = 64, n_classes: int = 1000
    ):
        super().__init__()
        self.stem = convolution(3, width, 7, stride=2)
        layers = []
        into = width
        for stage, count in enumerate(blocks):
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(Bottleneck(into, width << stage, stride, is_first=block == 0))
                into = 4 * (width << stage)
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Linear(into, n_classes)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Returns the mean cross entropy.

        Args:
            images: [batch, 3, height, width].
            labels: int64 [batch].
        """
        x = functional.max_pool2d(functional.relu(self.stem(images)), 3, 2, padding=1)
        logits = self.head(self.blocks(x).mean((2, 3)))
        return functional.cross_entropy(logits.float(), labels)
