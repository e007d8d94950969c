"""Seeds, and the backends with the devices on which they run.

A CUDA case always exists, marked ``gpu``, and is skipped with a reason where it cannot run. The
Triton kernels also run on the CPU, in Triton's interpreter, where there is no CUDA device.
"""

import functools
import gc
import json
import os
import random
import signal
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

# Triton decides between its compiler and its interpreter when it is imported.
if torch.cuda.is_available():
    os.environ.pop("TRITON_INTERPRET", None)
else:
    os.environ["TRITON_INTERPRET"] = "1"

from gradacc_kernels import dispatch  # noqa: E402

pytest.register_assert_rewrite("oracle")


def pytest_configure(config):
    # The interpreter computes with numpy, which warns of every NaN and overflow.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


def pytest_collection_finish(session):
    """Leaves what imports have made out of each collection of garbage: none of it is a test's."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session):
    gc.unfreeze()


@pytest.fixture(autouse=True)
def threads(request):
    """One, as several gain nothing in models this small; all for kernels, by the mark `threads`.

    But those of the interpreter and of the reference, which divide no work by themselves.
    """
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    has_kernels = params.get("backend") not in (*ON_CPU[1:], REFERENCES[0])
    before = torch.get_num_threads()
    if not (has_kernels and request.node.get_closest_marker("threads")):
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seed(request):
    """Seeds the generators by the test's name; pytest shows the number when the test fails."""
    value = zlib.crc32(request.node.nodeid.encode())
    print(f"seed {value}")
    random.seed(value)
    torch.manual_seed(value)
    return value


def _release(package):
    return tuple(map(int, version(package).split(".")[:2]))


@dataclass(frozen=True)
class Backend:
    """A backend and the type of the device whose tensors it is given."""

    name: str
    device: str

    @property
    def is_interpreted(self) -> bool:
        return self.name == "triton" and self.device == "cpu"

    @property
    def has_fma(self) -> bool:
        """Tells whether products may be inexact: older interpreters round them before the sum."""
        if not self.is_interpreted:
            return True
        from triton._C.libtriton import interpreter

        return hasattr(interpreter, "fma_fp32")

    def in_turn(self, options, number):
        """All options; one of them, by a case's number, where each takes long: interpreted."""
        return [options[number % len(options)]] if self.is_interpreted else options

    def why_skipped(self) -> str | None:
        if self.device == "cuda" and not torch.cuda.is_available():
            return "no CUDA device"
        if self.is_interpreted and torch.cuda.is_available():
            return "Triton's interpreter is for machines without a CUDA device"
        if self.is_interpreted and _release("triton") < (3, 7) and _release("numpy") >= (2, 5):
            return "the interpreter of Triton before 3.7 does not run with NumPy 2.5 or later"
        return dispatch.why_missing(self.name)


def _marks(device):
    return [pytest.mark.gpu] if device == "cuda" else []


def _params(*backends):
    return [
        pytest.param(case, id=f"{case.name}-{case.device}", marks=_marks(case.device))
        for case in backends
    ]


def _available(backend):
    reason = backend.why_skipped()
    if reason is not None:
        pytest.skip(reason)
    return backend


ON_CPU = (Backend("cpu", "cpu"), Backend("triton", "cpu"))
ON_CUDA = (Backend("cuda", "cuda"), Backend("triton", "cuda"))
REFERENCES = (Backend("reference", "cpu"), Backend("reference", "cuda"))


@pytest.fixture(params=_params(*ON_CPU, *ON_CUDA, *REFERENCES))
def backend(request):
    """Every backend on every device that it serves."""
    return _available(request.param)


@pytest.fixture(params=_params(*ON_CPU, *ON_CUDA, REFERENCES[1]))
def other_backend(request):
    """Every one of them that is compared with the reference on the CPU."""
    return _available(request.param)


@pytest.fixture(params=_params(*ON_CUDA))
def cuda_backend(request):
    """The kernels for CUDA tensors."""
    return _available(request.param)


@pytest.fixture(params=[False, True], ids=["at-once", "queued"])
def queueing(request, monkeypatch):
    """Whether gradients of attached parameters wait in the queue; both policies on any device."""
    below = 1 << 40 if request.param else 0
    monkeypatch.setattr("gradacc_kernels.hook.QUEUE_BELOW", {"cpu": below, "cuda": below})
    return request.param


RANKS_MAY_TAKE = 300  # seconds


def gpus_of(world_size, way):
    """How many GPUs so many ranks need, in a way of rank_cases.py."""
    return {"cpu": 0, "shared": 1, "cuda": world_size}[way]


def _run_ranks(folder, script, world_size, way):
    """Runs a file of cases; returns its folder, what each rank says of each case, and stderr.

    Where a rank dies, or all take too long, that is what they have said until then.
    """
    here = Path(__file__).parent
    path = os.pathsep.join(map(str, (here, here.parent)))
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    if way == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""  # torch refuses to fork a process that has used a GPU
    command = [sys.executable, str(here / script), str(folder), str(world_size), way]
    process = subprocess.Popen(
        command, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        _, stderr = process.communicate(timeout=RANKS_MAY_TAKE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        stderr = process.communicate()[1] + f"\nended after {RANKS_MAY_TAKE} s"
    results = []
    for rank in range(world_size):
        path = folder / str(rank)
        lines = path.read_text().splitlines() if path.exists() else []
        results.append({r["case"]: r["failure"] for r in map(json.loads, lines)})
    return folder, results, stderr


@pytest.fixture(scope="session", autouse=True)
def _rank_runs(request, tmp_path_factory):
    """The runs of ranks that tests have, each begun beside the tests that come before its own.

    A worker of xdist, which collects the tests of all workers, begins those of its own tests alone.
    """
    params = [getattr(item, "callspec", None) for item in request.session.items]
    params = dict.fromkeys(spec.params.get("ranks") for spec in params if spec is not None)
    with ThreadPoolExecutor(max_workers=1) as executor:

        @functools.cache
        def begin(param):
            return executor.submit(_run_ranks, tmp_path_factory.mktemp("ranks"), *param)

        for param in params if "PYTEST_XDIST_WORKER" not in os.environ else ():
            if param is not None and torch.cuda.device_count() >= gpus_of(*param[1:]):
                begin(param)
        yield begin
        executor.shutdown(cancel_futures=True)


@pytest.fixture
def ranks(request, _rank_runs):
    """The folder that the ranks wrote to, their results by the name of the case, and stderr."""
    return _rank_runs(request.param).result()
