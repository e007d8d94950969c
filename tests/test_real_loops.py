"""A language model's training loop, as users write it by hand, with one line more."""

import contextlib
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
)
from torch import nn
from torch.nn import functional as F

VOCABULARY, CONTEXT, WIDTH = 48, 16, 32


class Block(nn.Module):
    """Causal attention and an MLP, each behind a norm and around a residual."""

    def __init__(self, heads=4, dropout=0.1):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        batch, tokens, width = x.shape
        parts = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, -1)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.out(mixed.transpose(1, 2).reshape(batch, tokens, width)))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


class LanguageModel(nn.Module):
    """A small GPT whose table of tokens is its output layer too."""

    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.1)
        self.head.weight = self.tokens.weight

    def forward(self, ids, targets):
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def train(model, attach, *, optimizer="adamw", autocast=None, grad_clip=1.0, steps=STEPS):
    """Micro-steps under autocast, a scaled loss, clipping, a step, zero_grad."""
    data = torch.randint(VOCABULARY, (4000,), generator=torch.Generator().manual_seed(7))

    def get_batch():
        starts = torch.randint(len(data) - CONTEXT - 1, (4,))
        x = torch.stack([data[i : i + CONTEXT] for i in starts])
        return x, torch.stack([data[i + 1 : i + 1 + CONTEXT] for i in starts])

    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    if optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    else:
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    context = torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=autocast == torch.float16)

    attach(model)
    model.train()
    x, y = get_batch()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] *= 0.5 ** (step == 2)
        for _ in range(K):
            with context:
                _, loss = model(x, y)
                loss = loss / K
            x, y = get_batch()
            scaler.scale(loss).backward()
        if grad_clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)


one_window = partial(train, optimizer="sgd", grad_clip=0.0, steps=1)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_same_training(autocast):
    check_same_training(LanguageModel, partial(train, autocast=autocast), "auto")


def test_same_training_fused():
    """With SGD: Adam divides gradients that are nothing but rounding errors by their size."""
    check_same_training(LanguageModel, partial(train, optimizer="sgd"), True, ulps=ULPS)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_follows_float32(optimizer):
    loop = partial(train, optimizer=optimizer)
    check_follows_float32(LanguageModel, loop, partial(loop, autocast=torch.bfloat16))


@every_fuse
def test_window_of_16_bit_parameters(fuse):
    check_window(lambda: LanguageModel().bfloat16(), one_window, fuse, gain=1000)


def test_window_under_autocast():
    check_window(LanguageModel, partial(one_window, autocast=torch.bfloat16), True, gain=1000)
