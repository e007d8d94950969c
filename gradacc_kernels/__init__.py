"""Fused fp32 gradient accumulation for fp16/bf16 training in PyTorch."""

from gradacc_kernels import ops
from gradacc_kernels.hook import Accumulator, attach

__version__ = "0.1.0"
__all__ = ["Accumulator", "attach", "ops"]
