"""Image classifiers in channels_last, of timm and of plain layers, with one line more."""

from functools import partial

import pytest
import torch
from loop_cases import (
    STEPS,
    ULPS,
    K,
    check_same_training,
    check_window,
    every_fuse,
    importorskip,
)
from torch import nn
from torch.nn import functional as F

CLASSES = 10


def timm_resnet():
    # Blocks whose last norm begins at zero would hardly be trained in these few steps.
    timm = importorskip("timm")
    return timm.create_model("test_resnet", num_classes=CLASSES, zero_init_last=False)


def timm_vit():
    return importorskip("timm").create_model("test_vit", num_classes=CLASSES, img_size=32)


def convolutions():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(32, 32, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, CLASSES),
    )


every_model = pytest.mark.parametrize("make", [timm_resnet, timm_vit, convolutions])


def train(model, attach, *, dtype=torch.float32, autocast=False, steps=STEPS, clip=1.0):
    generator = torch.Generator().manual_seed(7)
    model = model.to(memory_format=torch.channels_last, dtype=dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    attach(model)
    model.train()
    for _ in range(steps):
        for _ in range(K):
            images = torch.randn(2, 3, 32, 32, generator=generator).to(dtype)
            labels = torch.randint(CLASSES, (2,), generator=generator)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                output = model(images.contiguous(memory_format=torch.channels_last))
                loss = F.cross_entropy(output.float(), labels)
            (loss / K).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()


one_window = partial(train, steps=1, clip=0.0)


@every_model
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_same_training(make, autocast):
    ours, _ = check_same_training(make, partial(train, autocast=autocast), "auto")
    kernels = [p for p in ours.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    assert kernels and all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)


@every_model
def test_same_training_fused(make):
    check_same_training(make, train, True, ulps=ULPS)


@every_model
@every_fuse
def test_window_of_16_bit_parameters(make, fuse):
    check_window(make, partial(one_window, dtype=torch.bfloat16), fuse, gain=1000)


@every_model
def test_window_under_autocast(make):
    check_window(make, partial(one_window, autocast=True), True, gain=1000)
