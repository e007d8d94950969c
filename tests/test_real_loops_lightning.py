"""Lightning's Trainer with accumulate_grad_batches, with one line more."""

import functools
from functools import partial

import pytest
import torch
from loop_cases import (
    STEPS,
    ULPS,
    K,
    check_follows_float32,
    check_same_training,
    check_window,
    every_fuse,
    importorskip,
)
from torch import nn
from torch.nn import functional as F

BATCH = 8
adamw = partial(torch.optim.AdamW, lr=1e-2)
sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


@functools.cache
def classes():
    """Modules of Lightning, which is imported late, as that takes seconds."""
    lightning = importorskip("lightning.pytorch")

    class CallsLayers(lightning.LightningModule):
        """A classifier whose ``training_step`` calls its layers and not itself."""

        def __init__(self, optimizer=adamw):
            super().__init__()
            self.optimizer = optimizer
            self.layers = nn.Sequential(
                nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Dropout(0.1), nn.Linear(32, 8)
            )

        def training_step(self, batch, index):
            x, y = batch
            return F.cross_entropy(self.layers(x).float(), y)

        def configure_optimizers(self):
            optimizer = self.optimizer(self.parameters())
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    class CallsItself(CallsLayers):
        def forward(self, x):
            return self.layers(x)

        def training_step(self, batch, index):
            x, y = batch
            return F.cross_entropy(self(x).float(), y)

    class AttachesItself(CallsLayers):
        """Attached where training starts, when Lightning has cast and moved it."""

        def on_train_start(self):
            self.attach(self)

    return CallsLayers, CallsItself, AttachesItself


def calls_layers(optimizer=adamw):
    return classes()[0](optimizer)


def calls_itself(optimizer=adamw):
    return classes()[1](optimizer)


def train(model, attach, *, precision="32-true", clip=1.0, steps=STEPS):
    lightning = importorskip("lightning.pytorch")
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(K * BATCH * 2, 16, generator=generator)
    y = torch.randint(8, (len(x),), generator=generator)
    data = torch.utils.data.TensorDataset(x, y)
    trainer = lightning.Trainer(
        accelerator="cpu",
        precision=precision,
        accumulate_grad_batches=K,
        gradient_clip_val=clip,
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    attach(model)
    trainer.fit(model, torch.utils.data.DataLoader(data, BATCH, shuffle=True))


one_window = partial(train, clip=None, steps=1)


@pytest.mark.parametrize("make", [calls_layers, calls_itself])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_same_training(make, precision):
    check_same_training(make, partial(train, precision=precision), "auto")


def test_same_training_fused():
    check_same_training(partial(calls_layers, sgd), train, True, ulps=ULPS)


def test_follows_float32():
    check_follows_float32(calls_layers, train, partial(train, precision="bf16-mixed"))


def test_window_under_autocast():
    loop = partial(one_window, precision="bf16-mixed")
    check_window(partial(calls_layers, sgd), loop, True, gain=1000)


@every_fuse
@pytest.mark.parametrize("make", [calls_layers, calls_itself])
def test_window_of_a_module_that_lightning_casts(make, fuse):
    """``bf16-true`` casts the module in ``fit``, when it is attached already."""
    loop = partial(one_window, precision="bf16-true")
    check_window(partial(make, sgd), loop, fuse, gain=1000)


@every_fuse
def test_window_of_a_module_attached_in_on_train_start(fuse):
    def loop(model, attach):
        model.attach = attach
        one_window(model, lambda model: None, precision="bf16-true")

    check_window(lambda: classes()[2](sgd), loop, fuse, gain=1000)
