"""The Trainer of transformers with GradAccCallback, and LoRA adapters of PEFT by it."""

import json
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
    ignored = torch.randint(CONTEXT - 2, (len(ids), 1), generator=generator)
    labels = ids.where(torch.arange(CONTEXT) >= ignored, -100)
    return [{"input_ids": i, "labels": row} for i, row in zip(ids, labels, strict=True)]


@pytest.fixture
def train(tmp_path):
    """Trains with a callback where ``attach`` is not stock, and returns the Trainer."""
    transformers = importorskip("transformers")

    def train(
        model,
        attach=None,
        *,
        knows_trainer=True,
        callbacks=(),
        afterwards=(),
        optimizer=None,
        attached_with=None,
        resume=None,
        **options,
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
            model,
            arguments,
            train_dataset=examples(),
            callbacks=list(callbacks),
            optimizers=(optimizer, None),
        )
        if attach is not stock:
            given = attached_with or getattr(attach, "keywords", {})
            make = gk.integrations.transformers.GradAccCallback
            callback = make(trainer if knows_trainer else None, **given)
            trainer.add_callback(callback)
            model.callback = callback
        for later in afterwards:
            trainer.add_callback(later)
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
@pytest.mark.parametrize("clips", [False, True], ids=["adamw", "clipped-sgd"])
def test_same_training(train, knows_trainer, bf16, clips):
    """The norm from the statistics is rounded in another order, and so is what it clips.

    Adam divides by what it has rounded: with it nothing is clipped, and the bits are equal.
    """
    adamw = {"optim": "adamw_torch_fused", "max_grad_norm": 1e9}
    loop = partial(train, knows_trainer=knows_trainer, bf16=bf16, **({} if clips else adamw))
    ours, theirs = check_same_training(
        llama, loop, "auto", ulps=ULPS if clips and knows_trainer else 0
    )
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


@every_form
def test_clipping_takes_the_statistics(train, knows_trainer, monkeypatch):
    """Torch's clipping, which accelerate calls, is not called where we have the trainer."""
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def watched(*arguments, **options):
        calls.append(1)
        return clip(*arguments, **options)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watched)
    run(llama, partial(train, knows_trainer=knows_trainer), None)
    assert len(calls) == (0 if knows_trainer else STEPS)


@every_form
def test_master_parameters(train, knows_trainer):
    seen = set()

    def see(model, state):
        seen.update(p.grad.dtype for p in model.parameters())

    model = bfloat16(llama)()
    optimizer = gk.MasterParams(model.parameters(), torch.optim.AdamW, lr=1e-2, fused=True)
    observers = [observer("on_pre_optimizer_step", see)]
    train(model, knows_trainer=knows_trainer, callbacks=observers, optimizer=optimizer)
    assert seen == {torch.float32}
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert all("master" in state for state in optimizer.state.values())
    assert values(model, "gradacc/micro_batches").tolist() == [K, K, 1]


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
    train(
        model,
        knows_trainer=knows_trainer,
        callbacks=observers,
        attached_with={"nonfinite": nonfinite},
    )
    assert kept["is_same"] == (nonfinite == "skip_window")
    if nonfinite == "skip_window":
        assert values(model, "gradacc/skipped_windows").tolist() == [0, 1, 1]
        rates = values(model, "learning_rate")
        assert rates[2] == rates[1] != rates[0]  # the schedule has waited
        assert all(p.isfinite().all() for p in model.parameters())


@every_form
def test_windows_are_recorded(train, knows_trainer, tmp_path):
    path = tmp_path / "run.jsonl"

    def record(model, state):
        gk.Monitor(model.callback.accumulator, [gk.JsonLines(path)])

    def spoil(model, state):
        if state.global_step == 1:
            model.lm_head.weight.grad[0, 0] = float("nan")

    train(
        llama(),
        knows_trainer=knows_trainer,
        callbacks=[observer("on_pre_optimizer_step", spoil)],
        afterwards=[observer("on_train_begin", record)],
    )
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["micro_batches"] for record in records] == [K, K, 1]
    assert [record["nonfinite"] for record in records] == [[], ["lm_head.weight"], []]


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


def test_a_training_that_was_interrupted(tmp_path):
    """The next one closes it; skipped windows are counted on from the logs."""
    transformers = importorskip("transformers")
    integration = gk.integrations.transformers
    args = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    accelerator = importorskip("accelerate").Accelerator(cpu=True)
    model = torch.nn.Linear(3, 2)
    optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    state = transformers.TrainerState(log_history=[{integration.SKIPPED: 3}, {"eval_loss": 1.0}])
    callback = integration.GradAccCallback()
    callback.on_train_begin(args, state, None, model=model, optimizer=optimizer)
    first = callback.accumulator
    callback.on_train_begin(args, state, None, model=model, optimizer=optimizer)
    assert repr(first) == "Accumulator(detached)" != repr(callback.accumulator)
    logs = {"loss": 1.0}
    state.log_history.append(dict(logs))
    callback.on_log(args, state, None, logs=logs)
    assert logs[integration.SKIPPED] == state.log_history[-1][integration.SKIPPED] == 3
    for _ in range(2):
        callback.on_train_end(args, state, None)
        assert repr(callback.accumulator) == "Accumulator(detached)" and optimizer.scaler is None


def test_training_twice(train):
    model = llama()
    train(model)
    train(model)
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
        ours, theirs = check_same_training(lora, loop, "auto", ulps=ULPS)
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
