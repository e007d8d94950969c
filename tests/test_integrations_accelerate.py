"""accelerate's loop, as it is, over a model that was prepared by us too."""

from functools import partial

import pytest
import torch
from hook_cases import needs_extension
from loop_cases import STEPS, ULPS, K, check_same_training, check_window, importorskip, run, stock
from test_ranks import assert_passed, names, runs
from test_real_loops_hugging_face import BATCH, bfloat16, examples, fresh_accelerator, llama  # noqa: F401

import gradacc_kernels as gk

sgd = partial(torch.optim.SGD, lr=0.1)
OVERFLOW = 1  # the window whose loss overflows, where one does


def prepare(*arguments, **options):
    importorskip("accelerate")
    return gk.integrations.accelerate.prepare(*arguments, **options)


def train(
    model,
    attach=None,
    *,
    precision="no",
    make=sgd,
    scaler=None,
    clip=1.0,
    steps=STEPS,
    factor_of=lambda window: 1.0,
):
    """A loop of accelerate's docs; what it saw is left in ``model.seen``, a row a window."""
    accelerate = importorskip("accelerate")
    accelerator = accelerate.Accelerator(
        cpu=True, mixed_precision=precision, gradient_accumulation_steps=K
    )
    accelerator.scaler = scaler  # as that of fp16, which accelerate has for GPUs alone
    optimizer = make(model.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    loader = torch.utils.data.DataLoader(examples(K * BATCH * steps), BATCH, shuffle=True)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    prepared = None
    if attach is not stock:
        options = getattr(attach, "keywords", {})
        prepared = prepare(accelerator, model, optimizer, **options)
    model.seen = []
    for number, batch in enumerate(loader):
        with accelerator.accumulate(model):
            loss = model(**batch).loss * factor_of(number // K)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                if scaler is not None and prepared is None:
                    scaler.unscale_(optimizer.optimizer)
                norm = accelerator.clip_grad_norm_(model.parameters(), clip)
                rate = schedule.get_last_lr()[0]
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            was_skipped = float(accelerator.optimizer_step_was_skipped)
            scale = 1.0 if scaler is None else accelerator.scaler.get_scale()
            model.seen.append([loss.item(), norm.item(), rate, was_skipped, scale])
    if prepared is not None:
        model.counters = prepared.accumulator.counters
        prepared.close()
        prepared.close()
        assert accelerator.scaler is scaler is optimizer.scaler
        assert "clip_grad_norm_" not in vars(accelerator)


def check_same_rows(ours, theirs):
    torch.testing.assert_close(
        torch.tensor(ours.seen), torch.tensor(theirs.seen), rtol=1e-5, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("clip", [1.0, 1e9], ids=["clipped", "not-clipped"])
def test_same_training(precision, clip):
    loop = partial(train, precision=precision, clip=clip)
    # The norm from the statistics is rounded in another order, and so is what it clips.
    ours, theirs = check_same_training(llama, loop, "auto", ulps=ULPS if clip == 1.0 else 0)
    check_same_rows(ours, theirs)
    assert ours.counters["windows"] == STEPS and ours.counters["skipped_windows"] == 0


def test_same_training_fused():
    check_same_training(llama, train, True, ulps=ULPS)


@pytest.mark.parametrize("fuse", ["auto", True], ids=["default", "fused"])
def test_window_of_16_bit_parameters(fuse):
    check_window(bfloat16(llama), partial(train, steps=1, clip=1e9), fuse, gain=1000)


@pytest.mark.parametrize("overflows", [False, True], ids=["finite", "overflow"])
@pytest.mark.parametrize("optimizer", ["sgd", "fused-adamw"])
def test_loss_scale(overflows, optimizer):
    """A scaler of ours takes over, and gives back: the same scales, skips and parameters."""
    make, clip, ulps = sgd, 1.0, ULPS
    if optimizer == "fused-adamw":  # which skips in its kernel; nothing is clipped: equal bits
        make, clip, ulps = partial(torch.optim.AdamW, lr=1e-2, fused=True), 1e9, 0

    def factor_of(window):
        return float("inf") if overflows and window == OVERFLOW else 1.0

    def loop(model, attach):
        # Powers of two: unscaling rounds nothing.
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        train(model, attach, scaler=scaler, make=make, clip=clip, factor_of=factor_of)
        model.scaler = scaler.state_dict()

    ours, theirs = check_same_training(llama, loop, "auto", ulps=ulps)
    check_same_rows(ours, theirs)
    assert ours.scaler == theirs.scaler
    assert ours.counters["skipped_windows"] == overflows


@pytest.mark.parametrize("nonfinite", ["skip_window", "ignore"])
def test_a_window_that_is_not_finite(nonfinite):
    def factor_of(window):
        return float("inf") if window == OVERFLOW else 1.0

    loop = partial(train, attach=partial(gk.attach, nonfinite=nonfinite), factor_of=factor_of)
    model, _ = run(llama, lambda model, _: loop(model), None)
    is_skipping = nonfinite == "skip_window"
    assert [row[3] for row in model.seen] == [0, is_skipping, 0]
    assert all(p.isfinite().all() for p in model.parameters()) == is_skipping


def prepared_linear(**options):
    accelerate = importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=K)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    return accelerator, model, optimizer


def test_clipping_of_other_parameters_is_that_of_accelerate():
    accelerator, model, optimizer = prepared_linear()
    with prepare(accelerator, model, optimizer) as prepared:
        model(torch.randn(5, 3)).square().sum().backward()
        first = list(model[0].parameters())
        norms = prepared.accumulator.grad_norms()
        expected = torch.stack([norms["0.weight"], norms["0.bias"]]).norm()
        torch.testing.assert_close(accelerator.clip_grad_norm_(first, 1e-3), expected)
        torch.testing.assert_close(
            torch.cat([p.grad.flatten() for p in first]).norm().item(), 1e-3, rtol=1e-3, atol=0
        )
        other = torch.nn.Parameter(torch.zeros(2))
        other.grad = torch.full((2,), 1e6)
        norm = accelerator.clip_grad_norm_([*model.parameters(), other], 1.0)
        assert norm > 1e6 and other.grad.norm() <= 1.0
        whole = accelerator.clip_grad_norm_(model[0].weight, float("inf"))
        torch.testing.assert_close(whole, model[0].weight.grad.norm())
    assert model[0].weight.grad is not None  # closed: left as stock PyTorch has it
    assert repr(prepared.accumulator) == "Accumulator(detached)"
    with prepare(accelerator, model, optimizer):
        pass


def test_a_checkpoint_in_the_middle_of_a_window(tmp_path):
    data = torch.randn(K, 5, 3)
    sums = []
    for resumes in (False, True):
        torch.manual_seed(3)
        accelerator, model, optimizer = prepared_linear()
        with prepare(accelerator, model, optimizer, fuse=False) as prepared:
            accelerator.register_for_checkpointing(prepared.accumulator)
            if resumes:
                accelerator.load_state(tmp_path / "state")
                assert prepared.accumulator.micro_batches == 2
            for number, x in enumerate(data):
                if number >= 2 or not resumes:
                    accelerator.backward(model(x).square().sum())
                if number == 1 and not resumes:
                    accelerator.save_state(tmp_path / "state")
            sums.append([p.grad.clone() for p in model.parameters()])
    assert all(map(torch.equal, *sums))


def test_what_is_refused():
    accelerator, model, optimizer = prepared_linear()
    with pytest.raises(TypeError, match="as accelerator.prepare returned them, got SGD"):
        prepare(accelerator, model, optimizer.optimizer)
    with pytest.raises(ValueError, match="scale must be positive"):
        prepare(accelerator, model, optimizer, scale=0.0)
    assert "clip_grad_norm_" not in vars(accelerator) and optimizer.scaler is None
    accelerator.state.distributed_type = gk.integrations.accelerate.SUMS_BY_ITSELF[0]
    with pytest.raises(ValueError, match="DEEPSPEED sums gradients by itself"):
        prepare(accelerator, model, optimizer)


@needs_extension
@pytest.mark.parametrize("name", names("accelerate_cases.py"))
@runs("accelerate_cases.py", (2, "cpu"))
def test_ranks(ranks, name):
    importorskip("accelerate")
    assert_passed(ranks, name)
