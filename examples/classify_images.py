"""Trains an image classifier of timm, in channels_last and under autocast, on micro-batches.

    pip install timm
    python examples/classify_images.py              # about a minute on two CPU cores
    python examples/classify_images.py --quick      # a few seconds

The pictures are shapes, drawn as they are needed. A window has K micro-batches. Parameters are
float32; where autocast has cast a weight its gradient is bfloat16, and is summed in float32.
"""

import argparse
import sys
import time

import pictures
import torch
import torch.nn.functional as F

import gradacc_kernels as gk

try:
    import timm
except (ImportError, RuntimeError) as error:  # the latter by a torchvision of another torch
    sys.exit(f"classify_images.py needs timm, and torchvision for this torch ({error})")


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default=default)
    parser.add_argument("--model", default="resnet10t", help="of timm")
    parser.add_argument("--windows", type=int, default=60)
    parser.add_argument("--micro-batches", type=int, default=4, help="K, in a window")
    parser.add_argument("--images", type=int, default=32, help="in a micro-batch")
    parser.add_argument("--size", type=int, default=48, help="of an image")
    parser.add_argument("--quick", action="store_true", help="6 windows of small images")
    options = parser.parse_args()
    if options.quick:
        options.windows, options.images, options.size = 6, 8, 32
    return options


def main() -> None:
    """Trains, and prints the loss and the accuracy on pictures that were not trained on."""
    options = parse_arguments()
    device = torch.device(options.device)
    torch.manual_seed(0)
    model = timm.create_model(options.model, num_classes=len(pictures.NAMES))
    model = model.to(device, memory_format=torch.channels_last)
    accumulator = gk.attach(model, scale=1 / options.micro_batches)
    print(accumulator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, options.windows)

    def forward(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = pictures.draw(options.images, options.size, device, seed)
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            return model(images), labels

    began = time.perf_counter()
    for window in range(options.windows):
        losses = []
        for index in range(options.micro_batches):
            loss = F.cross_entropy(*forward(1 + window * options.micro_batches + index))
            loss.backward()
            losses.append(loss.detach())
        norm = accumulator.step(optimizer, max_norm=5.0)
        optimizer.zero_grad()
        scheduler.step()
        if window % max(1, options.windows // 6) == 0 or window == options.windows - 1:
            mean = torch.stack(losses).mean().item()
            print(f"window {window:3}: loss {mean:.3f}, gradient norm {norm.item():.2f}")

    model.eval()
    with torch.no_grad():
        found = [(scores.argmax(1) == labels) for scores, labels in map(forward, range(-8, 0))]
    seconds = time.perf_counter() - began
    print(f"accuracy {torch.cat(found).float().mean().item():.1%} after {seconds:.0f} s")


if __name__ == "__main__":
    main()
