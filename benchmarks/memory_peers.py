"""What other ways of mixed precision hold for each parameter, by their documents: not measured.

Bytes on one GPU that shards nothing, with Adam, between the backward and the step of a window.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Peer:
    """One way.

    Attributes:
        name: as its users call it.
        bytes_per_param: a number, or two where an option decides.
        held: what the bytes are.
        source: an address that says so.
        is_stated: the source states the sum; otherwise it is of the tensors that its code makes.
    """

    name: str
    bytes_per_param: str
    held: str
    source: str
    is_stated: bool


PEERS = (
    Peer(
        "torch.autocast, AdamW",
        "18",
        "float32 parameters 4, their 16-bit copies 2 (inside of autocast), float32 gradients 4, "
        "AdamW 8",
        "https://github.com/huggingface/transformers/blob/249ef8164cfbd8e288c2f6d8395539b9e90e8300/"
        "docs/source/en/model_memory_anatomy.md",
        True,
    ),
    Peer(
        "Megatron-LM, bf16 parameters, fp32 gradients, no distributed optimizer",
        "18",
        "16-bit parameters 2, float32 gradients 4, float32 main parameters 4, Adam 8",
        "https://docs.nvidia.com/megatron-core/developer-guide/latest/api-guide/dist_optimizer.html",
        True,
    ),
    Peer(
        "Megatron-LM, fp16 parameters, fp16 gradients, no distributed optimizer",
        "20",
        "16-bit parameters 2, 16-bit gradients 2 and float32 ones 4, float32 main parameters 4, "
        "Adam 8",
        "https://docs.nvidia.com/megatron-core/developer-guide/latest/api-guide/dist_optimizer.html",
        True,
    ),
    Peer(
        "DeepSpeed fp16, ZeRO 0 or 1 on one GPU",
        "16",
        "fp16 parameters 2, fp16 gradients 2, float32 parameters 4, Adam 8; gradients are summed "
        "in fp16",
        "https://arxiv.org/abs/1910.02054",
        True,
    ),
    Peer(
        "DeepSpeed BF16_Optimizer, fp32 gradient accumulation",
        "18 or 20",
        "bf16 parameters 2, float32 gradients 4, float32 parameters 4, Adam 8, and bf16 gradients "
        "2 where they are kept",
        "https://github.com/deepspeedai/DeepSpeed/blob/0acdb021c71edb33a637ee60ff54425279cd08bc/"
        "deepspeed/runtime/bf16_optimizer.py",
        False,
    ),
    Peer(
        "Apex amp O2",
        "20",
        "fp16 parameters 2, fp16 gradients 2, float32 master weights 4 and their gradients 4, "
        "Adam 8",
        "https://github.com/NVIDIA/apex/blob/00dbe4b440d7b0cbf7942672f0b1efde79031711/apex/amp/"
        "_process_optimizer.py",
        False,
    ),
    Peer(
        "Apex FusedAdam, master weights",
        "16",
        "fp16 parameters 2, fp16 gradients 2, float32 master weights 4, Adam 8; gradients are "
        "summed in fp16",
        "https://github.com/NVIDIA/apex/blob/004da4edfc08853393bfc8ef3e2436f652176f13/apex/"
        "optimizers/fused_adam.py",
        False,
    ),
    Peer(
        "Transformer Engine FusedAdam, store_param_remainders",
        "14 or 16",
        "bf16 parameters 2, the other 16 bits of the masters 2, Adam 8, gradients 2 or 4 as they "
        "are given",
        "https://github.com/NVIDIA/TransformerEngine/blob/"
        "04912bf024514826f31cc02485d396974af68516/transformer_engine/pytorch/optimizers/"
        "fused_adam.py",
        False,
    ),
)
