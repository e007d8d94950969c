"""Tests of what the benchmarks count with: shapes, ways and their check, targets, timers."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loop_cases import importorskip
from rank_cases import free_port

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import accumulate_ways  # noqa: E402
import bench_accumulate  # noqa: E402
import bench_loops  # noqa: E402
import bench_monitor  # noqa: E402
import bench_multi_tensor  # noqa: E402
import bench_ranks  # noqa: E402
import counters  # noqa: E402
import model_ranks  # noqa: E402
import render  # noqa: E402
import resnet  # noqa: E402
import shapes  # noqa: E402
import targets  # noqa: E402
import timing  # noqa: E402

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "numel", "tensors"),
    [
        ("llama-3.2-1b", 1_235_814_400, 146),
        ("llama-3-8b", 8_030_261_248, 291),
        ("gpt2", 124_439_808, 148),
        ("resnet-50", 25_557_032, 161),
        ("vit-l-16", 304_326_632, 296),
        ("400x2048", 400 * 2048, 400),
        ("10000x16", 10000 * 16, 10000),
    ],
)
def test_shapes_have_the_published_number_of_parameters(name, numel, tensors):
    assert (shapes.numel(shapes.SHAPES[name]), len(shapes.SHAPES[name])) == (numel, tensors)


def test_resnet_is_the_published_one():
    with torch.device("meta"):
        ours = sorted(tuple(param.shape) for param in resnet.ResNet().parameters())
    assert ours == sorted(shapes.SHAPES["resnet-50"])


def test_counters_are_joined_with_the_calls_that_made_them():
    header = "ID,Process ID,Kernel Name,Section Name,Metric Name,Metric Unit,Metric Value"
    lines = ["==PROF== Connected", ",".join(f'"{name}"' for name in header.split(","))]
    units = {"us": "msecond", "read_mb": "Kbyte", "written_mb": "Gbyte"}
    for kernel in (2, 10, 3, 4):
        for metric, name in counters.METRICS.items():
            value = f"{kernel},000.5"
            line = (kernel, 1, "void f<int>(int)", "", metric, units.get(name, ""), value)
            lines.append(",".join(f'"{entry}"' for entry in line))
    found = counters.rows_of(counters.parse("\n".join(lines)), [("one", 4.0, 3), ("two", 2.0, 1)])
    assert [(row["case"], row["registers"]) for row in found] == [("one", 2000.5), ("two", 10000.5)]
    assert (found[0]["us"], found[0]["read_mb"], found[0]["written_mb"]) == (
        2000500,
        2.001,
        2000500,
    )
    with pytest.raises(SystemExit, match="expected 3 kernels, ncu saw 4"):
        counters.rows_of(counters.parse("\n".join(lines)), [("one", 4.0, 3)])
    with pytest.raises(SystemExit, match="no table"):
        counters.parse("==ERROR== no permission")


def ways(is_list):
    """All ways that run on the CPU, on our eager backend, which is always there."""
    found = accumulate_ways.our_ways("reference", is_list) + accumulate_ways.peer_ways()
    if not is_list:
        found += accumulate_ways.single_tensor_ways() + accumulate_ways.fp32_ways()
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [[(3, 5)], [(1000,), (7,), (2, 600)]], ids=str)
def test_every_way_passes_its_check_twice(monkeypatch, sizes, dtype):
    monkeypatch.setitem(accumulate_ways.PIECE, "cpu", 600)  # pieces that end inside of tensors
    buffers = accumulate_ways.Buffers(sizes, dtype, CPU)
    for way in ways(len(sizes) > 1):
        for _ in range(2):
            buffers.keep(way.buffers)
            accumulate_ways.check(way, buffers)


IDEAL = model_ranks.Figures(
    elements=1000,
    layers=4,
    forward_s=1.0,
    backward_s=2.0,
    node_bandwidth=1000.0,
    network_bandwidth=100.0,
    least_s=0.0,
    latency=0.0,
    bucket_bytes=model_ranks.DDP_BUCKET,
)


def model(**figures):
    return dataclasses.replace(IDEAL, **figures)


def test_a_modelled_collective_is_the_one_computed_by_hand():
    assert model_ranks.all_reduce(IDEAL, 8, 1000) == pytest.approx(2 * 7 / 8)
    assert model_ranks.half_reduce(IDEAL, 8, 1000) == pytest.approx(7 / 8)
    # The eight NICs of a node bring 800 bytes a second.
    assert model_ranks.all_reduce(IDEAL, 16, 1000) == pytest.approx(2 * 15 / 16 / 0.8)
    assert model_ranks.all_reduce(model(network_bandwidth=1e9), 16, 1000) == pytest.approx(1.875)
    slow = model(latency=1.0, node_bandwidth=1e30, network_bandwidth=1e30)
    assert model_ranks.all_reduce(slow, 2, 1000) == pytest.approx((8.4 + 2 * 3.4) * 1e-6)
    assert model_ranks.half_reduce(slow, 16, 1000) == pytest.approx((14 + 13 * 1.9 + 8) * 1e-6)
    tree = 14 + 2 * (7 * 1.25 + 7 * 8.5)
    assert model_ranks.all_reduce(slow, 1024, 1000) == pytest.approx(tree * 1e-6)
    assert model_ranks.all_reduce(model(least_s=9.0), 2, 1) == 9


def test_what_a_model_exposes_is_what_outlasts_the_backward():
    def even(n, seconds, backward_s):
        return model_ranks.exposed([seconds] * n, [(i + 1) / n for i in range(n)], backward_s)

    for n in (1, 2, 7):
        for seconds in (0.01, 0.3, 5.0):
            closed = max(seconds, n * seconds - (2.0 - 2.0 / n))
            assert even(n, seconds, 2.0) == pytest.approx(closed)
    # 4000 bytes in buckets of 3000 and 1000, ready after 3/4 of the backward and at its end.
    cost = model_ranks.reduced(model(node_bandwidth=2000.0), 2, 4, 3000)
    assert (cost.nbytes, cost.busy_s, cost.exposed_s) == pytest.approx((4000, 2.0, 1.5))


def test_limits_of_the_model_of_ranks():
    alone = model_ranks.ways(IDEAL, 1, 16).values()
    assert {(cost.nbytes, cost.busy_s, cost.exposed_s) for cost in alone} == {(0, 0, 0)}
    for ranks in (2, 8, 64, 1024):
        for figures in (IDEAL, model_ranks.Figures()):
            costs = model_ranks.ways(figures, ranks, 16)
            for cost in costs.values():
                assert 0 < cost.exposed_s <= cost.busy_s
            best = costs["attach, float32, best buckets"].exposed_s
            assert best <= costs["attach, float32"].exposed_s
        costs = model_ranks.ways(IDEAL, ranks, 16)
        ours, each = costs["attach, float32"], costs[model_ranks.EACH]
        assert ours.nbytes == each.nbytes / 16 and ours.exposed_s == each.exposed_s / 16


def test_the_model_of_ranks_reads_what_was_measured(tmp_path, monkeypatch, capsys):
    path = tmp_path / "ranks.json"
    calls = [{"bytes": 10**9, "seconds": 0.004}, {"bytes": 8, "seconds": 2e-5}]
    found = {"world_size": 2, "all_reduce": calls, "elements": 10**9}
    found["micro_batches"] = [
        {"tokens": tokens, "forward_s": tokens * 1e-6, "backward_s": tokens * 2e-6}
        for tokens in (256, 2048)
    ]
    path.write_text(json.dumps(found))
    figures = model_ranks.measured(path, 2048)
    assert figures["node_bandwidth"] == 2.5e11 and figures["least_s"] == 2e-5
    assert (figures["backward_s"], figures["elements"]) == (2048 * 2e-6, 10**9)
    with pytest.raises(ValueError, match="got no 512"):
        model_ranks.measured(path, 512)
    monkeypatch.setattr(sys, "argv", ["model_ranks", str(path), "--network-bandwidth", "25e9"])
    model_ranks.main()
    said = capsys.readouterr().out
    assert said.startswith("A MODEL") and said.count("attach, float32, best") == 9
    for name, source in (("node_bandwidth", "measured"), ("network_bandwidth", "given")):
        assert [name, source] in [line.split()[:2] for line in said.splitlines()]
    assert ["latency", "assumed"] in [line.split()[:2] for line in said.splitlines()]


def test_a_wrong_element_and_a_wrong_norm_fail_the_check():
    buffers = accumulate_ways.Buffers([(2000,)], torch.bfloat16, CPU)
    terms = {"main": 1.0, "grad": 1.0}

    def but_one(b):
        b.main[:-1] += b.grad[:-1]

    def norm_of_half(b):
        b.main += b.grad
        return b.main[:1000].norm(), torch.zeros(())

    for run, bound, message in ((but_one, None, "rounding"), (norm_of_half, 1e-3, "norm")):
        way = accumulate_ways.Way("wrong", "torch", 10, 1, run, terms, norm_bound=bound)
        with pytest.raises(RuntimeError, match=message):
            accumulate_ways.check(way, buffers)


def test_a_warm_call_is_between_a_write_of_its_gradient_and_the_next(monkeypatch):
    monkeypatch.setattr(accumulate_ways, "COLD_BYTES", 64)
    case = accumulate_ways.Case([(4,)], torch.bfloat16, CPU)
    grads = []
    way = accumulate_ways.Way(
        "none", "torch", 0, 0, lambda b: grads.append(b.grad.clone()), {"grad": 1.0}
    )
    before = [b.grad.clone() for b in case.sets]
    case.each(way, writes=True, runs=True)
    assert len(case.sets) == accumulate_ways.MAX_SETS == len(grads)
    assert all(torch.equal(now, -then) for now, then in zip(grads, before, strict=True))
    case.each(way, writes=True, runs=False)
    assert len(grads) == len(case.sets)
    assert all(torch.equal(b.grad, then) for b, then in zip(case.sets, before, strict=True))


def test_the_time_of_the_rest_is_subtracted(monkeypatch):
    monkeypatch.setattr(timing, "capture", lambda step: step)
    times = {"whole": timing.Timing("graph", 9.0, 10.0, 12.0, 1.0)}
    times["rest"] = timing.Timing("graph", 3.0, 4.0, 5.0, 1.0)
    monkeypatch.setattr(timing, "time_replays", lambda graph, **_: times[graph])
    assert timing.time_difference("whole", "rest", calls=2) == timing.Timing(
        "graph", 5.0, 6.0, 8.0, 1.0
    )
    assert timing.time_difference("whole", None, calls=2) == times["whole"]
    with pytest.raises(RuntimeError, match="no time"):
        timing.time_difference("rest", "whole", calls=2)


def test_sizes_are_powers_of_two_and_what_is_added():
    assert bench_accumulate.sizes("10,31+8") == {"2^10": 1024, "2^31+8": 2**31 + 8}
    assert bench_accumulate.sizes("") == {}


def row(name, backend, case, p50, share, **labels):
    return {
        "name": name,
        "backend": backend,
        "case": case,
        "dtype": "bf16",
        "cache": "cold",
        "timer": "events",
        "host_us": 1.0,
        "p50_us": p50,
        "share_of_copy": share,
        "gb_per_s": 1000 * share,
        **labels,
    }


def test_targets_of_one_tensor():
    ours = "accumulate_ + grad_stats"
    rows = [
        row(ours, "cuda", "2^28", 10.0, 0.985),
        row(ours, "cuda", "2^28", 1.0, 3.0, cache="warm"),
        row(ours, "cuda", "2^30", 40.0, 1.0),
        row(ours, "cuda", "2^31+8", 80.0, 0.9),
        row("main.add_(grad)", "torch", "2^28", 14.0, 0.7),
    ]
    found = {
        t["name"]: (t["target"], t["measured"], t["met"])
        for t in map(dict, bench_accumulate.targets_of(rows))
    }
    assert found[f"{ours}, bf16: share of copy"] == (">= 0.98", 0.985, True)
    assert found[f"{ours}, fp16: share of copy"] == (">= 0.98", None, None)
    assert found[f"main.add_(grad) / {ours}: time"] == (">= 1.45", 1.4, False)
    assert found[f"{ours}, 2^31+8: bandwidth / that of 2^30"] == (">= 0.97", 0.9, False)


def test_targets_of_lists_take_the_graph_and_not_the_wall():
    ours = "multi_accumulate_ + grad_stats"
    rows = [
        row(ours, "cuda", "400x2048", 20.0, 0.1),
        row(ours, "cuda", "400x2048", 10.0, 0.2, timer="graph"),
        row("main.add_(grad)", "torch", "400x2048", 9000.0, 0.0, timer="wall"),
        row("main.add_(grad)", "torch", "400x2048", 1250.0, 0.0, timer="graph"),
        row(ours, "triton", "llama-3.2-1b", 3000.0, 0.91),
    ]
    found = {t["name"]: (t["measured"], t["met"]) for t in bench_multi_tensor.targets_of(rows)}
    assert found["400x2048: us"] == (10.0, True)
    assert found["400x2048: time / that of a loop of add_"] == (0.008, True)
    assert found["llama-3.2-1b, triton: share of copy"] == (0.91, True)
    assert "NO" in targets.table([targets.target("x", 2.0, 1.0, at_most=True)])


@pytest.fixture
def results(monkeypatch, tmp_path):
    """A results file of one tensor on a GPU, cold and warm, in place of those of the repository."""
    environment = {
        **dict.fromkeys(["torch", "cuda", "triton", "gradacc_kernels", "commit"], "1"),
        "device": "a GPU",
        "driver": "1",
        "backend": "cuda",
        "dirty": False,
    }
    ways = [("accumulate_ + grad_stats", "cuda"), ("accumulate_ (add)", "cuda")]
    ways += [("accumulate_ + grad_stats", "triton"), ("_foreach_add_", "torch")]
    rows = [
        row(
            name,
            backend,
            f"2^{log2}",
            2.0**log2 / 1e5 * (1 if cache == "cold" else 0.5),
            0.9,
            n=2**log2,
            bytes=10 * 2**log2,
            flops=4 * 2**log2,
            tensors=1,
            cache=cache,
            headline="stats" in name,
        )
        for log2 in (24, 28, 30)
        for cache in ("cold", "warm")
        for name, backend in ways
    ]
    found = {"environment": environment, "copy_gb_per_s": 3000.0, "rows": rows}
    found["targets"] = bench_accumulate.targets_of(rows)
    (tmp_path / "accumulate_x.json").write_text(json.dumps(found))
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    monkeypatch.setattr(render, "ROOT", tmp_path)
    return found


def test_warm_rows_are_a_column_of_the_full_table_and_left_out_of_the_compact_one(results):
    full = render.accumulate_block("x", "full")
    assert full.count("**accumulate\\_ + grad\\_stats, cuda** | **2.68 ms**") == 1
    assert "| **1.34 ms** |" in full and "warm gradient" in full
    compact = render.accumulate_block("x")
    assert "2^28" in compact and "2^30" not in compact and ", triton |" not in compact
    assert "warm" not in compact
    assert "not measured" in render.targets_block("accumulate", "x")


def test_pictures_of_sizes_and_of_the_roof(results):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    sizes, roof = render.sizes_data(), render.roofline_data()
    cold = dict((label, points) for label, _, points in sizes["panels"][0][1])
    assert cold["accumulate_ (add), cuda"][1] == [2**28, pytest.approx(1000.0)]
    names = [point[0] for point in roof["points"]]
    assert len(names) == 4 and "torch._foreach_add_" in names
    for figure in (render.draw_sizes(sizes), render.draw_roofline(roof)):
        pyplot.close(figure)
    results["rows"] = [{k: v for k, v in r.items() if k != "cache"} for r in results["rows"]]
    (render.RESULTS / "accumulate_x.json").write_text(json.dumps(results))
    assert render.sizes_data() is None and render.roofline_data() is None


BENCH_RANKS = Path(render.__file__).with_name("bench_ranks.py")

# DDP's forward runs out of memory on one rank, and on that alone.
SHORT_OF_MEMORY = """
import os, bench_ranks, rank_ways, torch

