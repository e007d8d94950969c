"""gk.Monitor: what it writes of a window, when, and that nothing waits for it."""

import copy
import gc
import io
import json
import math
import warnings
import weakref

import pytest
import torch
from hook_cases import backward, batch, every_hook, mlp

import gradacc_kernels as gk
from gradacc_kernels import monitor as monitors
from gradacc_kernels import stats

NAN, INF = float("nan"), float("inf")
READS = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "cpu", "numpy")


class Records(list):
    """A sink."""

    closed = 0

    def write(self, record):
        self.append(record)

    def close(self):
        self.closed += 1


def train(accumulator, model, optimizer, x, *, weight=None, micro_batches=2, scaler=None):
    for _ in range(micro_batches):
        with accumulator.micro_batch(weight):
            loss = model(x).float().square().sum()
            (loss if scaler is None else scaler.scale(loss)).backward()
    accumulator.step(optimizer, max_norm=1e-2, scaler=scaler)
    if scaler is not None:
        scaler.update()
    optimizer.zero_grad()


@pytest.fixture
def reads(monkeypatch):
    """The reads of tensors by the host, by the names of the methods."""
    found = []
    for name in READS:
        method = getattr(torch.Tensor, name)

        def read(self, *args, name=name, method=method):
            found.append(name)
            return method(self, *args)

        monkeypatch.setattr(torch.Tensor, name, read)
    return found


def true_norm(model, inputs):
    """Of the mean of losses, in float64."""
    twin = copy.deepcopy(model).double()
    loss = sum(twin(x.double()).square().sum() for x in inputs) / len(inputs)
    grads = torch.autograd.grad(loss, list(twin.parameters()))
    norms = {n: g.norm().item() for (n, _), g in zip(twin.named_parameters(), grads, strict=True)}
    return math.hypot(*norms.values()), norms


@every_hook
@pytest.mark.parametrize("close", ["step", "scaler", "stock"])
def test_a_record_of_each_window(hook, close):
    device, backend = hook
    model = mlp(device, torch.float32)
    accumulator = gk.attach(model, backend=backend)
    scaler = gk.GradScaler(accumulator, init_scale=256.0) if close == "scaler" else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    records, expected = Records(), []
    with gk.Monitor(accumulator, [records], first_step=7) as monitor:
        for window in range(3):
            inputs = [batch(device, torch.float32) for _ in range(window + 1)]
            expected.append(true_norm(model, inputs))
            for x in inputs:
                with accumulator.micro_batch(4):
                    loss = model(x).square().sum()
                    (loss if scaler is None else scaler.scale(loss)).backward()
            monitor.log(loss=loss, lr=0.5, phase="first" if window == 0 else None)
            last = loss.item()
            if close == "stock":
                accumulator.average_()
                optimizer.step()
            else:
                accumulator.step(optimizer, max_norm=1e-3, scaler=scaler)
            if scaler is not None:
                scaler.update()
            optimizer.zero_grad()
    assert [record["step"] for record in records] == [7, 8, 9]
    for count, (record, (norm, norms)) in enumerate(zip(records, expected, strict=True), 1):
        assert record["norm"] == pytest.approx(norm, rel=1e-4)  # the gradients are of float32
        largest = dict(sorted(norms.items(), key=lambda item: -item[1])[:5])
        assert list(record["largest"]) == list(largest)
        assert record["largest"] == pytest.approx(largest, rel=1e-4)
        assert record["micro_batches"] == count and record["tokens"] == 4 * count
        assert record["loss_scale"] == (256 if scaler else 1)
        assert not record["found_inf"] and record["nonfinite"] == []
        assert record["skipped_windows"] == record["skipped_micro_batches"] == 0
        assert record["nbytes"] == accumulator.nbytes and record["lr"] == 0.5
        assert record["seconds"] > 0 and record["time"] > 1e9
        assert ("cuda_bytes" in record) == ("cuda_peak_bytes" in record) == (device == "cuda")
    assert records[-1]["loss"] == last and records[0]["phase"] == "first"
    assert records.closed == 1


def test_training_is_the_same_with_a_monitor():
    model = mlp(dtype=torch.float32)
    twin = copy.deepcopy(model)
    x = batch(dtype=torch.float32)
    for net, sinks in ((model, [Records()]), (twin, None)):
        accumulator = gk.attach(net)
        if sinks is not None:
            gk.Monitor(accumulator, sinks)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, fused=True)
        for _ in range(3):
            train(accumulator, net, optimizer, x, weight=3)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert ours.equal(theirs)


