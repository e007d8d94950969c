"""A Llama in plain torch: RMSNorm, rotary positions, grouped-query attention, SwiGLU, untied head.

Nothing here knows the package: it is what a user's model is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; the defaults are those of Llama-3.2-1B with a head of its own: 1.5B."""

    vocabulary: int = 128256
    width: int = 2048
    layers: int = 16
    heads: int = 32
    kv_heads: int = 8
    mlp: int = 8192
    positions: int = 8192


def rotary_table(positions: int, head_width: int) -> tuple[Tensor, Tensor]:
    """Returns cos and sin of each position and pair of channels, [positions, head_width]."""
    exponents = torch.arange(0, head_width, 2, dtype=torch.float64) / head_width
    angles = torch.outer(torch.arange(positions, dtype=torch.float64), 500000.0**-exponents)
    return angles.repeat(1, 2).cos(), angles.repeat(1, 2).sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies rotary positions to [..., tokens, head_width]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.head_width = shape.width // shape.heads
        kv_width = shape.kv_heads * self.head_width
        self.q = nn.Linear(shape.width, shape.width, bias=False)
        self.k = nn.Linear(shape.width, kv_width, bias=False)
        self.v = nn.Linear(shape.width, kv_width, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)

    def heads(self, x: Tensor) -> Tensor:
        """Splits [batch, tokens, width] into [batch, heads, tokens, head_width]."""
        return x.unflatten(-1, (-1, self.head_width)).transpose(1, 2)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Returns [batch, tokens, width]."""
        q, k, v = (self.heads(project(x)) for project in (self.q, self.k, self.v))
        cos, sin = cos.to(q.dtype), sin.to(q.dtype)
        y = functional.scaled_dot_product_attention(
            rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True, enable_gqa=True
        )
        return self.out(y.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.gate = nn.Linear(shape.width, shape.mlp, bias=False)
        self.up = nn.Linear(shape.width, shape.mlp, bias=False)
        self.down = nn.Linear(shape.mlp, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns [batch, tokens, width]."""
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    """Attention and MLP, each normalised before and added to its input."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.width, eps=1e-5)
        self.attention = Attention(shape)
        self.mlp_norm = nn.RMSNorm(shape.width, eps=1e-5)
        self.mlp = Mlp(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Returns [batch, tokens, width]."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))


class Llama(nn.Module):
    """The model with its loss."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width, eps=1e-5)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        cos, sin = rotary_table(shape.positions, shape.width // shape.heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Returns the mean cross entropy of the next tokens.

        Args:
            tokens: int64 [batch, tokens].
            targets: int64 [batch, tokens], what follows each of them.
        """
        x = self.embedding(tokens)
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, cos, sin)
        logits = self.head(self.norm(x)).flatten(0, 1)
        if logits.dtype != torch.float64:
            logits = logits.float()
        return functional.cross_entropy(logits, targets.flatten())


def build(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Llama:
    """Returns a model with random weights that are the same in every dtype: bfloat16 numbers."""
    torch.manual_seed(seed)
    with device:
        model = Llama(shape)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(param.bfloat16())
    return model.to(dtype)
