"""Lightning's Trainer with GradAccCallback."""

import functools
import json
from functools import partial

import pytest
import torch
from loop_cases import STEPS, ULPS, K, check_same_training, check_window, importorskip, run, stock
from test_real_loops_lightning import BATCH, adamw, calls_itself, calls_layers, classes, sgd
from torch.nn import functional as F

import gradacc_kernels as gk


@functools.cache
def manual():
    """A module with manual optimization."""
    calls, _, _ = classes()

    class Manual(calls):
        def __init__(self):
            super().__init__(sgd)
            self.automatic_optimization = False
            self.dtypes = set()

        def training_step(self, batch, index):
            optimizer = self.optimizers()
            loss = super().training_step(batch, index)
            self.manual_backward(loss / K)
            self.dtypes.update(p.grad.dtype for p in self.parameters())
            if (index + 1) % K == 0:
                optimizer.step()
                optimizer.zero_grad()

    return Manual


class Resumable(torch.utils.data.DataLoader):
    """A loader that Lightning can resume, as it has batches of a fixed order."""

    done = 0

    def __iter__(self):
        batches = list(super().__iter__())
        for batch in batches[self.done :]:
            self.done += 1
            yield batch
        self.done = 0

    def state_dict(self):
        return {"done": self.done}

    def load_state_dict(self, state):
        self.done = state["done"]


def train(
    model,
    attach=None,
    *,
    precision="32-true",
    clip=1.0,
    algorithm=None,
    steps=STEPS,
    accumulates=K,
    callbacks=(),
    afterwards=(),
    plugins=(),
    resume=None,
    **options,
):
    lightning = importorskip("lightning.pytorch")
    x = torch.randn(K * BATCH * STEPS, 16, generator=torch.Generator().manual_seed(7))
    data = torch.utils.data.TensorDataset(x, (x.sum(1) > 0).long() + 2)
    callbacks = list(callbacks)
    if attach is not stock:
        options = getattr(attach, "keywords", options)
        model.callback = gk.integrations.lightning.GradAccCallback(**options)
        callbacks.append(model.callback)
    callbacks += afterwards
    trainer = lightning.Trainer(
        accelerator="cpu",
        precision=None if plugins else precision,
        plugins=list(plugins) or None,
        accumulate_grad_batches=accumulates,
        gradient_clip_val=clip,
        gradient_clip_algorithm=algorithm,
        max_steps=steps,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, Resumable(data, BATCH), ckpt_path=resume)
    return trainer


def observer(event, see):
    """A callback of Lightning's that calls a function with the trainer and the module."""
    lightning = importorskip("lightning.pytorch")

    class Observer(lightning.Callback):
        pass

    def call(self, trainer, module, *arguments):
        see(trainer, module)

    setattr(Observer, event, call)
    return Observer()


@pytest.mark.parametrize("make", [calls_layers, calls_itself])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("clips", [False, True], ids=["adamw", "clipped-sgd"])
def test_same_training(make, precision, clips):
    """The norm from the statistics is rounded in another order, and so is what it clips."""
    losses = {}

    def loop(model, attach):
        seen = losses.setdefault(attach is stock, [])

        def keep(module, arguments, output):
            seen.append(F.cross_entropy(output.float(), torch.full((len(output),), 2)).item())

        handle = model.layers.register_forward_hook(keep)
        train(model, attach, precision=precision, clip=0.01 if clips else None)
        handle.remove()

    ours, _ = check_same_training(
        partial(make, sgd if clips else adamw), loop, "auto", ulps=ULPS if clips else 0
    )
    assert len(losses[True]) == K * STEPS
    rtol = 1e-5 if precision == "32-true" else 2**-7  # a layer's output is rounded to 8 bits
    torch.testing.assert_close(
        torch.tensor(losses[False]), torch.tensor(losses[True]), rtol=rtol, atol=0
    )
    assert repr(ours.callback.accumulator) == "Accumulator(detached)"


@pytest.mark.parametrize("fuse", ["auto", True], ids=["default", "fused"])
def test_window_of_a_module_that_lightning_casts(fuse):
    loop = partial(train, precision="bf16-true", clip=None, steps=1)
    check_window(partial(calls_layers, sgd), loop, fuse, gain=1000)


