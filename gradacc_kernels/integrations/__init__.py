"""Training libraries, one module each: what a loop of theirs needs beside ``attach``.

``gradacc_kernels.integrations.NAME`` is imported when it is first asked for, and the library with
it: ``accelerate``, ``lightning``, ``megatron`` (which imports no library), ``transformers``.
"""

import importlib

__all__ = ["accelerate", "lightning", "megatron", "transformers"]


def __getattr__(name: str):
    """Imports an integration."""
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
