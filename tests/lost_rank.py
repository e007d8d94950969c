"""Ranks of which the last is lost in the middle of a backward: what the others say.

    python tests/lost_rank.py WORLD_SIZE cpu|cuda dies|lags all_reduce|copies

Prints, as JSON, the error of each other rank and after how many seconds it came. Over NCCL ranks
end by a signal: what they say is on stderr.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from hook_cases import mlp
from rank_cases import free_port

import gradacc_kernels as gk
from gradacc_kernels import stalls

LAGS = 40.0  # seconds
TIMEOUT = 20.0


def run(rank, world_size, device, way, reduce_by, folder, port):
    """Two backwards; in the second the last rank is lost."""
    torch.set_num_threads(1)
    stalls.LISTENS = 2.0
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "gloo" if device == "cpu" else "nccl",
        f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=TIMEOUT),
    )
    torch.manual_seed(0)
    model = mlp(device, torch.float32)
    accumulator = gk.attach(
        model, process_group=dist.group.WORLD, bucket_bytes=1, reduce_by=reduce_by
    )

    def lose(grad):
        if way == "lags":
            time.sleep(LAGS)
        os._exit(0)

    began = time.monotonic()
    try:
        for window in range(2):
            began = time.monotonic()
            hidden = model[:3](torch.randn(4, 16, device=device))
            if window == 1 and rank == world_size - 1:
                hidden.register_hook(lose)
            model[3](hidden).square().sum().backward()
            if device == "cuda":
                model[0].weight.grad.sum().item()  # waits for the GPU
            model.zero_grad()
        error = None
    except RuntimeError as failure:
        error = str(failure)
    told = {"error": error, "seconds": time.monotonic() - began}
    (folder / str(rank)).write_text(json.dumps(told))
    assert accumulator is not None
    os._exit(0)


def main():
    world_size, device, way, reduce_by = int(sys.argv[1]), *sys.argv[2:5]
    if len(sys.argv) > 5:
        folder, port, rank = Path(sys.argv[5]), int(sys.argv[6]), int(sys.argv[7])
        run(rank, world_size, device, way, reduce_by, folder, port)
    began, port = time.monotonic(), free_port()
    with tempfile.TemporaryDirectory() as folder:
        if device == "cuda":
            command = [sys.executable, *sys.argv, folder, str(port)]
            children = [subprocess.Popen([*command, str(rank)]) for rank in range(world_size)]
            for child in children[:-1]:
                child.wait()
            children[-1].kill()
        else:
            children = []
            for rank in range(world_size):
                child = os.fork()
                if child == 0:
                    try:
                        run(rank, world_size, device, way, reduce_by, Path(folder), port)
                    finally:
                        os._exit(1)
                children.append(child)
            for child in children:
                os.waitpid(child, 0)
        ended = {"error": "ended by a signal", "seconds": time.monotonic() - began}
        said = {str(rank): ended for rank in range(world_size - 1)}
        for path in Path(folder).iterdir():
            said[path.name] = json.loads(path.read_text())
    print(json.dumps(said))


if __name__ == "__main__":
    main()
