"""A window in the middle, as a dictionary of plain tensors that any file format holds.

=========================  ========================================================================
``format``                 int64: FORMAT
``scale``                  float64: the factor of attach, which is in the sums
``window``                 float64 of shape [3]: the sum of the weights of its micro-batches, by
                           which the sums are to be divided, -1 without weights, -2 where they
                           were divided; 1 where a micro-batch was dropped, else 0; the number of
                           the first that was not finite, 0 for none
``backwards``              int64: how many it has had, of attach's ``steps``
``micro_batches.<name>``   int64, of every covered parameter: how many backwards have added to it;
                           -1 where its ``.grad`` is None
``main_grad.<name>``       its sum so far, in the dtype of its main gradient; absent with -1
=========================  ========================================================================
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gradacc_kernels import sharded
from gradacc_kernels.window import AVERAGED, UNWEIGHTED

FORMAT = 3
NOT_BEGUN = -1
_COUNT, _SUM = "micro_batches.", "main_grad."


def save(attachment: Any) -> dict[str, Tensor]:
    """Returns the window of an attachment; the sums are copies.

    Raises:
        RuntimeError: micro-batches wait for FSDP2 to reduce them.
    """
    attachment.check_reduced()
    state = {
        "format": torch.tensor(FORMAT),
        "scale": torch.tensor(attachment.scale, dtype=torch.float64),
        "window": attachment.window.state(),
        "backwards": torch.tensor(attachment.backwards()),
    }
    for group, index, name, _ in attachment.members():
        total = group.hooks.current(index)
        count = NOT_BEGUN if total is None else group.hooks.micro_batches(index)
        state[_COUNT + name] = torch.tensor(count)
        if total is not None:
            state[_SUM + name] = total.detach().to(group.dtype, copy=True)
    return state


def load(attachment: Any, state: Mapping[str, Tensor]) -> None:
    """Makes the window of an attachment that of a state; checks all of it first.

    Raises:
        TypeError: no mapping of names to tensors.
        ValueError: of another format, scale or model, or incomplete; nothing was changed.
    """
    attachment.window.check_closed("load_state_dict")
    _check(attachment, state)
    backwards = int(state["backwards"])
    for group, index, name, _ in attachment.members():
        count = max(0, int(state[_COUNT + name]))
        group.hooks.load(index, state.get(_SUM + name), count, backwards)
    attachment.window.load(state["window"])


def _check(attachment: Any, state: Mapping[str, Tensor]) -> None:
    if not isinstance(state, Mapping):
        raise TypeError(
            f"load_state_dict: expected what state_dict() returned, got {type(state).__name__}"
        )
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise TypeError(
                f"load_state_dict: expected names and tensors, got {type(value).__name__} for "
                f"{key!r}"
            )
    version = _number(state, "format")
    if version != FORMAT:
        raise ValueError(
            f"load_state_dict: the state has format {version:g}, this package reads {FORMAT}"
        )
    scale = _number(state, "scale")
    if scale != attachment.scale:
        raise ValueError(
            f"load_state_dict: the sums were scaled by {scale}, and the next gradients would be by "
            f"{attachment.scale}: attach with scale={scale}"
        )
    _check_window(state)
    backwards = _number(state, "backwards")
    if not (backwards >= 0 and float(backwards).is_integer()):
        raise ValueError(f"load_state_dict: a window cannot have had {backwards:g} backwards")
    members = {name: group for group, _, name, _ in attachment.members()}
    missing = [name for name in members if _COUNT + name not in state]
    known = {prefix + name for prefix in (_COUNT, _SUM) for name in members}
    known |= {"format", "scale", "window", "backwards"}
    unknown = [key for key in state if key not in known]
    if missing or unknown:
        raise ValueError(
            "load_state_dict: the state is of other parameters, or incomplete"
            + (f"; it lacks {_some(missing)}" if missing else "")
            + (f"; nothing here is called {_some(unknown)}" if unknown else "")
        )
    for name, group in members.items():
        count, total = _number(state, _COUNT + name), state.get(_SUM + name)
        if (count == NOT_BEGUN) != (total is None):
            raise ValueError(
                f"load_state_dict: the state is incomplete: parameter {name} has the count "
                f"{count:g} and {'no ' if total is None else 'a '}sum"
            )
        if not (count >= NOT_BEGUN and float(count).is_integer()):
            raise ValueError(
                f"load_state_dict: parameter {name} cannot have seen {count:g} micro-batches"
            )
        shape = sharded.local(attachment.params[name]).shape
        if total is not None and (total.shape != shape or total.dtype != group.dtype):
            raise ValueError(
                f"load_state_dict: the sum of parameter {name} must be {group.dtype} of shape "
                f"{list(shape)}, got {total.dtype} of shape {list(total.shape)}"
            )
        if total is not None and (total.layout != torch.strided or total.is_meta):
            raise ValueError(f"load_state_dict: the sum of parameter {name} must be dense")


def _check_window(state: Mapping[str, Tensor]) -> None:
    window = state.get("window")
    if window is None:
        raise ValueError("load_state_dict: this is no state of an Accumulator: it lacks 'window'")
    if window.shape != (3,) or window.dtype != torch.float64 or window.is_meta:
        raise ValueError(
            "load_state_dict: window must be torch.float64 of shape [3], got a "
            f"{window.dtype} tensor of shape {list(window.shape)}"
        )
    weight, has_skipped, first_bad = window.tolist()
    if not (weight in (UNWEIGHTED, AVERAGED) or 0 <= weight < math.inf):
        raise ValueError(f"load_state_dict: a window cannot have the weight {weight:g}")
    if has_skipped not in (0, 1) or not (first_bad >= 0 and first_bad.is_integer()):
        raise ValueError(
            f"load_state_dict: a window cannot have dropped {has_skipped:g}, or have {first_bad:g} "
            "as its first bad micro-batch"
        )


def _number(state: Mapping[str, Tensor], key: str) -> float:
    value = state.get(key)
    if value is None:
        raise ValueError(f"load_state_dict: this is no state of an Accumulator: it lacks {key!r}")
    if value.numel() != 1 or value.is_complex() or value.is_meta:
        raise ValueError(
            f"load_state_dict: {key} must be one number, got a {value.dtype} tensor of shape "
            f"{list(value.shape)}"
        )
    return value.item()


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
