"""DistributedDataParallel over float32 parameters: gradients are those of stock DDP, bit for bit.

    python tests/ddp_cases.py FOLDER WORLD_SIZE [cpu|cuda]

as rank_cases.py. Parameters, inputs and the gradients of the output are small integers, so that
every sum is exact in float32 and in bfloat16, in any order: gradients need no tolerance.
"""

import contextlib
import itertools
from unittest import mock

import torch
from rank_cases import case, main
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import gradacc_kernels as gk
from gradacc_kernels import distributed

STOCK = (None, False)
WAYS = ("ddp", "module", "module before DDP", "list")


class Net(nn.Module):
    """Layers that fused modules know, and two branches that a micro-batch may leave out."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(8, 6)
        self.first = nn.Linear(6, 4)
        self.last = nn.Linear(4, 3)
        self.branches = nn.ModuleList(nn.Linear(4, 3, bias=False) for _ in range(2))
        generator = torch.Generator().manual_seed(0)
        for param in self.parameters():
            param.data.copy_(torch.randint(-1, 2, param.shape, generator=generator))

    def forward(self, tokens, branches=(0, 1), reentrant=None):
        def hidden(x):
            return self.first(x).relu()

        x = self.embedding(tokens)
        x = hidden(x) if reentrant is None else checkpoint(hidden, x, use_reentrant=reentrant)
        return self.last(x) + sum(self.branches[index](x) for index in branches)


class Trainer:
    """A model under DDP, and what its gradients were after each backward.

    Args:
        ranks: of rank_cases.
        form: backend and fuse of attach; STOCK for none.
        autocast: to bfloat16.
        way: what is given to attach, and when: one of WAYS.
        reads_main_grad: after each backward.
        options: of DistributedDataParallel.
    """

    def __init__(self, ranks, form, autocast=False, way="ddp", reads_main_grad=True, **options):
        self.ranks, self.autocast, self.reads_main_grad = ranks, autocast, reads_main_grad
        self.model = Net().to(ranks.device)
        self.accumulator = None
        if way == "module before DDP":
            self._attach(self.model, form)
        self.ddp = DistributedDataParallel(self.model, **options)
        if way != "module before DDP":
            targets = {"ddp": self.ddp, "module": self.model, "list": self.model.parameters()}
            self._attach(targets[way], form)
        self.params = list(self.model.parameters())
        self.seen = []
        self.micro_batch = 0

    def _attach(self, target, form):
        backend, fuse = form
        if backend is not None:
            fuse = fuse and isinstance(target, nn.Module)
            self.accumulator = gk.attach(target, backend=backend, fuse=fuse)

    def backward(self, sync=True, scale=None, **options):
        """One micro-batch, of which each has another gradient on each rank."""
        self.micro_batch += 1
        generator = torch.Generator().manual_seed(100 * self.micro_batch + self.ranks.rank)
        tokens = torch.randint(0, 8, (3,), generator=generator).to(self.ranks.device)
        weight = torch.randint(-2, 3, (3, 3), generator=generator).to(self.ranks.device)
        with contextlib.nullcontext() if sync else self.ddp.no_sync():
            with torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.autocast):
                output = self.ddp(tokens, **options)
            loss = (output.float() * weight).sum()
            (loss if scale is None else scale(loss)).backward()
        self.look()

    def look(self):
        """Keeps the gradients; those of an attached model agree with all that tells of them."""
        grads = [param.grad for param in self.params]
        self.seen.append([None if grad is None else grad.clone() for grad in grads])
        if self.accumulator is None:
            return
        norm = norm_of(grads)
        for from_statistics in (True, False):
            ours = self.accumulator.grad_norm(from_statistics=from_statistics)
            torch.testing.assert_close(ours.double(), norm, rtol=1e-6, atol=0, equal_nan=True)
        assert bool(self.accumulator.found_inf) == bool(norm.isnan())
        for param, grad in zip(self.params, grads, strict=True):
            assert grad is None or grad.dtype == torch.float32
            if grad is not None and self.reads_main_grad:
                assert torch.allclose(param.main_grad, grad, rtol=0, atol=0, equal_nan=True)
                assert param.grad.data_ptr() == param.main_grad.data_ptr()


def norm_of(grads):
    squares = [grad.double().square().sum() for grad in grads if grad is not None]
    norm = torch.stack(squares).sum().sqrt()
    return norm if norm.isfinite() else norm * torch.nan


def forms(ranks):
    return list(itertools.product(ranks.backends, (False, True)))


def seen_by(loop, trainer):
    loop(trainer)
    if trainer.accumulator is not None:
        trainer.accumulator.detach()
    assert trainer.seen
    return trainer.seen


def differences(ours, stock):
    """Backwards, and parameters, whose gradients are not the same bits, or None in one alone."""
    return [
        (backward, index)
        for backward, pair in enumerate(zip(ours, stock, strict=True))
        for index, (a, b) in enumerate(zip(*pair, strict=True))
        if (a is None) != (b is None) or a is not None and not a.equal(b)
    ]


def assert_as_stock(ranks, loop, way="ddp", reads_main_grad=True, **options):
    """Each backward of loop(trainer) leaves the gradients that it leaves in stock DDP."""
    for autocast in (False, True):
        stock = seen_by(loop, Trainer(ranks, STOCK, autocast, **options))
        for form in forms(ranks):
            ours = Trainer(ranks, form, autocast, way, reads_main_grad, **options)
            found = differences(seen_by(loop, ours), stock)
            assert not found, (found, form, autocast, way, options)


def windows(trainer):
    for set_to_none in (True, False, True):
        for micro_batch in range(3):
            trainer.backward(sync=micro_batch == 2)
        trainer.ranks.assert_same(trainer.seen[-1])
        trainer.model.zero_grad(set_to_none)
    trainer.backward()
    trainer.backward()  # over what the ranks have averaged


@case
def windows_are_those_of_stock(ranks):
    for way in WAYS:
        assert_as_stock(ranks, windows, way=way)


@case
def bucket_views(ranks):
    for way, reads_main_grad in (("ddp", False), ("module before DDP", False), ("module", True)):
        assert_as_stock(
            ranks,
            windows,
            way=way,
            reads_main_grad=reads_main_grad,
            gradient_as_bucket_view=True,
        )


@case
def a_wrong_gradient_is_seen(ranks):
    def loop(trainer):
        trainer.backward(sync=trainer.accumulator is None)
        trainer.model.zero_grad()
        trainer.backward()

    stock = seen_by(loop, Trainer(ranks, STOCK))
    for form in forms(ranks):
        found = differences(seen_by(loop, Trainer(ranks, form)), stock)
        assert {backward for backward, _ in found} == {0}


@case
def modules_are_fused(ranks):
    for backend in ranks.backends:
        trainer = Trainer(ranks, (backend, True))
        assert "1 Embedding, 4 Linear" in repr(trainer.accumulator)


@case
def sync_turned_off_by_hand(ranks):
    def loop(trainer):
        for _ in range(2):
            trainer.ddp.require_backward_grad_sync = False
            trainer.backward()
            trainer.backward()
            trainer.ddp.require_backward_grad_sync = True
            trainer.backward()
            trainer.ranks.assert_same(trainer.seen[-1])
            trainer.model.zero_grad()

    assert_as_stock(ranks, loop)


@case
def unused_parameters(ranks):
    def loop(trainer):
        branch = (0,) if ranks.rank == 0 else ()
        other = () if ranks.rank == 0 else (0,)
        for set_to_none in (True, False, True):
            for uses in ([branch], [other, branch], [other, ()], [(), ()], [branch, other, (0,)]):
                for index, branches in enumerate(uses):
                    trainer.backward(sync=index == len(uses) - 1, branches=branches)
                trainer.model.zero_grad(set_to_none)

    for is_view in (False, True):
        assert_as_stock(ranks, loop, find_unused_parameters=True, gradient_as_bucket_view=is_view)


@case
def static_graphs(ranks):
    for reentrant, is_view in itertools.product((None, False, True), (False, True)):
        branches = (1,) if is_view else (0, 1)

        def loop(trainer, reentrant=reentrant, branches=branches):
            for window in range(3):
                for micro_batch in range(2):
                    is_last = window == 0 or micro_batch == 1  # the first backward must sync
                    trainer.backward(sync=is_last, reentrant=reentrant, branches=branches)
                trainer.model.zero_grad()

        assert_as_stock(ranks, loop, static_graph=True, gradient_as_bucket_view=is_view)


@case
def checkpoints_without_static_graph(ranks):
    for reentrant in (False, True):

        def loop(trainer, reentrant=reentrant):
            for micro_batch in range(4):
                trainer.backward(sync=micro_batch % 2 == 1, reentrant=reentrant)

        assert_as_stock(ranks, loop)


@case
def communication_hooks(ranks):
    def loop(trainer):
        trainer.ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)
        for micro_batch in range(4):
            trainer.backward(sync=micro_batch % 2 == 1)

    for is_view in (False, True):
        assert_as_stock(ranks, loop, gradient_as_bucket_view=is_view)


@case
def ranks_with_fewer_inputs_join(ranks):
    def loop(trainer):
        with trainer.ddp.join():
            for _ in range(2 + ranks.rank):
                trainer.backward()
                trainer.model.zero_grad()

    assert_as_stock(ranks, loop)


@case
def closes_are_those_of_stock(ranks):
    """The norm, and so what clips and skips, is that of the mean, and not that of the pass."""
    for form, is_view in itertools.product(forms(ranks), (False, True)):
        options = {"reads_main_grad": False, "gradient_as_bucket_view": is_view}
        stock = Trainer(ranks, STOCK, **options)
        for close in ("step", "clip_grad_norm_", "stock"):
            ours = Trainer(ranks, form, **options)
            norms = []
            for trainer in (Trainer(ranks, STOCK, **options), ours):
                optimizer = torch.optim.SGD(trainer.params, lr=0.125)
                accumulator = trainer.accumulator
                for _ in range(2):
                    trainer.backward(sync=False)
                    local = norm_of(trainer.seen[-1])
                    trainer.backward()
                    if accumulator is None or close == "stock":
                        norm = torch.nn.utils.clip_grad_norm_(trainer.params, 1.0)
                        optimizer.step()
                    elif close == "clip_grad_norm_":
                        norm = accumulator.clip_grad_norm_(1.0)
                        optimizer.step()
                    else:
                        norm = accumulator.step(optimizer, max_norm=1.0)
                    assert norm > 1.5 and (norm - local).abs() > 0.1  # of other sums, and clips
                    norms.append(norm)
                    trainer.model.zero_grad()
                ranks.assert_same([norm, *trainer.params])
                stock = trainer if accumulator is None else stock
            assert ours.accumulator.micro_batches == 0
            torch.testing.assert_close(norms[2:], norms[:2], rtol=1e-6, atol=0)
            # Two steps, each of a norm, a factor, a product and a difference.
            for a, b in zip(ours.params, stock.params, strict=True):
                assert (a - b).abs().max() <= 2 * 4 * 2.0**-23 * (1 + b.abs().max())
            ours.accumulator.detach()


@case
def an_overflow_of_one_rank_is_that_of_all(ranks):
    for form, is_view, is_ours in itertools.product(forms(ranks), (False, True), (False, True)):
        trainer = Trainer(ranks, form, reads_main_grad=False, gradient_as_bucket_view=is_view)
        options = {"device": ranks.device.type, "init_scale": 16.0}
        scaler = torch.amp.GradScaler(**options)
        if is_ours:
            scaler = gk.GradScaler(trainer.accumulator, **options)
        optimizer = torch.optim.SGD(trainer.params, lr=0.125)
        for window in range(3):
            before = [p.detach().clone() for p in trainer.params]
            overflows = window == 1 and ranks.rank == 0
            trainer.backward(sync=False, scale=scaler.scale)
            trainer.backward(scale=lambda loss, s=scaler, o=overflows: s.scale(loss / (1 - o)))
            assert bool(trainer.accumulator.found_inf) == (window == 1)
            scaler.step(optimizer)
            scaler.update()
            assert all(map(torch.equal, trainer.params, before)) == (window == 1)
            assert scaler.get_scale() == (16 if window == 0 else 8)
            ranks.assert_same(trainer.params)
            trainer.model.zero_grad()
        trainer.accumulator.detach()


def refusal(kind, function, *args, **options):
    """What a call is refused with."""
    try:
        function(*args, **options)
    except kind as error:
        return str(error)
    raise AssertionError(f"took {args} {options}")


@case
def weights_are_refused(ranks):
    for backend, way in itertools.product(ranks.backends, WAYS):
        trainer = Trainer(ranks, (backend, False), way=way)
        accumulator = trainer.accumulator
        said = refusal(RuntimeError, accumulator.micro_batch(2.0).__enter__)
        assert "attach(model, process_group=" in said
        with accumulator.micro_batch():
            trainer.backward()  # nothing was begun
        accumulator.step(torch.optim.SGD(trainer.params, lr=0.125))
        ranks.assert_same(trainer.params)
        accumulator.detach()
    model = Net().to(ranks.device)
    with gk.attach(model) as accumulator:
        with accumulator.micro_batch(2.0):
            pass  # nobody reduces
        with mock.patch.object(distributed.dispatch, "extension", lambda: "not built"):
            assert "process_group=" in refusal(RuntimeError, accumulator.micro_batch(2.0).__enter__)


@case
def two_reductions_are_refused(ranks):
    for backend in ranks.backends:
        options = {"backend": backend, "process_group": ranks.group}
        model = Net().to(ranks.device)
        ddp = DistributedDataParallel(model)
        for target in (ddp, model, list(model.parameters())):
            assert "would do so again" in refusal(RuntimeError, gk.attach, target, **options)
        assert not hasattr(model.last.weight, "main_grad")

        model = Net().to(ranks.device)
        accumulator = gk.attach(model, **options)
        ddp = DistributedDataParallel(model)
        loss = ddp(torch.arange(3, device=ranks.device)).sum()
        assert "would do so again" in refusal(RuntimeError, loss.backward)
        accumulator.detach()


@case
def dropping_micro_batches_is_refused(ranks):
    for backend in ranks.backends:
        ddp = DistributedDataParallel(Net().to(ranks.device))
        accumulator = gk.attach(ddp, backend=backend, nonfinite="skip_micro_batch")
        loss = ddp(torch.arange(3, device=ranks.device)).sum()
        assert "a hook of others reads the .grad" in refusal(RuntimeError, loss.backward)
        assert all(p.grad is None for p in ddp.parameters())
        accumulator.detach()


if __name__ == "__main__":
    main()
