"""Forks in the middle of a window, interpreters that end there, and an all_reduce before its close.

Each runs in a process.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FORK = """
import copy, multiprocessing, os, sys, traceback
import torch
import gradacc_kernels as gk
from hook_cases import backward, batch, float32_sums, micro_gradients, mlp

torch.set_num_threads(1)  # the threads of OpenMP do not outlive a fork
torch.manual_seed(0)

class Case:
    def __init__(self, backend, fuse):
        dtype = torch.float32 if fuse else torch.bfloat16
        self.model, self.fuse = mlp(dtype=dtype), fuse
        self.stock = copy.deepcopy(self.model)
        self.inputs = [batch(dtype=dtype) for _ in range(4)]
        gk.attach(self.model, backend=backend, fuse=fuse)

    def check(self, inputs):
        sums = float32_sums(micro_gradients(self.stock, inputs))
        for param, expected in zip(self.model.parameters(), sums, strict=True):
            assert param.grad.data_ptr() == param.main_grad.data_ptr()
            if self.fuse:
                torch.testing.assert_close(param.grad, expected, rtol=1e-4, atol=1e-5)
            else:
                assert param.grad.equal(expected)

    def go_on(self):
        backward(self.model, self.inputs[1])
        self.check(self.inputs[:2])  # with the sums of the parent
        torch.optim.SGD(self.model.parameters(), lr=0.1).step()
        self.model.zero_grad()
        self.stock.load_state_dict(self.model.state_dict())
        for x in self.inputs[2:]:
            backward(self.model, x)
        self.check(self.inputs[2:])

def child():
    try:
        for case in cases:
            case.go_on()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(3)

for way in ("os.fork", "multiprocessing"):
    cases = [Case(backend, fuse) for backend in ("auto", "reference") for fuse in (False, True)]
    for case in cases:
        backward(case.model, case.inputs[0])
    if way == "os.fork":
        process = os.fork()
        if process == 0:
            child()
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    else:
        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join()
        code = process.exitcode
    assert code == 0, (way, code)
    for case in cases:
        case.check(case.inputs[:1])  # the child wrote to memory of its own
        backward(case.model, case.inputs[3])
        case.check([case.inputs[0], case.inputs[3]])
"""

EXIT = """
import sys
import torch
import gradacc_kernels as gk
from fused_cases import language_model, tokens
from hook_cases import backward, batch, mlp

kept = []
for backend in ("auto", "reference"):
    for kind in ("module", "list", "cycle", "fused"):
        if kind == "fused":
            model, x = language_model("cpu", torch.bfloat16), tokens("cpu")
        else:
            model, x = mlp(), batch()
        target = list(model.parameters()) if kind == "list" else model
        accumulator = gk.attach(target, backend=backend, fuse=kind == "fused")
        backward(model, x)
        assert next(model.parameters()).grad.dtype == torch.float32
        kept += [model, accumulator, model(x).float().sum()]  # and a graph that is never run
        if kind == "cycle":
            model.__dict__["cycle"] = kept
if sys.argv[1] == "inside of backward":
    hidden = kept[0][0](batch())
    hidden.register_hook(lambda grad: sys.exit(0))
    backward(kept[0][1:], hidden)
    raise AssertionError("unreachable")
"""

ALL_REDUCE = """
import os, sys
import torch
import torch.distributed as dist
import gradacc_kernels as gk
from hook_cases import backward, batch, mlp

torch.set_num_threads(1)  # the threads of OpenMP do not outlive a fork
child = os.fork()
rank = int(child == 0)
dist.init_process_group("gloo", f"file://{sys.argv[1]}", rank=rank, world_size=2)

def norm(grads):
    return torch.cat([grad.double().flatten() for grad in grads]).norm().item()

for backend in ("cpu", "reference"):
    for is_told in (False, True):
        torch.manual_seed(0)
        model = mlp(dtype=torch.float32)
        accumulator = gk.attach(model, backend=backend)
        torch.manual_seed(rank)
        backward(model, batch(dtype=torch.float32))
        own = norm(p.grad for p in model.parameters())
        for param in model.parameters():
            dist.all_reduce(param.grad)
            param.grad.data.div_(2)
        average = norm(p.grad for p in model.parameters())
        norms = [torch.zeros(2, dtype=torch.float64) for _ in range(2)]
        dist.all_gather(norms, torch.tensor([own, average], dtype=torch.float64))
        assert norms[0][0] != norms[1][0] and norms[0][1] == norms[1][1]
        if is_told:
            accumulator.invalidate()
        believed = average if is_told else own
        assert abs(own - average) > 0.01 * average
        clipped = accumulator.clip_grad_norm_(average / 10).item()
        assert abs(clipped - believed) <= 1e-5 * believed, (backend, is_told)
        expected = average / 10 * (average / believed)
        now = norm(p.grad for p in model.parameters())
        assert abs(now - expected) <= 1e-4 * expected, (backend, is_told)
dist.destroy_process_group()
if child == 0:
    os._exit(0)
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert code == 0, code
"""


def run(script, *arguments):
    tests = Path(__file__).parent
    path = os.pathsep.join(map(str, (tests, tests.parent)))
    # torch refuses to fork a process that has used a GPU.
    env = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, env=env, timeout=100, capture_output=True, text=True)


def test_a_fork_in_the_middle_of_a_window():
    done = run(FORK)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("way", ["at the end", "inside of backward"])
def test_an_interpreter_ends_in_the_middle_of_a_window(way):
    done = run(EXIT, way)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_all_reduce_that_was_not_told(tmp_path):
    done = run(ALL_REDUCE, str(tmp_path / "store"))
    assert done.returncode == 0, done.stderr
