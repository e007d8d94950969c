"""Runs the GPU tests and records of which sources they passed; tells whether that still holds.

python tests/gpu_record.py --write    runs pytest -m gpu, writes tests/gpu_record.json
python tests/gpu_record.py --check    exits 1 when the record is not of the present sources
"""

import argparse
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "tests/gpu_record.json"
SUFFIXES = {".py", ".h", ".cpp", ".inc", ".cu", ".cuh"}


def source_hash():
    """The SHA-256 over names and contents of the sources under csrc/ and gradacc_kernels/."""
    digest = hashlib.sha256()
    files = [p for top in ("csrc", "gradacc_kernels") for p in (ROOT / top).rglob("*")]
    for path in sorted(p for p in files if p.suffix in SUFFIXES):
        digest.update(f"{path.relative_to(ROOT)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


class Counts:
    """A pytest plugin that counts outcomes."""

    def __init__(self):
        self.passed = self.failed = self.skipped = 0

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed += 1
        elif report.skipped:
            self.skipped += 1
        elif report.when == "call":
            self.passed += 1


def write():
    """Runs the tests and writes the record; returns pytest's exit status."""
    import pytest
    import torch

    if not torch.cuda.is_available():
        sys.exit("gpu_record: no CUDA device is visible, so there is nothing to record")
    counts = Counts()
    # Most of the time is Triton's, which compiles on the CPU.
    workers = ["-n", str(min(12, os.cpu_count())), "--dist", "loadgroup"]
    spread = workers if importlib.util.find_spec("xdist") else []
    status = pytest.main(["-q", "-m", "gpu", *spread, str(ROOT / "tests")], plugins=[counts])
    try:
        from triton import __version__ as triton_version
    except ImportError:
        triton_version = None
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
    ).stdout.split("\n")[0]
    record = {
        "sources": source_hash(),
        "device": torch.cuda.get_device_name(),
        "driver": driver,
        "torch": torch.__version__,
        "triton": triton_version,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **vars(counts),
    }
    RECORD.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))
    return status


def check():
    """Prints whether the record is of the present sources; returns 0 when it is."""
    if not RECORD.exists():
        print("GPU record: none; run `make gpu` on a machine with a GPU")
        return 1
    record = json.loads(RECORD.read_text())
    what = (
        f"{record['passed']} passed, {record['failed']} failed, {record['skipped']} skipped on "
        f"{record['device']} (torch {record['torch']}, {record['time']})"
    )
    if record["sources"] != source_hash():
        print(f"GPU record: of other sources than the present ones; they had {what}")
        return 1
    print(f"GPU record: of the present sources; {what}")
    return 1 if record["failed"] else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--write", action="store_true")
    mode.add_argument("--check", action="store_true")
    sys.exit(write() if parser.parse_args().write else check())
