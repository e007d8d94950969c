"""What a result was measured with: the ``environment`` entry of every results file."""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

import gradacc_kernels
from gradacc_kernels import dispatch

ROOT = Path(__file__).resolve().parent.parent


def _output_of(*command: str) -> str | None:
    """Returns what a command prints, or None when it cannot be run or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _commit() -> tuple[str | None, bool | None]:
    """Returns the commit and whether files differ from it, results left aside.

    A copy of the tree whose repository is missing, or is another, takes both from GRADACC_COMMIT,
    as in ``1a2b3c4`` or ``1a2b3c4-dirty``.
    """
    named = os.environ.get("GRADACC_COMMIT")
    if named:
        return named.removesuffix("-dirty"), named.endswith("-dirty")
    commit = _output_of("git", "rev-parse", "HEAD")
    if commit is None:
        return None, None
    changes = _output_of("git", "status", "--porcelain", "--", ".", ":!benchmarks/results")
    return commit, changes != ""


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _triton_version() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return None
    import triton

    return triton.__version__


def _gpu(device: torch.device) -> dict:
    properties = torch.cuda.get_device_properties(device)
    driver = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "device": properties.name,
        "driver": driver.splitlines()[0] if driver else None,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
    }


def environment(device: torch.device) -> dict:
    """Returns device, driver, versions, CPU, threads, commit and time, ready for JSON.

    The load average is the one before the run: on a shared machine, what competed with it.
    """
    commit, is_dirty = _commit()
    cpu = _cpu_model()
    return {
        "device": cpu,
        "driver": None,
        **(_gpu(device) if device.type == "cuda" else {}),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "backend": dispatch.choose(device, torch.float32),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _triton_version(),
        "gradacc_kernels": gradacc_kernels.__version__,
        "commit": commit,
        "dirty": is_dirty,
        "time_utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