def test_what_overflows_is_named(tmp_path):
    model = mlp(dtype=torch.float32)
    accumulator = gk.attach(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    records = Records()
    with gk.Monitor(
        accumulator, [records, gk.JsonLines(tmp_path / "new" / "run.jsonl")]
    ) as monitor:
        x = batch(dtype=torch.float32)
        for value in (x, x * INF):
            monitor.log(loss=value.sum())
            train(accumulator, model, optimizer, value)
    assert records[1]["found_inf"] and math.isnan(records[1]["norm"])
    assert set(records[1]["nonfinite"]) >= {"0.weight", "3.weight"}
    assert set(records[1]["largest"]) <= set(records[1]["nonfinite"])
    assert [record["skipped_windows"] for record in records] == [0, 1]

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    lines = (tmp_path / "new" / "run.jsonl").read_text().splitlines()
    first, second = (json.loads(line, parse_constant=refuse) for line in lines)
    assert first == records[0]
    assert second["norm"] is None and second["loss"] is None
    assert second["nonfinite"] == records[1]["nonfinite"] and second["found_inf"] is True


def test_a_file_of_json_lines_is_appended_to(tmp_path):
    path = tmp_path / "run.jsonl"
    for step in range(2):
        sink = gk.JsonLines(str(path))
        sink.write({"step": step})
        assert len(path.read_text().splitlines()) == step + 1  # before it is closed
        sink.close()
    path.write_text('{"step": 0}\n{"st')  # of a run that was killed
    sink = gk.JsonLines(path)
    sink.write({"step": 1})
    sink.close()
    assert path.read_text().splitlines() == ['{"step": 0}', '{"st', '{"step": 1}']


# When


@pytest.mark.parametrize("weight", [None, 3])
def test_nothing_is_read_inside_of_a_window(reads, weight):
    model = mlp(dtype=torch.float32)
    accumulator = gk.attach(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    x = batch(dtype=torch.float32)
    x.sum().item()
    assert reads.pop() == "item"  # those are seen
    reads.clear()
    for sinks in ([], [Records()]):
        monitor = gk.Monitor(accumulator, sinks)
        for _ in range(2):
            for _ in range(3):
                with accumulator.micro_batch(weight):
                    loss = model(x).square().sum()
                    loss.backward()
                monitor.log(loss=loss, lr=0.1)
            assert reads == []
            accumulator.step(optimizer, max_norm=1.0)
            assert reads == (["tolist"] if sinks else [])  # as it is written, on the CPU at once
            reads.clear()
            optimizer.zero_grad()
        monitor.close()


def test_records_wait_for_their_numbers(monkeypatch):
    """As on a GPU, whose copies arrive later."""
    model = mlp(dtype=torch.float32)
    accumulator = gk.attach(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    arrived = []
    monkeypatch.setattr(stats._Copy, "is_here", lambda self: self in arrived)
    records = Records()
    monitor = gk.Monitor(accumulator, [records])
    x = batch(dtype=torch.float32)
    norms = []
    for window in range(4):
        monitor.log(window=torch.tensor(window))
        backward(model, x * (window + 1))
        norms.append(accumulator.grad_norm().item())
        accumulator.step(optimizer)
        optimizer.zero_grad()
        if window == 1:
            arrived += monitor._writer._under_way[0][0]._copies
    assert [record["window"] for record in records] == [0]
    monitor.flush()
    assert [record["window"] for record in records] == [0, 1, 2, 3]
    assert [record["norm"] for record in records] == pytest.approx(norms, rel=1e-6)
    assert records.closed == 0
    monitor.close(), monitor.close()
    assert records.closed == 1
    backward(model, x)
    accumulator.step(optimizer)
    assert len(records) == 4


def test_records_of_a_gpu_are_written_together(monkeypatch):
    model = mlp(dtype=torch.float32)
    accumulator = gk.attach(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monkeypatch.setattr(stats.Snapshot, "is_of_cpu", False)
    monkeypatch.setattr(monitors, "COPIES_EVERY", 3600.0)
    records = Records()
    with gk.Monitor(accumulator, [records]) as monitor:
        for steps, written in ((1, 1), (2, 1), (3, 1)):
            train(accumulator, model, optimizer, batch(dtype=torch.float32))
            assert len(records) == written, steps
        monkeypatch.setattr(monitors, "COPIES_EVERY", 0.0)
        monitor.flush()
        assert [record["step"] for record in records] == [1, 2, 3]
        train(accumulator, model, optimizer, batch(dtype=torch.float32))
        assert len(records) == 4


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("close", ["step", "scaler", "stock"])
def test_nothing_waits_for_a_gpu(close, monkeypatch):
    monkeypatch.setattr(monitors, "COPIES_EVERY", 0.0)
    model = mlp("cuda", torch.float32)
    accumulator = gk.attach(model)
    scaler = gk.GradScaler(accumulator) if close == "scaler" else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    records = Records()
    monitor = gk.Monitor(accumulator, [records])
    x = batch("cuda", torch.float32)

    def window():
        for _ in range(3):
            with accumulator.micro_batch(4):
                loss = model(x).square().sum()
                (loss if scaler is None else scaler.scale(loss)).backward()
        monitor.log(loss=loss)
        if close == "stock":
            accumulator.average_()
            optimizer.step()
        else:
            accumulator.step(optimizer, scaler=scaler)
        if scaler is not None:
            scaler.update()
        optimizer.zero_grad()

    window()
    monitor.flush()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(100_000_000)
        window()
        assert len(records) == 1  # the GPU has not come to it
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    window()
    assert len(records) >= 2
    monitor.close()
    assert [record["tokens"] for record in records] == [12, 12, 12]
    assert all(math.isfinite(record["loss"]) for record in records)


@pytest.mark.gpu
@needs_cuda
def test_a_close_that_is_captured_is_not_written():
    model = mlp("cuda", torch.float32)
    accumulator = gk.attach(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, capturable=True)
    x = batch("cuda", torch.float32)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        train(accumulator, model, optimizer, x)
    torch.cuda.current_stream().wait_stream(side)
    records = Records()
    with gk.Monitor(accumulator, [records]):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            train(accumulator, model, optimizer, x)
        graph.replay()
    assert records == []


# Sinks that fail, and what is no sink


class Broken(Records):
    def __init__(self, at):
        self.at = at

    def write(self, record):
        super().write(record)
        if self.at == "write":
            raise OSError("disk full")

    def close(self):
        super().close()
        if self.at == "close":
            raise OSError("disk gone")


@pytest.mark.parametrize("at", ["write", "close"])
def test_a_sink_that_fails_is_told_of_once(at):
    model = mlp(dtype=torch.float32)
    accumulator = gk.attach(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    broken, other = Broken(at), Records()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with gk.Monitor(accumulator, [broken, other]):
            for _ in range(3):
                train(accumulator, model, optimizer, batch(dtype=torch.float32))
    (warning,) = (w for w in caught if "Monitor" in str(w.message))
    assert f"Broken raised OSError: disk {'full' if at == 'write' else 'gone'}" in str(
        warning.message
    )
    assert len(broken) == (1 if at == "write" else 3) and broken.closed >= 1
    assert len(other) == 3 and other.closed == 1


def test_what_it_cannot_take():
    model = mlp()
    accumulator = gk.attach(model)
    with pytest.raises(TypeError, match="expected the Accumulator that attach returned, got Seq"):
        gk.Monitor(model, [])
    with pytest.raises(TypeError, match="expected sinks with write.*got str"):
        gk.Monitor(accumulator, ["run.jsonl"])
    assert accumulator._attachment.window.monitors == []
    monitor = gk.Monitor(accumulator, [])
    with pytest.raises(ValueError, match="every record has a 'norm'"):
        monitor.log(lr=1.0, norm=3.0)
    with pytest.raises(ValueError, match="loss must be one real number, got a torch.float32"):
        monitor.log(loss=torch.ones(2))
    with pytest.raises(TypeError, match="lr must be a number, a string or a tensor.*got list"):
        monitor.log(lr=[1.0])
    assert monitor._extras == {}
    accumulator.detach()
    with pytest.raises(RuntimeError, match="not attached"):
        gk.Monitor(accumulator, [])


# How long


@pytest.mark.parametrize("as_list", [False, True])
def test_it_ends_with_the_attachment_and_keeps_nothing_alive(as_list, monkeypatch):
    monkeypatch.setattr(stats._Copy, "is_here", lambda self: False)
    for way in ("detach", "drop"):
        model = mlp(dtype=torch.float32)
        accumulator = gk.attach(list(model.parameters()) if as_list else model)
        records = Records()
        monitor = weakref.ref(gk.Monitor(accumulator, [records]))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        train(accumulator, model, optimizer, batch(dtype=torch.float32))
        assert monitor() is not None and records == []
        if way == "detach":
            accumulator.detach()
        else:
            del model, optimizer, accumulator
            gc.collect()
        assert monitor() is None and len(records) == records.closed == 1


def test_other_ranks_write_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    model = mlp(dtype=torch.float32)
    accumulator = gk.attach(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    records = Records()
    with gk.Monitor(accumulator, [records, gk.JsonLines(tmp_path / "run.jsonl")]):
        train(accumulator, model, optimizer, batch(dtype=torch.float32))
    assert records == [] and not list(tmp_path.iterdir())


def test_optimizers_that_step_one_after_the_other_make_one_record():
    model = mlp(dtype=torch.float32)
    accumulator = gk.attach(model)
    halves = [torch.optim.SGD(model[i].parameters(), lr=0.1) for i in (0, 3)]
    records = Records()
    with gk.Monitor(accumulator, [records]):
        for _ in range(2):
            backward(model, batch(dtype=torch.float32))
            for optimizer in halves:
                accumulator.step(optimizer)
            model.zero_grad()
            backward(model, batch(dtype=torch.float32))
            for optimizer in halves:
                optimizer.step()
            model.zero_grad()
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert all(record["micro_batches"] == 1 for record in records)


# TensorBoard, and the table

RECORD = {
    **{"step": 3, "time": 1e9, "seconds": 0.5, "norm": 2.0, "found_inf": False, "nonfinite": []},
    **{"largest": {"a.weight": 1.5, "b": 1.0}, "micro_batches": 4, "tokens": None},
    **{"loss_scale": 1.0, "skipped_windows": 0, "skipped_micro_batches": 0, "nbytes": 2048},
}
BAD = RECORD | {"step": 4, "norm": NAN, "found_inf": True, "nonfinite": ["b"], "loss": 0.25}


class Writer:
    """What a SummaryWriter is asked for."""

    def __init__(self):
        self.scalars, self.texts, self.flushed = {}, [], 0

    def add_scalar(self, tag, value, step, walltime):
        self.scalars[tag, step] = value

    def add_text(self, tag, text, step, walltime):
        self.texts.append((tag, text, step))

    def flush(self):
        self.flushed += 1


def test_tensorboard_gets_scalars_and_names():
    writer = Writer()
    sink = gk.TensorBoard(writer)
    for record in (RECORD, BAD):
        sink.write(record)
    sink.close()
    assert writer.scalars["gradacc/norm", 3] == 2.0 and math.isnan(
        writer.scalars["gradacc/norm", 4]
    )
    assert writer.scalars["gradacc/largest/a.weight", 3] == 1.5
    assert writer.scalars["gradacc/loss", 4] == 0.25
    tags = {tag for tag, _ in writer.scalars}
    assert tags.isdisjoint({"gradacc/tokens", "gradacc/time", "gradacc/step"})
    assert writer.texts == [("gradacc/nonfinite", "b", 4)] and writer.flushed == 1


def test_tensorboard_writes_a_folder(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = gk.TensorBoard(tmp_path)
    assert list(tmp_path.iterdir()) == []
    for record in (RECORD, BAD):
        sink.write(record)
    sink.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("gradacc/norm")] == [3, 4]
    assert events.Scalars("gradacc/loss")[0].value == 0.25


def test_the_table_in_the_terminal():
    console = pytest.importorskip("rich.console")
    text = io.StringIO()
    sink = gk.Live(rows=2, console=console.Console(file=text, width=80, force_terminal=True))
    for record in (RECORD | {"step": 1}, RECORD, BAD):
        sink.write(record)
    sink.close()
    last = text.getvalue().rsplit("step", 1)[1]  # from its header on
    assert "inf or NaN in b" in last and "0.25" in last and "2.05 kB of main" in last
    assert "\x1b[1;31m" in last  # red
    body = [line.split() for line in last.splitlines()]
    steps = [line[0].split("m")[-1] for line in body if line and "0.5" in line]
    assert "tokens" not in last and "1" not in steps
    first = io.StringIO()
    sink = gk.Live(console=console.Console(file=first, width=80))
    sink.write(RECORD)
    sink.close()
    assert "largest norms: a.weight 1.5, b 1" in first.getvalue()
    assert first.getvalue().endswith("\n") and text.getvalue().count("\n") > 5


@pytest.mark.parametrize(
    ("sink", "module"), [("TensorBoard", "torch.utils.tensorboard"), ("Live", "rich")]
)
def test_packages_that_are_not_installed(sink, module, monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ImportError, match=f"{sink}: .* pip install {module.split('.')[-1]}"):
        getattr(gk, sink)(**({"log_dir": tmp_path} if sink == "TensorBoard" else {}))
