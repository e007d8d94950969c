"""Fused fp32 gradient accumulation for fp16/bf16 training in PyTorch."""

from gradacc_kernels import ops
from gradacc_kernels.accumulator import Accumulator
from gradacc_kernels.amp import GradScaler
from gradacc_kernels.hook import attach
from gradacc_kernels.noise_scale import NoiseScale
from gradacc_kernels.optim import MasterParams

__version__ = "0.1.0"
__all__ = ["Accumulator", "GradScaler", "MasterParams", "NoiseScale", "attach", "ops"]