def loss(self, index):
    if os.environ["RANK"] == "1":
        raise torch.OutOfMemoryError("none is left")
    return rank_ways.Loop.loss(self, index)

rank_ways.Ddp.loss = loss
rank_ways.WAYS = rank_ways.WAYS[:3]
bench_ranks.main()
"""


def run_ranks(folder, *command):
    """Runs a command as two ranks over gloo; returns their exit codes, outputs and results."""
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(BENCH_RANKS.parents[1]), str(BENCH_RANKS.parent)]),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
    }
    path = folder / "ranks_x.json"
    command = [sys.executable, *map(str, command), "--quick", "--json", str(path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [
        subprocess.Popen(command, env=env | {"RANK": str(r), "LOCAL_RANK": str(r)}, **pipes)
        for r in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert path.exists(), outputs
    return [process.returncode for process in processes], outputs, json.loads(path.read_text())


def test_two_ranks_measure_all_ways(monkeypatch, tmp_path):
    codes, outputs, results = run_ranks(tmp_path, BENCH_RANKS)
    assert codes == [0, 0], outputs
    assert results["failures"] == results["skipped"] == []
    rows = results["rows"]
    assert {r["role"] for r in rows} == {"ours", "ddp", "fsdp2", "option"}
    assert {r["section"] for r in rows} == {"ways", "options", "buckets", "blocks"}
    for r in rows:
        rate = 2 * r["micro_batches"] * r["tokens"] / r["p50_us"] * 1e6
        assert r["tokens_per_s"] == pytest.approx(rate, rel=1e-3)
        is_ours = r["role"] == "ours" and r["family"] != "fsdp2" and r["micro_batches"] == 1
        assert ("forward_s" in r and r["reduction_us"] > 0) or not is_ours
    assert all(r["seconds"] > 0 for r in results["all_reduce"])
    assert "window ms" in outputs[0] and "window ms" not in outputs[1]
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    parts = ((), ("buckets",), ("blocks",), ("costs",), ("model",))
    windows, buckets, blocks, costs, model = (render.ranks_block("x", *part) for part in parts)
    assert "| **attach, autocast** | **" in windows and "attach / FSDP2's best, autocast" in windows
    assert r"| all\_reduce | 4 KiB |" in buckets and r"| all\_reduce, no embedding |" in blocks
    assert "T=16, autocast" in costs
    assert model.count("ranks, modelled") == 3
    assert render.ranks_block("y") == "Not measured yet.\n"
    with pytest.raises(render.RenderError, match="buckets, blocks, costs or model"):
        render.ranks_block("x", "full")


def test_a_way_that_fails_on_one_rank_is_left_out_on_all(tmp_path):
    codes, outputs, results = run_ranks(
        tmp_path, "-c", SHORT_OF_MEMORY, "--sections", "ways", "--seconds", "600"
    )
    assert codes == [1, 1], outputs
    assert {r["name"] for r in results["rows"]} == {"attach", "FSDP2"}
    assert results["failures"] == ["ways, T=16, bf16, DDP: RuntimeError: failed on another rank"]
    assert "OutOfMemoryError: none is left" in outputs[1]


def test_targets_of_ranks_are_set_against_the_faster_peer():
    labels = {"section": "ways", "tokens": 4096, "micro_batches": 1}
    rows = [
        {**labels, "role": role, "family": family, "tokens_per_s": rate, "exposed_share": 0.2}
        for role, family, rate in [
            ("ours", "bf16", 300.0),
            ("ddp", "bf16", 200.0),
            ("fsdp2", "fsdp2", 100.0),
            ("fsdp2", "fsdp2", 400.0),
        ]
    ]
    rows.append({**rows[0], "section": "options", "tokens_per_s": 900.0})
    found = [(t["measured"], t["met"]) for t in bench_ranks.targets_of(rows)]
    unmeasured = 3 * [(None, None)]  # ours of the other families, over their peers
    assert found == [(1.5, True), (0.75, False), *unmeasured, (0.2, False)]


def test_what_it_costs_to_look(monkeypatch, tmp_path, capsys):
    path = tmp_path / "monitor_x.json"
    options = ["--device", "cpu", "--seconds", "0", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["bench_monitor", *options])
    bench_monitor.main()
    rows = json.loads(path.read_text())["rows"]
    ways = ["nothing", "Monitor", "NoiseScale"]
    assert [(r["way"], r["micro_batches"]) for r in rows] == [(w, k) for k in (1, 8) for w in ways]
    assert all(r["window_s"] > 0 for r in rows)
    for r in rows:
        assert 0 <= r["host_s"] < r["window_s"] and (r["host_s"] > 0) == (r["way"] != "nothing")
    assert "Monitor, of a micro-batch, K=8" in capsys.readouterr().out
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    assert f"| {rows[-1]['of_micro_batch']:.2%} |" in render.monitor_block("x")


def test_loops_of_libraries_begin_alike(monkeypatch, tmp_path):
    for library in bench_loops.LOOPS:
        importorskip(library)
    path = tmp_path / "loops_x.json"
    monkeypatch.setattr(sys, "argv", ["bench_loops", "--device", "cpu", "--json", str(path)])
    bench_loops.main()
    found = json.loads(path.read_text())
    rows = {(r["library"], r["way"]): r for r in found["rows"]}
    assert found["failures"] == [] and len(rows) == 6
    for r in found["rows"]:
        assert 2 * r["window_s"] == pytest.approx(sum(r["windows_s"])) and len(r["windows_s"]) == 2
    for library in bench_loops.LOOPS:
        alone, integrated = rows[library, "alone"], rows[library, "integration"]
        assert alone["first_loss"] == integrated["first_loss"]
        assert alone["last_loss"] == pytest.approx(integrated["last_loss"], rel=1e-4)
        assert alone["window_s"] > 0 < integrated["window_s"]
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    ratio = alone["window_s"] / integrated["window_s"]
    assert f"**{ratio:.3f}**" in render.loops_block("x")
