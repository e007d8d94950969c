"""Builds gradacc_kernels._C: the CPU kernels always, the CUDA kernels where nvcc is found.

Environment:
    GRADACC_CUDA=0|1|auto   CUDA kernels: never, or fail without them, or where torch and nvcc allow
    GRADACC_CUTLASS=path    CUTLASS 3 headers, for the weight gradient kernels of sm_90; by default
                            those of the package nvidia-cutlass, where it is installed
    GRADACC_NO_EXT=0|1      1: no extension at all; 0: fail when it cannot be built
    TORCH_CUDA_ARCH_LIST    architectures, as torch reads it; default 8.0;9.0;10.0;12.0+PTX as far
                            as nvcc knows them
    GRADACC_CXX_FLAGS       flags for the C++ compiler, after those of this file
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ImportError as error:
    sys.exit(
        f"gradacc_kernels is built against the torch that it will run with, but importing it "
        f"failed: {error}\nInstall torch first, then: pip install --no-build-isolation ."
    )

CPU_SOURCES = [
    "csrc/autograd/fused_embedding.cpp",
    "csrc/autograd/fused_weight.cpp",
    "csrc/autograd/buckets.cpp",
    "csrc/autograd/hook.cpp",
    "csrc/autograd/node.cpp",
    "csrc/autograd/shared_input.cpp",
    "csrc/autograd/uses.cpp",
    "csrc/bindings/cpu.cpp",
    "csrc/bindings/embedding.cpp",
    "csrc/bindings/module.cpp",
    "csrc/bindings/ops.cpp",
    "csrc/bindings/wgrad.cpp",
    "csrc/cpu/accumulate.cpp",
    "csrc/cpu/embedding.cpp",
]
CUDA_SOURCES = [
    "csrc/bindings/cuda.cpp",
    "csrc/bindings/wgrad_choice.cpp",
    "csrc/bindings/wgrad_cuda.cpp",
    "csrc/bindings/cublaslt.cpp",
    "csrc/cuda/accumulate.cu",
    "csrc/cuda/embedding.cu",
    "csrc/cuda/scale.cu",
    "csrc/cuda/statistics.cu",
    "csrc/cuda/wgrad_cutlass.cu",
]
# No contraction: the CPU kernels say where a fused multiply-add is meant.
CXX_FLAGS = ["-O3", "-ffp-contract=off", "-fvisibility=hidden", "-Wno-uninitialized"]
CXX_FLAGS += os.environ.get("GRADACC_CXX_FLAGS", "").split()
# -DNDEBUG: CUTLASS's assertions serialise its matrix instructions.
NVCC_FLAGS = ["-O3", "-DNDEBUG", "-lineinfo", "--expt-relaxed-constexpr"]
ARCHITECTURES = ["8.0", "9.0", "10.0", "12.0"]


def say(message):
    """Prints a message that pip's output and a build log both show."""
    line = "=" * 100
    print(f"\n{line}\ngradacc_kernels: {message}\n{line}\n", file=sys.stderr, flush=True)


def nvcc(*arguments):
    """The output of nvcc, or None when it cannot be run."""
    if CUDA_HOME is None:
        return None
    try:
        return subprocess.check_output([str(Path(CUDA_HOME) / "bin/nvcc"), *arguments], text=True)
    except (OSError, subprocess.CalledProcessError):
        return None


def why_no_cuda():
    """Why the CUDA kernels cannot be built here, or None."""
    if os.environ.get("GRADACC_CUDA", "auto") == "0":
        return "GRADACC_CUDA=0"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    version = nvcc("--version")
    if version is None:
        return "nvcc was not found; set CUDA_HOME to the CUDA toolkit"
    major = re.search(r"release (\d+)", version).group(1)
    if major != torch.version.cuda.split(".")[0]:
        return f"nvcc is of CUDA {major}, torch of CUDA {torch.version.cuda}"
    return None


def cutlass_headers():
    """The folder of the CUTLASS headers, or None."""
    folder = os.environ.get("GRADACC_CUTLASS")
    if folder is None:
        package = importlib.util.find_spec("cutlass_library")
        if package is None:
            return None
        folder = Path(package.origin).parent / "source/include"
    if (Path(folder) / "cutlass/cutlass.h").exists():
        return str(folder)
    return None


def architecture_list():
    """TORCH_CUDA_ARCH_LIST, or the default architectures that nvcc knows, with PTX of the last.

    9.0 becomes 9.0a where CUTLASS is there: its kernels use instructions of that target, which
    every GPU of compute capability 9.0 has.
    """
    known = nvcc("--list-gpu-arch") or ""
    names = [a for a in ARCHITECTURES if f"compute_{a.replace('.', '')}" in known]
    requested = os.environ.get("TORCH_CUDA_ARCH_LIST", ";".join(names) + "+PTX")
    if cutlass_headers():
        requested = re.sub(r"\b9\.0(?!\w)", "9.0a", requested)
    os.environ["TORCH_CUDA_ARCH_LIST"] = requested
    return requested


def extension(with_cuda):
    """The extension, with or without its CUDA part."""
    if not with_cuda:
        return CppExtension(
            "gradacc_kernels._C", CPU_SOURCES, extra_compile_args={"cxx": CXX_FLAGS}
        )
    flags = CXX_FLAGS + [
        "-DGRADACC_WITH_CUDA",
        f'-DGRADACC_CUDA_ARCHITECTURES="{architecture_list()}"',
    ]
    headers = cutlass_headers()
    return CUDAExtension(
        "gradacc_kernels._C",
        CPU_SOURCES + CUDA_SOURCES,
        include_dirs=[headers] if headers else [],
        libraries=["cublasLt"],
        extra_compile_args={"cxx": flags, "nvcc": NVCC_FLAGS},
    )


class Build(BuildExtension):
    """Falls back from CUDA to CPU, and from CPU to pure Python, where that is allowed."""

    def run(self):
        """Builds what can be built."""
        cuda = os.environ.get("GRADACC_CUDA", "auto")
        reason = why_no_cuda()
        if reason is not None and cuda == "1":
            sys.exit(f"gradacc_kernels: GRADACC_CUDA=1, but {reason}")
        if reason is None:
            if self.build(extension(with_cuda=True), required=cuda == "1"):
                return
            reason = "its build failed, see above"
        if self.build(extension(with_cuda=False), required=os.environ.get("GRADACC_NO_EXT") == "0"):
            say(f"built without CUDA kernels: {reason}.")
        else:
            say("THE EXTENSION WAS NOT BUILT. The package works in pure Python, slower.")

    def build(self, candidate, required):
        """Builds one extension; False when that failed and is not required."""
        vars(self.extensions[0]).update(vars(candidate))
        try:
            super().run()
        except Exception as error:
            if required:
                raise
            say(f"building the extension failed: {error}")
            self.extensions = []
            return False
        return True


if os.environ.get("GRADACC_NO_EXT") == "1":
    setup()
else:
    setup(ext_modules=[extension(with_cuda=False)], cmdclass={"build_ext": Build})
