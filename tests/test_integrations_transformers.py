"""The Trainer of transformers with GradAccCallback, and LoRA adapters of PEFT by it."""

import subprocess
import sys
from functools import partial

import pytest
import torch
from loop_cases import STEPS, ULPS, K, check_same_training, check_window, importorskip, run, stock
from test_real_loops_hugging_face import (  # noqa: F401
    BATCH,
    CONTEXT,
    VOCABULARY,
    bfloat16,
    fresh_accelerator,
    llama,
    lora,
)

import gradacc_kernels as gk

sgd = {"optim": "sgd", "learning_rate": 0.1}
every_form = pytest.mark.parametrize("knows_trainer", [False, True], ids=["alone", "with-trainer"])


def examples():
    """Two windows, and one of a single micro-batch; of each row other tokens are to be learnt."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(VOCABULARY, (BATCH * (2 * K + 1), CONTEXT), generator=generator)
    labels = ids.clone()
    for row, count in zip(labels, torch.randint(CONTEXT - 2, (len(ids),), generator=generator)):
        row[:count] = -100
    return [{"input_ids": i, "labels": row} for i, row in zip(ids, labels, strict=True)]


@pytest.fixture
def train(tmp_path):
    """Trains with a callback where ``attach`` is not stock, and returns the Trainer."""
    transformers = importorskip("transformers")

    def train(
        model, attach=None, *, knows_trainer=True, callbacks=(), attached=(), resume=None, **options
    ):
        settings = {**sgd, "num_train_epochs": 1, "save_strategy": "no", **options}
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=K,
            use_cpu=True,
            report_to=[],
            logging_steps=1,
            disable_tqdm=True,
            **settings,
        )
        trainer = transformers.Trainer(
            model, arguments, train_dataset=examples(), callbacks=list(callbacks)
        )
        if attach is not stock:
            fuse = attach.keywords.get("fuse", "auto") if isinstance(attach, partial) else "auto"
            integration = gk.integrations.transformers
            callback = integration.GradAccCallback(trainer if knows_trainer else None, fuse=fuse)
            trainer.add_callback(callback)
            model.callback = callback
        trainer.train(resume_from_checkpoint=resume)
        model.logs = [log for log in trainer.state.log_history if "loss" in log]

    return train


def observer(event, see):
    """A callback that calls a function with the model, at an event."""
    transformers = importorskip("transformers")

    class Observer(transformers.TrainerCallback):
        pass

    def call(self, args, state, control, model=None, **kwargs):
        see(model, state)

    setattr(Observer, event, call)
    return Observer()


def values(model, key):
    return torch.tensor([log[key] for log in model.logs])


@every_form
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("optim", ["sgd", "adamw_torch_fused"])
def test_same_training(train, knows_trainer, bf16, optim):
    loop = partial(train, knows_trainer=knows_trainer, bf16=bf16, optim=optim)
    # The norm from the statistics is rounded in another order, and so is what it clips.
    is_exact = not knows_trainer
    ours, theirs = check_same_training(llama, loop, "auto", ulps=0 if is_exact else 40 * ULPS)
    assert len(ours.logs) == 3
    for key in ("loss", "grad_norm", "learning_rate"):
        torch.testing.assert_close(values(ours, key), values(theirs, key), rtol=1e-5, atol=0)
    assert values(ours, "gradacc/micro_batches").tolist() == [K, K, 1]
    assert values(ours, "gradacc/skipped_windows").tolist() == [0, 0, 0]
    assert repr(ours.callback.accumulator) == "Accumulator(detached)"
    assert "gradacc/micro_batches" not in theirs.logs[0]


@every_form
@pytest.mark.parametrize("fuse", ["auto", True], ids=["default", "fused"])
def test_window_of_16_bit_parameters(train, knows_trainer, fuse):
    loop = partial(train, knows_trainer=knows_trainer, max_steps=1, max_grad_norm=0.0)
    check_window(bfloat16(llama), loop, fuse, gain=1000)


def test_clipping_takes_the_statistics(train, monkeypatch):
    """Torch's clipping is not called, but by the Trainer without us."""
    calls = []
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a, **k: calls.append(1))
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda *a, **k: calls.append(1))
    clipped = gk.Accumulator.clip_grad_norm_
    ours = []

    def clip(self, *arguments):
        ours.append(arguments)
        return clipped(self, *arguments)

    monkeypatch.setattr(gk.Accumulator, "clip_grad_norm_", clip)
    run(llama, train, None)
    assert [arguments[0] for arguments in ours] == [1.0] * 3 and calls == []


@every_form
def test_master_parameters(train, knows_trainer):
    """16-bit parameters by float32 masters, as near to float32 training as rounding lets them be."""
    seen = []

    def see(model, state):
        seen.extend({p.grad.dtype for p in model.parameters() if p.grad is not None})

    transformers = importorskip("transformers")
    model = bfloat16(llama)()
    optimizer = gk.MasterParams(model.parameters(), torch.optim.AdamW, lr=1e-2, fused=True)
    make = transformers.Trainer.create_optimizer

    def create_optimizer(self, *arguments):
        self.optimizer = optimizer
        return optimizer

    transformers.Trainer.create_optimizer = create_optimizer
    try:
        observe = [observer("on_pre_optimizer_step", see)]
        train(model, None, knows_trainer=knows_trainer, callbacks=observe)
    finally:
        transformers.Trainer.create_optimizer = make
    assert set(seen) == {torch.float32}
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert len(optimizer.state) > 0 and "master" in next(iter(optimizer.state.values()))


