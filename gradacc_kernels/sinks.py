"""Where gk.Monitor writes: JSON lines, TensorBoard, a live table in the terminal.

A sink is any object with ``write(record: dict)`` and ``close()``. These open what they write to with
the first record, so that ranks which write nothing make no files.
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from os import PathLike
from pathlib import Path
from typing import Any, Protocol


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
            self._file = self.path.open("a", encoding="utf-8")
        self._file.write(json.dumps(_finite(record), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


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
    """A table of the last windows in the terminal, and the largest norms of the last one.

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
                f"Live: expected the package rich, which is not installed: pip install rich ({error})"
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

    def _draw(self) -> None:
        self._live.update(self._table(), refresh=True)
        self._drawn = time.monotonic()

    def _table(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        last = self._records[-1]
        # What no window of those shown has anything in is left out.
        keys = [
            key
            for key in dict.fromkeys(key for record in self._records for key in record)
            if key not in ("time", "found_inf", "nonfinite", "largest")
            and any(record.get(key) not in (None, 0) for record in self._records)
        ]
        table = Table(caption=Text(_caption(last)), caption_justify="left")
        for key in keys:
            table.add_column(key.replace("_", " "), justify="right")
        for record in self._records:
            style = "bold red" if record["found_inf"] else None
            table.add_row(*(_cell(key, record.get(key)) for key in keys), style=style)
        return table


def _caption(record: dict[str, Any]) -> str:
    if record["nonfinite"]:
        return "inf or NaN in " + ", ".join(record["nonfinite"])
    largest = ", ".join(f"{name} {norm:.3g}" for name, norm in record["largest"].items())
    return f"largest norms: {largest}" if largest else "no gradients"


def _cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    if "bytes" in key:
        return f"{value / 1e9:.3g} GB" if value >= 1e9 else f"{value / 1e6:.3g} MB"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