@pytest.mark.parametrize("clip", [None, 0.01])
def test_clipping_and_logs(clip, monkeypatch):
    calls, rows = [], []
    clipping = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a: calls.append(clipping(*a)))

    def see(trainer, module):
        if (trainer.fit_loop.batch_idx + 1) % K == 0:
            rows.append({k: v.item() for k, v in trainer.callback_metrics.items()})

    observers = [observer("on_train_batch_end", see)]
    run(partial(calls_layers, sgd), partial(train, clip=clip, callbacks=observers), None)
    assert calls == [] and len(rows) == STEPS
    ours = [row["gradacc/grad_norm"] for row in rows]
    assert [row["gradacc/micro_batches"] for row in rows] == [K] * STEPS
    norms = []

    def measure(trainer, module):
        norms.append(torch.stack([p.grad.norm() for p in module.parameters()]).norm().item())

    observers = [observer("on_before_optimizer_step", measure)]
    run(partial(calls_layers, sgd), partial(train, clip=clip, callbacks=observers), stock)
    torch.testing.assert_close(ours, norms, rtol=1e-5, atol=0)
    assert len(calls) == (STEPS if clip else 0)


def test_clipping_by_value_is_that_of_lightning():
    loop = partial(train, clip=1e-3, algorithm="value")
    check_same_training(partial(calls_layers, sgd), loop, "auto")


def test_without_logs():
    def see(trainer, module):
        assert not trainer.callback_metrics

    observers = [observer("on_train_batch_end", see)]
    train(calls_layers(), log=False, callbacks=observers)


@pytest.mark.parametrize("overflows", [False, True], ids=["finite", "overflow"])
def test_loss_scale(overflows):
    """``16-mixed``: a scaler of ours takes over and gives back."""
    importorskip("lightning.pytorch")
    from lightning.pytorch.plugins.precision import MixedPrecision

    states = []

    def loop(model, attach):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6, growth_interval=2)
        plugin = MixedPrecision("16-mixed", "cpu", scaler)

        def spoil(trainer, module):
            if overflows and trainer.fit_loop.batch_idx == K:
                next(module.parameters()).grad.data.fill_(float("inf"))
                if attach is not stock:
                    module.callback.accumulator.invalidate()

        train(model, attach, plugins=[plugin], callbacks=[observer("on_after_backward", spoil)])
        assert plugin.scaler is scaler
        states.append(scaler.state_dict())

    ours, theirs = check_same_training(partial(calls_layers, sgd), loop, "auto", ulps=ULPS)
    assert states[0] == states[1]
    assert states[0]["scale"] == (2.0**5 if overflows else 2.0**7)


def test_windows_are_recorded(tmp_path):
    path = tmp_path / "run.jsonl"
    lightning = importorskip("lightning.pytorch")

    class Record(lightning.Callback):
        def on_train_start(self, trainer, module):
            ours = [c for c in trainer.callbacks if hasattr(c, "accumulator")]
            gk.Monitor(ours[0].accumulator, [gk.JsonLines(path)])

    trainer = train(calls_layers(), callbacks=[], afterwards=[Record()])
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, trainer.global_step + 1))
    assert all(record["micro_batches"] == K and record["norm"] > 0 for record in records)


def test_manual_optimization_is_left_alone():
    loop = partial(train, clip=None, accumulates=1, precision="bf16-true")
    theirs, _ = run(manual(), loop, stock)
    ours, _ = run(manual(), loop, None)
    assert ours.callback.accumulator is None and ours.dtypes == {torch.bfloat16}
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))


def without_dropout():
    model = calls_layers(sgd)
    model.layers[3].p = 0.0
    return model


@pytest.mark.parametrize("at", [K, K + 2], ids=["between-windows", "in-a-window"])
def test_checkpoints(at, tmp_path):
    path = tmp_path / "last.ckpt"

    def save(trainer, module):
        if trainer.fit_loop.batch_idx + 1 == at:
            trainer.save_checkpoint(path)

    observers = [observer("on_train_batch_end", save)]
    whole, _ = run(without_dropout, partial(train, callbacks=observers), None)
    saved = torch.load(path, weights_only=True)
    assert not any("gradacc" in name for name in saved["state_dict"])
    states = [state for state in saved["callbacks"].values() if "window" in state]
    assert len(states) == (at % K > 0)
    resumed, _ = run(without_dropout, partial(train, resume=path), None)
    assert all(map(torch.equal, resumed.parameters(), whole.parameters()))
    for state in states:  # as without us: the window is lost
        state.clear()
        torch.save(saved, path)
        resumed, _ = run(without_dropout, partial(train, resume=path), None)
        assert not all(map(torch.equal, resumed.parameters(), whole.parameters()))


def test_an_exception_detaches():
    def fail(trainer, module):
        raise KeyError("stop")

    model = calls_layers()
    with pytest.raises(KeyError, match="stop"):
        train(model, callbacks=[observer("on_train_batch_end", fail)])
    assert repr(model.callback.accumulator) == "Accumulator(detached)"


def test_a_scale_is_refused():
    importorskip("lightning.pytorch")
    with pytest.raises(ValueError, match="leave out scale=0.25"):
        gk.integrations.lightning.GradAccCallback(scale=0.25)
