"""Small pictures of shapes, drawn on the device: the data of two examples."""

import math

import torch
from torch import Tensor

NAMES = ("circle", "square", "triangle", "ring", "cross")


def draw(count: int, size: int, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    """Draws shapes of random place, size, angle and colour, on another colour, with noise.

    Returns:
        Images [count, 3, size, size] of about -1 to 1, and the numbers of their NAMES.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        values = torch.rand(count, *shape, generator=generator, device=device)
        return low + (high - low) * values

    labels = torch.randint(len(NAMES), (count,), generator=generator, device=device)
    axis = torch.linspace(-1, 1, size, device=device)
    x = axis.view(1, 1, -1) - uniform(-0.3, 0.3, 1, 1)
    y = axis.view(1, -1, 1) - uniform(-0.3, 0.3, 1, 1)
    angle, radius = uniform(0, math.pi / 2, 1, 1), uniform(0.35, 0.6, 1, 1)
    x, y = angle.cos() * x + angle.sin() * y, angle.cos() * y - angle.sin() * x
    distance, chessboard = torch.hypot(x, y), torch.maximum(x.abs(), y.abs())
    triangle = torch.maximum(-y, 0.5 * y + 0.866 * x.abs()) * 1.4
    ring = (distance - 0.75 * radius).abs() * 3
    cross = torch.maximum(torch.minimum(x.abs(), y.abs()) * 3, chessboard)
    fields = torch.stack([distance, chessboard, triangle, ring, cross], 1)
    field = fields[torch.arange(count, device=device), labels]
    inside = torch.sigmoid((radius - field) * size).unsqueeze(1)
    ground = uniform(-0.8, 0.8, 3, 1, 1)
    colour = ground + torch.where(ground > 0, -1.0, 1.0) * uniform(0.5, 1.0, 3, 1, 1)
    noise = torch.randn(count, 3, size, size, generator=generator, device=device)
    return (inside * colour + (1 - inside) * ground + 0.05 * noise), labels
