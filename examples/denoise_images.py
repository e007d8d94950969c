"""Trains a small UNet to take noise out of pictures, as diffusion models do, in float16.

    python examples/denoise_images.py              # about a minute on two CPU cores
    python examples/denoise_images.py --quick      # a few seconds

Parameters, activations and gradients are float16. Losses are multiplied by the loss scale of
gk.GradScaler, gradients are divided by it as they are added to the float32 sums, and a window with
an overflow is skipped. gk.MasterParams steps float32 masters. The first loss scale is too large:
windows are skipped until it fits, and the first parameters that overflowed are printed.
"""

import argparse
import math
import time

import shapes
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradacc_kernels as gk


class Block(nn.Module):
    """x + two convolutions, between which the noise level is added."""

    def __init__(self, before: int, width: int, levels: int):
        super().__init__()
        self.skip = nn.Conv2d(before, width, 1)
        self.first = nn.Conv2d(before, width, 3, padding=1)
        self.level = nn.Linear(levels, width)
        self.norm = nn.GroupNorm(4, width)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """Keeps height and width."""
        y = self.first(x) + self.level(level)[..., None, None]
        return self.skip(x) + self.second(F.silu(self.norm(y)))


class UNet(nn.Module):
    """Predicts the noise in images [n, 3, size, size], the size a multiple of 4."""

    LEVELS = 16  # features of the noise level

    def __init__(self, width: int):
        super().__init__()
        sizes = [width, 2 * width, 2 * width]
        befores = [3, *sizes[:-1]]
        self.down = nn.ModuleList(
            Block(before, size, self.LEVELS) for before, size in zip(befores, sizes, strict=True)
        )
        self.up = nn.ModuleList(
            Block(below + beside, beside, self.LEVELS)
            for below, beside in zip(sizes[:0:-1], sizes[-2::-1], strict=True)
        )
        self.out = nn.Conv2d(width, 3, 1)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """Takes the share of noise of each image, [n] from 0 to 1."""
        waves = noise[:, None] * torch.arange(1, self.LEVELS + 1, device=x.device) * math.pi
        level = waves.cos().to(x.dtype)
        beside = []
        for number, block in enumerate(self.down):
            x = block(F.avg_pool2d(x, 2) if number else x, level)
            beside.append(x)
        for block, other in zip(self.up, beside[-2::-1], strict=True):
            x = block(torch.cat([F.interpolate(x, scale_factor=2), other], 1), level)
        return self.out(x)


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default=default)
    parser.add_argument("--windows", type=int, default=80)
    parser.add_argument("--micro-batches", type=int, default=4, help="K, in a window")
    parser.add_argument("--images", type=int, default=16, help="in a micro-batch")
    parser.add_argument("--size", type=int, default=24, help="of an image, a multiple of 4")
    parser.add_argument("--width", type=int, default=32, help="channels of the UNet's first level")
    parser.add_argument("--quick", action="store_true", help="8 windows of a small UNet")
    options = parser.parse_args()
    if options.quick:
        options.windows, options.images, options.size, options.width = 8, 4, 16, 8
    return options


def main() -> None:
    """Trains, and prints losses, the loss scale, and what of windows was skipped."""
    options = parse_arguments()
    device = torch.device(options.device)
    torch.manual_seed(0)
    model = UNet(options.width).to(device, torch.float16)
    accumulator = gk.attach(model, scale=1 / options.micro_batches)
    print(accumulator)
    optimizer = gk.MasterParams(model.parameters(), torch.optim.AdamW, lr=2e-3)
    scaler = gk.GradScaler(accumulator, init_scale=2.0**20, growth_interval=20)

    def loss_of(seed: int) -> Tensor:
        images, _ = shapes.draw(options.images, options.size, device, seed)
        share = torch.rand(len(images), device=device)
        added = torch.randn_like(images)
        mixed = (1 - share).sqrt()[:, None, None, None] * images
        mixed = mixed + share.sqrt()[:, None, None, None] * added
        return F.mse_loss(model(mixed.half(), share).float(), added)

    began, first = time.perf_counter(), None
    for window in range(options.windows):
        losses = []
        for index in range(options.micro_batches):
            loss = loss_of(1 + window * options.micro_batches + index)
            scaler.scale(loss).backward()
            losses.append(loss.detach())
        accumulator.step(optimizer, max_norm=1.0, scaler=scaler)
        skipped = int(accumulator.counters["skipped_windows"])
        if skipped and first is None:
            grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            first = [name for name, grad in grads.items() if not grad.isfinite().all()]
            print(f"window {window:3}: overflow, in {', '.join(first[:3])} and others")
        scaler.update()
        optimizer.zero_grad()
        if window % max(1, options.windows // 6) == 0 or window == options.windows - 1:
            mean = torch.stack(losses).mean().item()
            scale = scaler.get_scale()
            print(f"window {window:3}: loss {mean:.3f}, loss scale {scale:.0f}, skipped {skipped}")
    print(f"{options.windows} windows in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
