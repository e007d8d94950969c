"""Where gk.Monitor writes: JSON lines, TensorBoard, a live table in the terminal.

A sink is any object with ``write(record: dict)`` and ``close()``. These open
what they write to with their first record, so that ranks which write nothing make no files.
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

from gradacc_kernels.accumulator import human


class Sink(Protocol):
    """What a Monitor writes to."""

    def write(self, record: dict[str, Any]) -> None:
        """Takes the record of one window; its keys are those of gk.Monitor."""

    def close(self) -> None:
        """Called once, after the last record."""


class JsonLines:
    """One JSON object a line, appended to a file, which is complete after each record.

    Numbers that JSON does not have (NaN, inf) are written as null.

    Args:
        path: of the file; its folder is made.
    """

    def __init__(self, path: str | PathLike[str]):
        self.path = Path(path)
        self._file: Any = None

    def write(self, record: dict[str, Any]) -> None:
        """Writes a line."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            is_cut = _is_cut(self.path)
            self._file = self.path.open("a", encoding="utf-8", buffering=1)  # a line
            if is_cut:
                self._file.write("\n")
        try:
            line = _encode(record)
        except ValueError:
            line = _encode(_finite(record))
        self._file.write(line + "\n")

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


def _is_cut(path: Path) -> bool:
    """Whether a file ends within a line, as of a run that was killed."""
    if not path.is_file() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read() != b"\n"


_encode = json.JSONEncoder(allow_nan=False).encode


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class TensorBoard:
    """Every number as a scalar ``gradacc/<key>``, and names of parameters that overflow as text.

    Args:
        log_dir: a folder, or a SummaryWriter (any object with ``add_scalar`` and ``add_text``),
            which stays open.

    Raises:
        ImportError: a folder, and the package tensorboard is not installed.
    """

    def __init__(self, log_dir: str | PathLike[str] | Any):
        self._log_dir, self._writer = log_dir, None
        self._is_ours = isinstance(log_dir, (str, PathLike))
        if not self._is_ours:
            self._writer = log_dir
            return
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise ImportError(
                "TensorBoard: expected the package tensorboard, which is not installed: "
                f"pip install tensorboard ({error})"
            ) from None

    def write(self, record: dict[str, Any]) -> None:
        """Writes scalars at the step of the record."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._log_dir))
        step, walltime = record["step"], record["time"]
        for key, value in record.items():
            named = {f"{key}/{name}": each for name, each in _items(value)} or {key: value}
            for name, each in named.items():
                if isinstance(each, (int, float)) and key not in ("step", "time"):
                    self._writer.add_scalar(f"gradacc/{name}", each, step, walltime)
        if record["nonfinite"]:
            names = ", ".join(record["nonfinite"])
            self._writer.add_text("gradacc/nonfinite", names, step, walltime)

    def close(self) -> None:
        """Closes a writer that was made here; flushes another."""
        if self._writer is not None:
            self._writer.close() if self._is_ours else self._writer.flush()


def _items(value: Any) -> Any:
    return value.items() if isinstance(value, dict) else ()


class Live:
    """A table of the last windows in the terminal; below it, norms and bytes of the last one.

    Args:
        rows: how many windows it shows.
        console: a ``rich.console.Console``; None for stdout.

    Raises:
        ImportError: the package rich is not installed.
    """

    INTERVAL = 0.25  # seconds between two drawings, at the least

    def __init__(self, rows: int = 10, *, console: Any = None):
        try:
            import rich  # noqa: F401
        except ImportError as error:
            raise ImportError(
                "Live: expected the package rich, which is not installed: pip install rich "
                f"({error})"
            ) from None
        self._console = console
        self._records: deque[dict[str, Any]] = deque(maxlen=rows)
        self._live: Any = None
        self._drawn = -math.inf

    def write(self, record: dict[str, Any]) -> None:
        """Shows a record."""
        if self._live is None:
            from rich.live import Live as RichLive

            self._live = RichLive(console=self._console, auto_refresh=False)
            self._live.start()
        self._records.append(record)
        if time.monotonic() - self._drawn >= self.INTERVAL:
            self._draw()

    def close(self) -> None:
        """Leaves the last table in the terminal."""
        if self._live is not None:
            self._draw()
            self._live.stop()
            if not self._live.console.is_terminal:
                self._live.console.line()  # which rich ends the table with in a terminal alone

    def _draw(self) -> None:
        self._live.update(self._table(), refresh=True)
        self._drawn = time.monotonic()

    def _table(self) -> Any:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        keys = list(dict.fromkeys(key for record in self._records for key in record))
        keys = [key for key in keys if key not in BELOW and self._has_any(key)]
        caption = Text(_caption(self._records[-1]))
        table = Table(box=SIMPLE_HEAD, pad_edge=False, caption=caption, caption_justify="left")
        for key in keys:
            table.add_column(key.replace("_", " "), justify="right")
        for record in self._records:
            style = "bold red" if record["found_inf"] else None
            table.add_row(*(_cell(record.get(key)) for key in keys), style=style)
        return table

    def _has_any(self, key: str) -> bool:
        """Tells whether a window has anything there."""
        return any(record.get(key) is not None for record in self._records)


# What a table has below it, or not at all.
BELOW = (
    *("time", "largest", "found_inf", "nonfinite", "skipped_windows", "skipped_micro_batches"),
    *("nbytes", "cuda_bytes", "cuda_peak_bytes"),
)


def _caption(record: dict[str, Any]) -> str:
    if record["nonfinite"]:
        first = "inf or NaN in " + ", ".join(record["nonfinite"])
    else:
        norms = (f"{name} {norm:.4g}" for name, norm in record["largest"].items())
        first = "largest norms: " + ", ".join(norms)
    bytes_ = f"{human(record['nbytes'])} of main gradients"
    if "cuda_bytes" in record:
        allocated, peak = human(record["cuda_bytes"]), human(record["cuda_peak_bytes"])
        bytes_ += f", {allocated} on the GPU, {peak} at most"
    skipped = f"windows {record['skipped_windows']}"
    skipped += f", micro-batches {record['skipped_micro_batches']}"
    return f"{first}\nskipped so far: {skipped}; {bytes_}"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
