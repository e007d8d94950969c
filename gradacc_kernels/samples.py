"""A random sample of the main gradients: lines of 128 bytes, always the same ones.

No two parameters share a line of the flat buffer, and what of one is not a parameter's is zero.
The lines of the chosen parameters are cut into as many equal parts as lines are wanted, and one is
drawn from each, so that all are equally likely, and every parameter has its share.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gradacc_kernels.buffer import ALIGNMENT, padded

SEED = 0


def draw(attachment: Any, names: set[str], max_elements: int | None) -> list[Sample]:
    """Returns a sample of each group that has some of these parameters.

    Args:
        attachment: of the groups.
        names: of parameters.
        max_elements: of all samples together; None for all there are.
    """
    wanted = [_lines_of(group, names) for group in attachment.groups]
    elements = sum(
        int(counts.sum()) * _line(group)
        for group, (_, counts) in zip(attachment.groups, wanted, strict=True)
    )
    share = min(1.0, (math.inf if max_elements is None else max_elements) / max(1, elements))
    return [
        Sample(attachment, group, starts, counts, share)
        for group, (starts, counts) in zip(attachment.groups, wanted, strict=True)
        if len(counts)
    ]


class Sample:
    """Lines of the main gradients of a group: as they are, and as they were before.

    Args:
        attachment: of the group.
        group: of parameters of one device and dtype.
        starts: int64 [n]: the first line of each chosen parameter in the flat buffer.
        counts: int64 [n]: how many lines it has.
        share: of the lines that are wanted.

    Attributes:
        rows: int64 [m], ascending: the numbers of the lines, one from each of m equal parts.
        before, now: [m, elements of a line].
        count: lines of the chosen parameters.
    """

    def __init__(self, attachment: Any, group: Any, starts: Tensor, counts: Tensor, share: float):
        self.count = int(counts.sum())
        wanted = max(1, round(self.count * share))
        within = torch.rand(
            wanted, dtype=torch.float64, generator=torch.Generator().manual_seed(SEED)
        )
        chosen = (torch.arange(wanted) + within) * (self.count / wanted)
        chosen = chosen.long().clamp(max=self.count - 1)
        ends = counts.cumsum(0)
        owner = torch.searchsorted(ends, chosen, right=True)
        rows = chosen - (ends - counts)[owner] + starts[owner]
        owners, self._owner = owner.unique(return_inverse=True)
        by_start = dict(zip(_starts(group).tolist(), group.names, strict=True))
        self._params = [attachment.params[by_start[int(starts[i])]] for i in owners]
        self._host_rows = rows
        self.rows = rows.to(group.device)
        self._lines = group.buffer.flat.view(-1, _line(group))
        self.before = self._lines.new_zeros(wanted, self._lines.shape[1])
        self.now = torch.empty_like(self.before)
        self._mask: tuple[list[bool], Tensor | None] = [True] * len(self._params), None

    def read(self) -> None:
        """now = main gradients, zero where there is none."""
        torch.index_select(self._lines, 0, self.rows, out=self.now)
        missing = self._missing()
        if missing is not None:
            self.now.masked_fill_(missing, 0.0)

    def _missing(self) -> Tensor | None:
        """1 in the lines of parameters without a gradient, whose memory is of older windows."""
        begun = [param.grad is not None for param in self._params]
        if begun != self._mask[0]:
            missing = torch.tensor(begun).logical_not()[self._owner].unsqueeze(1)
            if self.now.is_cuda:
                missing = missing.pin_memory()
            self._mask = begun, missing.to(self.now.device, non_blocking=True)
        return None if all(begun) else self._mask[1]

    def capture(self, begin: int, end: int) -> int:
        """now = main gradients between two elements of the flat buffer; returns how many lines."""
        line = self._lines.shape[1]
        bounds = torch.tensor([begin // line, end // line])
        first, last = torch.searchsorted(self._host_rows, bounds).tolist()
        rows, now = self.rows[first:last], self.now[first:last]
        torch.index_select(self._lines, 0, rows, out=now)
        return last - first

    def read_mean(self) -> None:
        """before = main gradients, that all ranks have."""
        torch.index_select(self._lines, 0, self.rows, out=self.before)

    def swap(self) -> None:
        """before = now."""
        self.before, self.now = self.now, self.before

    def difference(self) -> Tensor:
        """|now - before|^2 of all lines, estimated: 0-dim float64; then before = now."""
        self.before.sub_(self.now)
        self.swap()
        return self._square(self.now)

    def square(self) -> Tensor:
        """|before|^2 of all lines, estimated: 0-dim float64."""
        return self._square(self.before)

    def _square(self, values: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(values).double()
        return norm.square() * (self.count / len(self.rows))


def _line(group: Any) -> int:
    """Elements of a line of the flat buffer, which no two parameters share."""
    return ALIGNMENT // group.dtype.itemsize


def _starts(group: Any) -> Tensor:
    """The first line of each parameter."""
    ends = torch.tensor([0, *group.buffer.ends])
    return ends[:-1] // _line(group)


def _lines_of(group: Any, names: set[str]) -> tuple[Tensor, Tensor]:
    """The first line, and the number of lines, of each parameter of a group that is named."""
    is_wanted = [name in names for name in group.names]
    sizes = [padded(view.numel(), group.dtype) // _line(group) for view in group.buffer.views]
    keep = torch.tensor(is_wanted) & (torch.tensor(sizes) > 0)
    return _starts(group)[keep], torch.tensor(sizes)[keep]
