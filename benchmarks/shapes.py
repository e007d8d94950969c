"""Shapes of the parameters of published models, and two lists of many small tensors.

Written out from the architectures' dimensions, in the order of their modules; tests compare the
totals with the published numbers of parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Shape = tuple[int, ...]


def numel(shapes: Sequence[Shape]) -> int:
    """Returns the number of elements of all tensors."""
    return sum(math.prod(shape) for shape in shapes)


def llama(
    *, vocabulary: int, hidden: int, mlp: int, layers: int, keys: int, is_tied: bool
) -> list[Shape]:
    """Llama 3: embedding, layers of q, k, v, o, gate, up, down and two norms, norm, head.

    Args:
        vocabulary: tokens.
        hidden: width.
        mlp: width of the MLP.
        layers: how many.
        keys: width of the keys and of the values: heads that they share, times the heads' width.
        is_tied: the head is the embedding.
    """
    attention = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden)]
    layer = attention + [(mlp, hidden), (mlp, hidden), (hidden, mlp), (hidden,), (hidden,)]
    embedding = (vocabulary, hidden)
    head = [] if is_tied else [embedding]
    return [embedding] + layers * layer + [(hidden,)] + head


def llama_1b() -> list[Shape]:
    """Llama-3.2-1B: 146 tensors."""
    return llama(vocabulary=128256, hidden=2048, mlp=8192, layers=16, keys=512, is_tied=True)


def llama_8b() -> list[Shape]:
    """Llama-3-8B: 291 tensors."""
    return llama(vocabulary=128256, hidden=4096, mlp=14336, layers=32, keys=1024, is_tied=False)


def norm(width: int) -> list[Shape]:
    """A norm with a bias."""
    return [(width,), (width,)]


def gpt2() -> list[Shape]:
    """GPT-2 of 124M parameters, head tied, weights laid out [in, out] as published: 148 tensors."""
    d = 768
    attention = [(d, 3 * d), (3 * d,), (d, d), (d,)]
    mlp = [(d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    layer = norm(d) + attention + norm(d) + mlp
    return [(50257, d), (1024, d)] + 12 * layer + norm(d)


def bottleneck(inputs: int, width: int, *, is_first: bool) -> list[Shape]:
    """A block of ResNet-50: 1x1, 3x3 and 1x1 convolutions, each with its batch norm.

    The first block of a stage also projects what goes around it.
    """
    outputs = 4 * width
    block = [(width, inputs, 1, 1), *norm(width), (width, width, 3, 3), *norm(width)]
    block += [(outputs, width, 1, 1), *norm(outputs)]
    return block + ([(outputs, inputs, 1, 1), *norm(outputs)] if is_first else [])


def resnet_50() -> list[Shape]:
    """ResNet-50 for ImageNet: 161 tensors."""
    shapes = [(64, 3, 7, 7), *norm(64)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += bottleneck(inputs, width, is_first=block == 0)
            inputs = 4 * width
    return [*shapes, (1000, inputs), (1000,)]


def vit_large() -> list[Shape]:
    """ViT-L/16 at 224 pixels for ImageNet: 296 tensors."""
    d, patches = 1024, (224 // 16) ** 2
    attention = [(3 * d, d), (3 * d,), (d, d), (d,)]
    mlp = [(4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    layer = norm(d) + attention + norm(d) + mlp
    embedding = [(1, 1, d), (d, 3, 16, 16), (d,), (1, patches + 1, d)]
    return embedding + 24 * layer + norm(d) + [(1000, d), (1000,)]


SHAPES = {
    "llama-3-8b": llama_8b(),
    "llama-3.2-1b": llama_1b(),
    "vit-l-16": vit_large(),
    "gpt2": gpt2(),
    "resnet-50": resnet_50(),
    "400x2048": 400 * [(2048,)],
    "10000x16": 10000 * [(16,)],
}
