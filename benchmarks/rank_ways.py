"""The ways to sum gradients over micro-batches and ranks that bench_ranks.py compares.

A way builds the same model on every rank, and a loop over it as its users write one: from then on
``window(k)`` leaves the mean over the ranks of what each has summed over k micro-batches. There is
no optimizer: its step is the same in all ways of a family, but for FSDP2's, which has a share of
the parameters on each rank.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import llama
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import gradacc_kernels as gk
from gradacc_kernels.reducer import Reducer

BF16, FP32 = torch.bfloat16, torch.float32


class Loop:
    """A training loop without its optimizer.

    Args:
        module: what is called.
        autocast: whether forward passes run under it.
        tokens: int64 [K, 1, T], targets alike: a micro-batch each, the rank's own.

    Attributes:
        skips: whether a window can leave its reduction out.
        unseen_bytes: on a device, which torch's allocator does not count.
    """

    skips = True
    unseen_bytes = 0

    def __init__(self, module: nn.Module, autocast: bool, tokens: Tensor, targets: Tensor):
        self.module = module
        self.is_autocast = autocast
        self.tokens, self.targets = tokens, targets

    def syncing(self, is_on: bool) -> AbstractContextManager:
        """Returns what a micro-batch runs in, which reduces or does not."""
        return contextlib.nullcontext() if is_on else self.no_sync()

    def no_sync(self) -> AbstractContextManager:
        """Returns a context whose micro-batches are summed and not reduced."""
        raise NotImplementedError

    def loss(self, index: int) -> Tensor:
        """Runs forward."""
        with torch.autocast(self.tokens.device.type, BF16, enabled=self.is_autocast):
            return self.module(self.tokens[index], self.targets[index])

    def window(self, count: int, reduces: bool = True) -> None:
        """Clears, sums ``count`` micro-batches, and reduces in the last one."""
        self.module.zero_grad(set_to_none=True)
        for index in range(count):
            with self.syncing(reduces and index == count - 1):
                self.loss(index).backward()

    def halves(self) -> tuple[float, float]:
        """Returns the seconds of forward and of backward, which reduces nothing."""
        self.module.zero_grad(set_to_none=True)
        with self.no_sync():
            begin = now(self.tokens.device)
            loss = self.loss(0)
            between = now(self.tokens.device)
            loss.backward()
            return between - begin, now(self.tokens.device) - between


def now(device: torch.device) -> float:
    """Returns the seconds of a clock when the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Attached(Loop):
    """attach with a process group.

    Args:
        options: of attach.
        max_ctas: thread blocks that NCCL may use, each of which keeps an SM from backward.
        embeds: whether the input embedding is trained, whose gradient comes last.
        is_whole: whether copies bring the last bucket too, with rows that were not touched.
    """

    def __init__(
        self,
        model: llama.Llama,
        *args,
        max_ctas: int | None = None,
        embeds: bool = True,
        is_whole: bool = False,
        **options,
    ):
        super().__init__(model, *args)
        model.embedding.requires_grad_(embeds)
        group = dist.group.WORLD if max_ctas is None else limited_group(max_ctas)
        self.accumulator = gk.attach(model, process_group=group, **options)
        if is_whole:
            self.reducer._touched = None

    @property
    def unseen_bytes(self) -> int:
        """See Loop: symmetric memory."""
        return self.reducer.symmetric_bytes

    @property
    def reducer(self) -> Reducer:
        """What reduces its gradients."""
        return self.accumulator._attachment.reducer

    def no_sync(self) -> AbstractContextManager:
        """See Loop."""
        return self.accumulator.no_sync()

    def reduce_alone(self) -> None:
        """Reduces all buckets with nothing beside; averaging again changes no value."""
        self.reducer.launch(0, 1 + max(self.reducer.bucket_of))
        self.reducer.wait()


@functools.cache
def limited_group(max_ctas: int) -> dist.ProcessGroup:
    """Returns a process group of all ranks whose NCCL kernels have no more thread blocks."""
    options = dist.ProcessGroupNCCL.Options()
    options.config.max_ctas = max_ctas
    return dist.new_group(pg_options=options)


class Ddp(Loop):
    """DistributedDataParallel, at its best: gradients are views, and buffers are not broadcast."""

    # Its name from torch 2.13 on, and before.
    BUFFERS = ("forward_sync_buffers", "broadcast_buffers")

    def __init__(self, model: nn.Module, *args, views: bool = True):
        known = inspect.signature(DistributedDataParallel).parameters
        buffers = next(name for name in self.BUFFERS if name in known)
        module = DistributedDataParallel(model, gradient_as_bucket_view=views, **{buffers: False})
        super().__init__(module, *args)

    def no_sync(self) -> AbstractContextManager:
        """See Loop."""
        return self.module.no_sync()


