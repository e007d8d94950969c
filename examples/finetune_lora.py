"""Fine-tunes a language model of transformers by LoRA adapters of peft, on texts of all lengths.

    pip install transformers peft
    python examples/finetune_lora.py              # about a minute on two CPU cores
    python examples/finetune_lora.py --quick      # a few seconds

A small Llama with random weights stands for a pretrained one: --model takes the folder of another.
The base is frozen; the adapters are bfloat16. Texts are functions of Python's standard library,
byte by byte: micro-batches hold different numbers of tokens, so each has its own as its weight, and
the window's gradient is that of the mean over all its tokens. The noise scale tells how many tokens
a window should have. --record run.jsonl writes what each window was, of which
`python -m gradacc_kernels report run.jsonl` makes a page, the noise scale among it.
"""

import argparse
import ast
import inspect
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import gradacc_kernels as gk

try:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
except ImportError as error:
    sys.exit(
        f"finetune_lora.py needs transformers and peft ({error}): pip install transformers peft"
    )

IGNORED = -100  # a label that is no target


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default=default)
    parser.add_argument("--model", help="folder of a causal model of transformers over bytes")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--micro-batches", type=int, default=8, help="K, in a window")
    parser.add_argument("--texts", type=int, default=4, help="in a micro-batch")
    parser.add_argument("--record", type=Path, help="JSON lines, one a window")
    parser.add_argument("--quick", action="store_true", help="5 windows of 4 micro-batches")
    options = parser.parse_args()
    if options.quick:
        options.windows, options.micro_batches, options.texts = 5, 4, 2
    return options


def base(folder: str | None) -> torch.nn.Module:
    """Returns the model whose weights stay as they are."""
    if folder is not None:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


def functions() -> list[bytes]:
    """Returns the sources of functions, of up to 300 bytes each."""
    found = []
    for module in (argparse, ast, inspect, random):
        text = inspect.getsource(module)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                found.append(ast.get_source_segment(text, node).encode()[:300])
    return found


def batches(texts: list[bytes], size: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Yields micro-batches for ever: padded texts, in random order."""
    shuffle = random.Random(0)
    while True:
        rows = [
            torch.frombuffer(bytearray(t), dtype=torch.uint8) for t in shuffle.sample(texts, size)
        ]
        tokens = torch.zeros(size, max(map(len, rows)), dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = row
            mask[index, : len(row)] = 1
        labels = tokens.masked_fill(mask == 0, IGNORED)
        batch = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
        yield {name: value.to(device) for name, value in batch.items()}


def main() -> None:
    """Trains the adapters, and prints losses a token."""
    options = parse_arguments()
    device = torch.device(options.device)
    torch.manual_seed(0)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    model = get_peft_model(base(options.model), lora, autocast_adapter_dtype=False).to(device)
    accumulator = gk.attach(model)
    print(accumulator)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = gk.MasterParams(trained, torch.optim.AdamW, lr=5e-3)
    noise = gk.NoiseScale(accumulator)
    sinks = [] if options.record is None else [gk.JsonLines(options.record)]
    monitor = gk.Monitor(accumulator, sinks)
    data = batches(functions(), options.texts, device)

    began = time.perf_counter()
    for window in range(options.windows):
        total = torch.zeros((), dtype=torch.float64, device=device)
        for _ in range(options.micro_batches):
            batch = next(data)
            n_tokens = (batch["labels"][:, 1:] != IGNORED).sum()
            with accumulator.micro_batch(n_tokens):
                loss = model(**batch).loss  # the mean over these tokens
                loss.backward()
            noise.observe()
            total += loss.detach() * n_tokens
        noise.update()
        n_tokens = accumulator.weight
        spread, signal = noise.estimate
        monitor.log(loss=total / n_tokens, noise_scale=spread / signal)
        norm = accumulator.step(optimizer, max_norm=1.0)
        optimizer.zero_grad()
        if window % max(1, options.windows // 6) == 0 or window == options.windows - 1:
            loss, norm = (total / n_tokens).item(), norm.item()
            print(
                f"window {window:3}: {int(n_tokens):6} tokens, loss {loss:.3f}, norm {norm:.3f}, "
                f"noise scale {noise.value:,.0f} tokens"
            )
    monitor.close()
    print(f"{options.windows} windows in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
