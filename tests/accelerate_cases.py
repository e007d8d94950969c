"""accelerate's loop over several ranks: DistributedDataParallel, and a process group of ours.

    python tests/accelerate_cases.py FOLDER WORLD_SIZE cpu

as rank_cases.py.
"""

import os

import torch
from accelerate import Accelerator
from rank_cases import case, main
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradacc_kernels as gk

K = 3


def accelerator_of(ranks):
    os.environ |= {
        name: str(value)
        for name, value in {
            "RANK": ranks.rank,
            "LOCAL_RANK": ranks.rank,
            "WORLD_SIZE": ranks.world_size,
            "LOCAL_WORLD_SIZE": ranks.world_size,
            "MASTER_ADDR": "127.0.0.1",
        }.items()
    }
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=K)
    assert accelerator.num_processes == ranks.world_size and accelerator.use_distributed
    return accelerator


def model_of(dtype):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)).to(dtype)


def windows(accelerator, model, optimizer, batches, clip):
    """Trains, and returns the norms."""
    norms = []
    for x in batches:
        with accelerator.accumulate(model):
            accelerator.backward(model(x).float().square().mean())
            if accelerator.sync_gradients:
                norms.append(accelerator.clip_grad_norm_(model.parameters(), clip).item())
            optimizer.step()
            optimizer.zero_grad()
    return norms


@case
def ddp_is_that_of_stock(ranks):
    """Bit for bit where nothing is clipped."""
    batches = ranks.batches(2 * K, dtype=torch.float32)
    batches = [x[:, :6] for x in batches]
    for clip, rtol in ((1e9, 0.0), (0.1, 1e-5)):
        trained, norms = [], []
        for attaches in (False, True):
            accelerator = accelerator_of(ranks)
            model = model_of(torch.float32)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            model, optimizer = accelerator.prepare(model, optimizer)
            assert isinstance(model, DistributedDataParallel)
            if attaches:
                prepared = gk.integrations.accelerate.prepare(accelerator, model, optimizer)
            norms.append(windows(accelerator, model, optimizer, batches, clip))
            if attaches:
                assert prepared.accumulator.counters["windows"] == 2
                prepared.close()
            trained.append([p.detach() for p in model.parameters()])
        for ours, theirs in zip(*trained, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol)
            assert all(torch.equal(ours, other) for other in ranks.gathered(ours))
        torch.testing.assert_close(*norms, rtol=1e-5, atol=0)


@case
def sixteen_bit_parameters_by_a_process_group(ranks):
    """DDP cannot reduce them in float32; ``accumulate(model)`` has one reduction a window."""
    accelerator = accelerator_of(ranks)
    batches = [x[:, :6] for x in ranks.batches(K)]
    local = model_of(torch.bfloat16)
    with gk.attach(local, scale=1.0):
        for x in batches:
            (local(x).float().square().mean() / K).backward()
        sums = [p.grad.clone() for p in local.parameters()]
    means = [torch.stack(ranks.gathered(grad)).mean(0) for grad in sums]

    model = model_of(torch.bfloat16)
    optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    model = accelerator.prepare_model(model, evaluation_mode=True)  # without DDP
    prepare = gk.integrations.accelerate.prepare
    with prepare(accelerator, model, optimizer, process_group=ranks.group):
        for x in batches:
            with accelerator.accumulate(model):
                accelerator.backward(model(x).float().square().mean())
                if not accelerator.sync_gradients:
                    before = model[0].weight.grad.clone()
                    others = ranks.gathered(before)
                    assert not torch.equal(others[0], others[1])  # not reduced
        for param, mean in zip(model.parameters(), means, strict=True):
            assert param.grad.dtype == torch.float32
            torch.testing.assert_close(param.grad, mean, rtol=1e-6, atol=1e-7)
            assert all(torch.equal(param.grad, other) for other in ranks.gathered(param.grad))
        optimizer.step()
        optimizer.zero_grad()
    assert "no_sync" not in vars(model)
    for param in model.parameters():
        assert all(torch.equal(param, other) for other in ranks.gathered(param.detach()))


if __name__ == "__main__":
    main()
