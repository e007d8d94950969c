"""Which backend serves a tensor, and what is left of the package without its extension."""

import os
import subprocess
import sys

import pytest
import torch

from gradacc_kernels import dispatch, ops

CPU, CUDA, META = torch.device("cpu"), torch.device("cuda"), torch.device("meta")
F32, F64 = torch.float32, torch.float64


@pytest.fixture
def only(monkeypatch):
    """Makes the backends named exist, and no others, whatever this machine has."""

    def declare(*names):
        monkeypatch.setattr(
            dispatch, "why_missing", lambda name: None if name in names else "it is not here"
        )

    return declare


@pytest.mark.parametrize(
    "existing, device, dtype, chosen",
    [
        (dispatch.BACKENDS, CUDA, F32, "cuda"),
        (("triton", "cpu", "reference"), CUDA, F32, "triton"),
        (("cpu", "reference"), CUDA, F32, "reference"),
        (dispatch.BACKENDS, CPU, F32, "cpu"),
        (("cuda", "triton", "reference"), CPU, F32, "reference"),
        (dispatch.BACKENDS, CUDA, F64, "reference"),
        (dispatch.BACKENDS, CPU, F64, "reference"),
    ],
)
@pytest.mark.parametrize("interpret", ["0", "1"])
def test_auto_takes_the_first_that_serves(
    only, monkeypatch, interpret, existing, device, dtype, chosen
):
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    only(*existing)
    assert dispatch.choose(device, dtype) == chosen
    assert dispatch.choose(device, dtype, "auto") == chosen


@pytest.mark.parametrize("name", dispatch.BACKENDS)
def test_a_backend_by_name(only, name):
    only(*dispatch.BACKENDS)
    device = CPU if name == "cpu" else CUDA
    assert dispatch.choose(device, F32, name) == name


@pytest.mark.parametrize(
    "name, device, dtype",
    [("cuda", CPU, F32), ("cpu", CUDA, F32), ("cuda", CUDA, F64), ("cpu", CPU, F64)]
    + [(name, META, F32) for name in dispatch.BACKENDS],
)
def test_a_backend_that_does_not_serve(only, name, device, dtype):
    only(*dispatch.BACKENDS)
    with pytest.raises(ValueError, match=f"backend '{name}' does not serve {dtype} .* on {device}"):
        dispatch.choose(device, dtype, name)


def test_no_backend_serves_meta():
    with pytest.raises(ValueError, match=r"no backend serves torch.float32 .* on device meta"):
        dispatch.choose(META, F32)


def test_triton_serves_the_cpu_only_in_its_interpreter(only, monkeypatch):
    only(*dispatch.BACKENDS)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.choose(CPU, F32, "triton") == "triton"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="'triton' does not serve"):
        dispatch.choose(CPU, F32, "triton")


def test_a_backend_that_is_missing(only):
    only("reference")
    with pytest.raises(RuntimeError, match="backend 'cpu' is not available: it is not here"):
        dispatch.choose(CPU, F32, "cpu")


def test_an_unknown_backend():
    with pytest.raises(ValueError, match="must be 'auto' or one of .*, got 'CPU'"):
        dispatch.choose(CPU, F32, "CPU")


def test_why_missing_is_a_reason_or_none():
    for name in dispatch.BACKENDS:
        reason = dispatch.why_missing(name)
        assert reason is None or len(reason) > 10
    assert dispatch.why_missing("reference") is None
    if not torch.cuda.is_available():
        assert dispatch.why_missing("cuda") in (
            "the extension was built without CUDA",
            "no CUDA device is visible",
            dispatch.extension(),
        )


def test_modules_offer_every_op(backend):
    module = dispatch.module(backend.name)
    for name in ("accumulate_", "multi_accumulate_", "grad_stats", "scale_"):
        assert callable(getattr(module, name))


def test_extension_and_package_cut_the_same_chunks():
    extension = dispatch.extension()
    if isinstance(extension, str):
        pytest.skip(extension)
    assert extension.CHUNK_SIZE == ops.CHUNK_SIZE


def run_python(code, **environment):
    """Runs code in a fresh interpreter; its asserts are the test's."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr


WITHOUT_EXTENSION = """
import sys
sys.modules["gradacc_kernels._C"] = None
import torch
import gradacc_kernels as gk
from gradacc_kernels import dispatch, ops

cpu = torch.device("cpu")
assert dispatch.choose(cpu, torch.float32) == "reference"
assert "gradacc_kernels._C" in dispatch.why_missing("cpu")
assert dispatch.why_missing("cuda") == dispatch.why_missing("cpu")
main = torch.full((3,), 256.0)
for _ in range(2):
    ops.accumulate_(main, torch.ones(3, dtype=torch.bfloat16))
assert main.tolist() == [258.0] * 3
try:
    ops.accumulate_(main, main.half(), backend="cpu")
except RuntimeError as error:
    assert "backend 'cpu' is not available" in str(error)
else:
    raise AssertionError("a missing backend served")

model = torch.nn.Linear(4, 2).bfloat16()
accumulator = gk.attach(model)
assert "backend reference, Python hook" in repr(accumulator)
x = torch.ones(3, 4, dtype=torch.bfloat16)
for k in (1, 2):
    model(x).sum().backward()
    assert model.bias.grad.dtype == torch.float32
    assert model.bias.grad.tolist() == [3.0 * k] * 2
    assert model.weight.grad.tolist() == [[3.0 * k] * 4] * 2
accumulator.detach()
assert model.bias.grad.dtype == torch.bfloat16
"""


def test_package_without_its_extension():
    run_python(WITHOUT_EXTENSION)


def test_package_without_its_extension_and_without_triton():
    run_python("import sys; sys.modules['triton'] = None" + WITHOUT_EXTENSION)


def test_import_leaves_triton_cuda_and_torch_compile_alone():
    run_python(
        "import sys, torch, gradacc_kernels\n"
        "assert 'gradacc_kernels.triton_kernels' not in sys.modules\n"
        "assert not torch.cuda.is_initialized()\n"
        "torch.overrides.get_overridable_functions()\n"
        "f = torch.compile(lambda x: torch.sin(x) + 1, backend='eager', fullgraph=True)\n"
        "assert torch.equal(f(torch.zeros(2)), torch.ones(2))\n"
    )
