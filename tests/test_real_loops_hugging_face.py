"""The Trainer of transformers, accelerate's loop and LoRA adapters of PEFT, with one line more."""

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
    importorskip,
    run,
)

import gradacc_kernels as gk

VOCABULARY, CONTEXT, BATCH = 48, 12, 2


def gpt2():
    transformers = importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=2
    )
    return transformers.GPT2LMHeadModel(config)


def llama():
    transformers = importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config)


every_model = pytest.mark.parametrize("make", [gpt2, llama])


def bfloat16(make):
    return lambda: make().bfloat16()


def examples(count=K * BATCH * STEPS):
    ids = torch.randint(VOCABULARY, (count, CONTEXT), generator=torch.Generator().manual_seed(7))
    return [{"input_ids": row, "labels": row} for row in ids]


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps its settings for the whole process."""
    state = importorskip("accelerate").state
    yield
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()


@pytest.fixture
def trainer_loop(tmp_path):
    transformers = importorskip("transformers")

    def train(model, attach, **options):
        settings = {"optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": STEPS, **options}
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=K,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            **settings,
        )
        attach(model)
        transformers.Trainer(model, arguments, train_dataset=examples()).train()

    return train


def accelerate_loop(model, attach, *, precision="no", optimizer="adamw", clip=1.0, steps=STEPS):
    accelerate = importorskip("accelerate")
    accelerator = accelerate.Accelerator(
        cpu=True, mixed_precision=precision, gradient_accumulation_steps=K
    )
    if optimizer == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    loader = torch.utils.data.DataLoader(examples()[: K * BATCH * steps], BATCH, shuffle=True)
    attach(model)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


trainer_sgd = {"optim": "sgd", "learning_rate": 0.1}
trainer_window = {**trainer_sgd, "max_steps": 1, "max_grad_norm": 0.0}
# Clipping to more than the norm multiplies by one.
accelerate_window = partial(accelerate_loop, optimizer="sgd", steps=1, clip=1e9)


@every_model
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "autocast"])
def test_trainer_same_training(make, bf16, trainer_loop):
    check_same_training(make, partial(trainer_loop, bf16=bf16), "auto")


@every_model
def test_trainer_same_training_fused(make, trainer_loop):
    check_same_training(make, partial(trainer_loop, **trainer_sgd), True, ulps=ULPS)


def test_trainer_follows_float32(trainer_loop):
    check_follows_float32(llama, trainer_loop, partial(trainer_loop, bf16=True))


@every_model
@every_fuse
def test_trainer_window_of_16_bit_parameters(make, fuse, trainer_loop):
    check_window(bfloat16(make), partial(trainer_loop, **trainer_window), fuse, gain=1000)


@every_model
def test_trainer_window_under_autocast(make, trainer_loop):
    check_window(make, partial(trainer_loop, bf16=True, **trainer_window), True, gain=1000)


@every_model
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_same_training(make, precision):
    check_same_training(make, partial(accelerate_loop, precision=precision), "auto")


@every_model
def test_accelerate_same_training_fused(make):
    check_same_training(make, partial(accelerate_loop, optimizer="sgd"), True, ulps=ULPS)


@every_model
@every_fuse
def test_accelerate_window_of_16_bit_parameters(make, fuse):
    check_window(bfloat16(make), accelerate_window, fuse, gain=1000)


@every_model
def test_accelerate_window_under_autocast(make):
    check_window(make, partial(accelerate_window, precision="bf16"), True, gain=1000)


def lora(dtype=torch.float32):
    """Llama with adapters behind a frozen base, all of one dtype."""
    peft = importorskip("peft")
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.1
    )
    model = peft.get_peft_model(llama().to(dtype), config, autocast_adapter_dtype=False)
    with torch.no_grad():  # zeros at first, behind which the other half gets no gradient
        for name, param in model.named_parameters():
            if "lora_B" in name:
                param.normal_(std=0.05)
    return model


def lora_loop(model, attach, *, optimizer="adamw", steps=STEPS):
    trained = [p for p in model.parameters() if p.requires_grad]
    if optimizer == "adamw":
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
    else:
        optimizer = torch.optim.SGD(trained, lr=0.1)
    loader = torch.utils.data.DataLoader(examples()[: K * BATCH * steps], BATCH, shuffle=True)
    attach(model)
    model.train()
    for step, batch in enumerate(loader):
        (model(**batch).loss / K).backward()
        if (step + 1) % K == 0:
            optimizer.step()
            optimizer.zero_grad()


def test_lora_same_training():
    ours, theirs = check_same_training(lora, lora_loop, "auto")
    assert sum(p.requires_grad for p in ours.parameters()) == 12
    for model in (ours, theirs):
        assert all(p.grad is None for p in model.parameters())


def test_lora_same_training_fused():
    check_same_training(lora, partial(lora_loop, optimizer="sgd"), True, ulps=ULPS)


@every_fuse
def test_lora_window(fuse):
    one_window = partial(lora_loop, optimizer="sgd", steps=1)
    check_window(partial(lora, torch.bfloat16), one_window, fuse, gain=1000)


@every_fuse
@pytest.mark.parametrize("end", ["merge_and_unload", "unload"])
def test_lora_merged_after_detach(fuse, end):
    """The base model is left with no trace of us, and with the merged weights."""
    accumulators = []
    trained, before = run(
        lora, lora_loop, lambda model: accumulators.append(gk.attach(model, fuse=fuse))
    )
    ids = examples(2)[0]["input_ids"][None]
    trained.eval()
    with torch.no_grad():
        adapted = trained(input_ids=ids).logits
    accumulators[0].detach()
    model = getattr(trained, end)()
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any("lora" in name for name, _ in model.named_parameters())
    base = {
        name.replace("base_model.model.", "").replace("base_layer.", ""): tensor
        for name, tensor in before.items()
        if "lora" not in name
    }
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, base[name])]
    if end == "unload":
        assert changed == [] and not torch.allclose(logits, adapted, rtol=1e-5, atol=1e-5)
    else:
        assert len(changed) == 6
        torch.testing.assert_close(logits, adapted, rtol=1e-5, atol=1e-5)

    # It trains as stock does.
    model.requires_grad_(True)
    model(input_ids=ids, labels=ids).loss.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    for grad, want in zip(grads, torch.autograd.grad(loss, list(model.parameters())), strict=True):
        assert torch.equal(grad, want)