@every_form
@pytest.mark.parametrize("nonfinite", ["skip_window", "ignore"])
def test_a_window_that_is_not_finite(train, knows_trainer, nonfinite):
    kept = {}

    def spoil(model, state):
        if state.global_step == 1:
            kept.update({n: p.detach().clone() for n, p in model.named_parameters()})
            model.lm_head.weight.grad[0, 0] = float("nan")

    def compare(model, state):
        if state.global_step == 2:
            kept["is_same"] = all(torch.equal(p, kept[n]) for n, p in model.named_parameters())

    model = llama()
    observers = [observer("on_pre_optimizer_step", spoil), observer("on_step_end", compare)]
    importorskip("transformers")
    integration = gk.integrations.transformers.GradAccCallback
    given = {"nonfinite": nonfinite}
    before = integration.__init__

    def init(self, trainer=None, **options):
        before(self, trainer, **{**options, **given})

    integration.__init__ = init
    try:
        train(model, None, knows_trainer=knows_trainer, callbacks=observers, logging_nan_inf_filter=0)
    finally:
        integration.__init__ = before
    assert kept["is_same"] == (nonfinite == "skip_window")
    if nonfinite == "skip_window":
        assert values(model, "gradacc/skipped_windows").tolist() == [0, 1, 1]
        rates = values(model, "learning_rate")
        assert rates[2] == rates[1] != rates[0]  # the schedule has waited
        assert all(p.isfinite().all() for p in model.parameters())


@every_form
def test_saved_and_resumed(train, knows_trainer, tmp_path):
    loop = partial(train, knows_trainer=knows_trainer, max_steps=5, optim="adamw_torch")
    whole, _ = run(llama, partial(loop, save_strategy="steps", save_steps=2), None)
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "checkpoint-2/model.safetensors")
    tensors = whole.state_dict()
    assert saved.keys() == tensors.keys() - {"lm_head.weight"} or saved.keys() == tensors.keys()
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())

    resume = str(tmp_path / "checkpoint-2")
    resumed, _ = run(llama, partial(loop, resume=resume), None)
    for name, param in resumed.named_parameters():
        assert torch.equal(param, tensors[name]), name
    losses = values(whole, "loss")
    assert torch.equal(values(resumed, "loss")[-3:], losses[-3:])


def test_skipped_windows_are_counted_on_from_the_logs():
    importorskip("transformers")
    from types import SimpleNamespace

    from accelerate.optimizer import AcceleratedOptimizer

    module = gk.integrations.transformers
    accelerate = importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = torch.nn.Linear(3, 2)
    optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    assert isinstance(optimizer, AcceleratedOptimizer)
    callback = module.GradAccCallback()
    args = SimpleNamespace(distributed_state=accelerator.state._shared_state["_cpu"] and
                           SimpleNamespace(distributed_type=accelerator.distributed_type), n_gpu=0)  # fmt: skip
    state = SimpleNamespace(log_history=[{module.SKIPPED: 3}, {"eval_loss": 1.0}])
    callback.on_train_begin(args, state, None, model=model, optimizer=optimizer)
    logs = {"loss": 1.0}
    state.log_history.append(dict(logs))
    callback.on_log(args, state, None, logs=logs)
    assert logs[module.SKIPPED] == state.log_history[-1][module.SKIPPED] == 3
    first = callback.accumulator
    callback.on_train_begin(args, state, None, model=model, optimizer=optimizer)  # interrupted
    assert repr(first) == "Accumulator(detached)"
    callback.on_train_end(args, state, None)
    callback.on_train_end(args, state, None)
    assert optimizer.scaler is None


def test_training_twice(train):
    model = llama()
    train(model, None)
    train(model, None)
    assert len(model.logs) == 3


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_lora(train, knows_trainer, dtype):
    """Adapters over a frozen base: they alone are covered, summed in float32, and saved."""
    seen = []

    def see(model, state):
        seen.append({n: p.grad.dtype for n, p in model.named_parameters() if p.grad is not None})

    loop = partial(
        train, knows_trainer=knows_trainer, callbacks=[observer("on_pre_optimizer_step", see)]
    )
    if dtype == torch.float32:
        ours, theirs = check_same_training(lora, loop, "auto", ulps=40 * ULPS)
        torch.testing.assert_close(values(ours, "loss"), values(theirs, "loss"))
    else:
        check_window(
            partial(lora, dtype), partial(loop, max_steps=1, max_grad_norm=0.0), "auto", gain=1000
        )
    ours = seen[-1]
    assert len(ours) == 12 and all("lora" in name for name in ours)
    assert set(ours.values()) == {torch.float32}


def test_what_is_refused():
    importorskip("transformers")
    callback = gk.integrations.transformers.GradAccCallback
    with pytest.raises(ValueError, match="leave out scale=0.25"):
        callback(scale=0.25)
    with pytest.raises(TypeError, match="must be a transformers.Trainer, got Linear"):
        callback(torch.nn.Linear(2, 2))


def test_no_library_is_imported_before_it_is_asked_for():
    code = """
import sys
import gradacc_kernels as gk
libraries = {"transformers", "accelerate", "peft", "lightning", "pytorch_lightning"}
assert not libraries & sys.modules.keys(), libraries & sys.modules.keys()
gk.integrations.megatron
assert not libraries & sys.modules.keys(), libraries & sys.modules.keys()
try:
    gk.integrations.nothing
except AttributeError:
    print("done")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr


assert STEPS == 3  # windows of an epoch of examples()
