"""Fused fp32 gradient accumulation for fp16/bf16 training in PyTorch."""

from gradacc_kernels import ops
from gradacc_kernels.hook import Accumulator, attach
from gradacc_kernels.optim import MasterParams

__version__ = "0.1.0"
__all__ = ["Accumulator", "MasterParams", "attach", "ops"]