class AttachedDdp(Ddp):
    """attach to a model that DistributedDataParallel reduces, which has to own its buckets."""

    def __init__(self, model: nn.Module, *args):
        super().__init__(model, *args, views=False)
        self.accumulator = gk.attach(self.module)


class Fsdp(Loop):
    """fully_shard, of float32 parameters that are gathered in bfloat16, reduced in float32.

    Each layer, the embedding and the head are units of their own: in the root's, the gradients of
    the two largest weights would be reduced when backward has ended.

    Args:
        reshards: whether parameters are sharded again after forward. If not, they are kept until
            the window's last backward too, so that they are gathered once a window.
        attach: whether gradients are summed by attach.
    """

    skips = False  # it would keep the sum for the next window

    def __init__(self, model: llama.Llama, *args, reshards: bool = True, attach: bool = False):
        device = next(model.parameters()).device
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        policy = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=FP32)
        options = {} if reshards else {"reshard_after_forward": False}
        for module in (model.embedding, *model.layers, model.head, model):
            fully_shard(module, mesh=mesh, mp_policy=policy, **options)
        super().__init__(model, *args)
        self.reshards = reshards
        self.is_syncing: bool | None = None
        if attach:
            self.accumulator = gk.attach(model)

    def syncing(self, is_on: bool) -> AbstractContextManager:
        """See Loop: FSDP2 has switches, and no context."""
        if is_on != self.is_syncing:
            self.module.set_requires_gradient_sync(is_on)
            self.module.set_is_last_backward(is_on)
            if not self.reshards:
                self.module.set_reshard_after_backward(is_on)
            self.is_syncing = is_on
        return contextlib.nullcontext()


@dataclass(frozen=True)
class Way:
    """One way.

    Attributes:
        name: for the tables.
        family: "bf16" for bfloat16 parameters, "autocast" for float32 ones under autocast, "fsdp2"
            for float32 shards that are gathered in bfloat16.
        role: "ours", "ddp", "fsdp2" or "option", which is one of ours that is not the default.
        loop: (model, autocast, tokens, targets) -> its loop.
    """

    name: str
    family: str
    role: str
    loop: Callable[..., Loop]

    def build(self, shape: llama.Shape, n_tokens: int, count: int, device: torch.device) -> Loop:
        """Returns its loop over a new model, with data for ``count`` micro-batches."""
        model = llama.build(shape, BF16 if self.family == "bf16" else FP32, device)
        generator = torch.Generator(device).manual_seed(1 + dist.get_rank())
        text = torch.randint(
            shape.vocabulary, (count, 1, n_tokens + 1), generator=generator, device=device
        )
        tokens, targets = text[..., :-1].contiguous(), text[..., 1:].contiguous()
        return self.loop(model, self.family == "autocast", tokens, targets)


OURS = tuple(Way("attach", family, "ours", Attached) for family in ("bf16", "autocast"))

# Ours next to the peer of the same parameters, for the clocks' sake.
WAYS = (
    OURS[0],
    Way("DDP", "bf16", "ddp", Ddp),
    Way("FSDP2", "fsdp2", "fsdp2", Fsdp),
    Way("FSDP2, attach", "fsdp2", "ours", partial(Fsdp, attach=True)),
    Way("FSDP2, reshard_after_forward=False", "fsdp2", "fsdp2", partial(Fsdp, reshards=False)),
    Way(
        "FSDP2, reshard_after_forward=False, attach",
        "fsdp2",
        "ours",
        partial(Fsdp, reshards=False, attach=True),
    ),
    OURS[1],
    Way("DDP", "autocast", "ddp", Ddp),
)

BY_ALL_REDUCE = partial(Attached, reduce_by="all_reduce")
IN_16_BITS = partial(Attached, reduce_dtype=BF16)
OPTIONS = (
    Way("attach(reduce_by='all_reduce')", "bf16", "option", BY_ALL_REDUCE),
    Way("attach(reduce_by='all_reduce')", "autocast", "option", BY_ALL_REDUCE),
    Way("attach(reduce_dtype=bfloat16)", "bf16", "option", IN_16_BITS),
    Way("attach(reduce_dtype=bfloat16)", "autocast", "option", IN_16_BITS),
    Way("attach(DDP)", "autocast", "option", AttachedDdp),
)


def reduced_by(reduce_by: str, words: str = "", **options: int | None) -> Way:
    """Returns our way over bfloat16 parameters with another reduction.

    Args:
        reduce_by: of attach.
        words: what else is other, for the tables.
        **options: of Attached.
    """
    name = ", ".join(filter(None, [reduce_by, words]))
    return Way(name, "bf16", "ours", partial(Attached, reduce_by=reduce_by, **options))
