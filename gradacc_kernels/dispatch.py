"""Which backends exist on this machine, and which of them serves a tensor.

=========== ======================================= ============================
backend     what it is                              serves
=========== ======================================= ============================
cuda        compiled kernels                        CUDA tensors
triton      Triton kernels                          CUDA tensors; CPU tensors under
                                                    TRITON_INTERPRET=1
cpu         compiled kernel, vectorised, threaded   CPU tensors
reference   eager torch                             CPU and CUDA tensors; float64
=========== ======================================= ============================

``auto`` takes the first one of the table that exists and serves the tensor, and never Triton's
interpreter.
"""

from __future__ import annotations

import functools
import importlib
import os
from pathlib import Path
from types import ModuleType

import torch

from gradacc_kernels import tune
from gradacc_kernels.checks import CHUNK_SIZE

BACKENDS = ("cuda", "triton", "cpu", "reference")


@functools.cache
def extension() -> ModuleType | str:
    """Returns the compiled extension, or why it cannot be imported."""
    try:
        module = importlib.import_module("gradacc_kernels._C")
    except ImportError as error:
        if "No module named 'gradacc_kernels._C'" in str(error):
            root = Path(__file__).parent.parent
            if (root / "setup.py").exists():
                return f"{root} is imported as a source tree: pip install -e it, or leave it"
            return "the extension was not built (no compiler, GRADACC_NO_EXT=1 or a failed build)"
        return f"the extension does not load: {error}"
    if module.CHUNK_SIZE != CHUNK_SIZE:
        return "the extension was built from other sources than these: build it again"
    return module


def _is_triton_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def why_missing(backend: str) -> str | None:
    """Returns why a backend cannot be used on this machine, or None when it can."""
    if backend == "reference":
        return None
    if backend == "triton":
        try:
            importlib.import_module("gradacc_kernels.triton_kernels")
        except ImportError as error:
            return f"triton does not import: {error}"
        if not torch.cuda.is_available() and not _is_triton_interpreted():
            return "no CUDA device is visible"
        return None
    module = extension()
    if isinstance(module, str):
        return module
    if backend == "cuda":
        if not module.HAS_CUDA:
            return "the extension was built without CUDA"
        if not torch.cuda.is_available():
            return "no CUDA device is visible"
        tune.load(module)
    return None


def _serves(backend: str, device: torch.device, dtype: torch.dtype) -> bool:
    if dtype == torch.float64:
        return backend == "reference" and device.type in ("cpu", "cuda")
    return (
        device.type
        in {
            "cuda": ("cuda",),
            "triton": ("cuda", "cpu") if _is_triton_interpreted() else ("cuda",),
            "cpu": ("cpu",),
            "reference": ("cpu", "cuda"),
        }[backend]
    )


def choose(device: torch.device, dtype: torch.dtype, backend: str = "auto") -> str:
    """Returns the name of the backend for main gradients of a device and dtype.

    Raises:
        ValueError: an unknown backend, or one that does not serve this device or dtype.
        RuntimeError: a backend that is missing on this machine; the message says why.
    """
    if backend == "auto":
        for candidate in BACKENDS:
            is_emulation = candidate == "triton" and device.type == "cpu"
            if _serves(candidate, device, dtype) and not is_emulation:
                if why_missing(candidate) is None:
                    return candidate
        raise ValueError(f"no backend serves {dtype} main gradients on device {device}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {BACKENDS}, got {backend!r}")
    if not _serves(backend, device, dtype):
        raise ValueError(
            f"backend {backend!r} does not serve {dtype} main gradients on {device}; "
            "backend='auto' takes one that does"
        )
    reason = why_missing(backend)
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} is not available: {reason}")
    return backend


def module(backend: str) -> ModuleType:
    """Returns the module whose functions are a backend's ops."""
    if backend in ("cuda", "cpu"):
        return extension()
    name = {"triton": "triton_kernels", "reference": "reference"}[backend]
    return importlib.import_module(f"gradacc_kernels.{name}")
