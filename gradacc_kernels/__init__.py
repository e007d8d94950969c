"""Fused fp32 gradient accumulation for fp16/bf16 training in PyTorch."""

from gradacc_kernels import integrations, ops
from gradacc_kernels.accumulator import Accumulator
from gradacc_kernels.amp import GradScaler
from gradacc_kernels.auto_window import AutoWindow, FollowNoise, Schedule, TokenTarget
from gradacc_kernels.hook import attach
from gradacc_kernels.micro_batch_size import MicroBatchSize, find_micro_batch_size
from gradacc_kernels.monitor import Monitor
from gradacc_kernels.noise_scale import NoiseScale
from gradacc_kernels.optim import MasterParams
from gradacc_kernels.sinks import JsonLines, Live, TensorBoard
from gradacc_kernels.stats import Stats

__version__ = "0.1.0"
__all__ = [
    "Accumulator",
    "AutoWindow",
    "FollowNoise",
    "GradScaler",
    "JsonLines",
    "Live",
    "MasterParams",
    "MicroBatchSize",
    "Monitor",
    "NoiseScale",
    "Schedule",
    "Stats",
    "TensorBoard",
    "TokenTarget",
    "attach",
    "find_micro_batch_size",
    "integrations",
    "ops",
]
