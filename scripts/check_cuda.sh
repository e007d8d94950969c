#!/usr/bin/env bash
# Assembles every .cu file for each supported architecture, failing on an error, a warning or a
# register spill; then builds the whole CUDA extension against a CUDA build of torch, in a virtual
# environment of its own, and imports it. Needs nvcc 13 and no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
venv=.venv-cuda
architectures="80 90 100 120"

nvcc=$(command -v nvcc || ls /usr/local/cuda*/bin/nvcc 2> /dev/null | tail -n 1 || true)
if [ -z "$nvcc" ]; then
  echo "check-cuda: nvcc was not found; nothing was checked" >&2
  exit 1
fi

if [ ! -e $venv/torch ]; then
  "$python" -m venv --clear $venv
  $venv/bin/python -m pip install -q torch==2.11.0 numpy ninja 'setuptools>=77' wheel pybind11
  # Headers alone are needed of it.
  $venv/bin/python -m pip install -q --no-deps nvidia-cutlass==4.2.0.0
  touch $venv/torch
fi
packages=$($venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# assemble FILE ARCHITECTURE [nvcc's options]
assemble() {
  local file=$1 architecture=$2
  shift 2
  "$nvcc" -std=c++17 -O3 -DNDEBUG --expt-relaxed-constexpr -arch="sm_$architecture" \
    -Xptxas -v,-warn-spills "$@" -cubin -o "$scratch/kernel.cubin" "$file" 2> "$scratch/log" ||
    { cat "$scratch/log"; exit 1; }
  if grep -E '[1-9][0-9]* bytes spill' "$scratch/log"; then
    echo "check-cuda: $file spills registers on sm_$architecture" >&2
    exit 1
  fi
  echo "assembled $file for sm_$architecture: $(grep -c 'Used .* registers' "$scratch/log")" \
    "kernels, at most $(grep -oE 'Used [0-9]+ registers' "$scratch/log" | sort -k2n | tail -n 1 |
      cut -d' ' -f2) registers, no spills"
}
for file in csrc/cuda/*.cu; do
  if grep -nE '#include [<"](torch|ATen|c10)/' "$file" csrc/cuda/*.cuh csrc/kernels.h; then
    echo "check-cuda: $file must not include torch, ATen or c10" >&2
    exit 1
  fi
  for architecture in $architectures; do
    assemble "$file" "$architecture" -Werror all-warnings
  done
done
# The same file with its kernels, which need CUTLASS and that one target.
assemble csrc/cuda/wgrad_cutlass.cu 90a -isystem "$packages/cutlass_library/source/include"

# torch's wheels bring the CUDA libraries and headers that a bare compiler lacks, without the
# names that the linker looks for.
mkdir "$scratch/lib"
for library in "$packages"/nvidia/cu13/lib/*.so.*; do
  ln -s "$library" "$scratch/lib/$(basename "$library" | sed 's/\.so\..*/.so/')" 2> /dev/null || true
done
export CPATH=$packages/nvidia/cu13/include LIBRARY_PATH=$scratch/lib
# nvcc on the PATH may be a script beside no toolkit.
for CUDA_HOME in "$(dirname "$(dirname "$(readlink -f "$nvcc")")")" /usr/local/cuda*; do
  [ ! -e "$CUDA_HOME/include/crt/host_config.h" ] || break
done
export CUDA_HOME PATH=$PWD/$venv/bin:$PATH

cp -r setup.py pyproject.toml README.md csrc gradacc_kernels "$scratch"
cd "$scratch"
rm -f gradacc_kernels/*.so
GRADACC_CUDA=1 TORCH_CUDA_ARCH_LIST="9.0" python setup.py -q build_ext --inplace > build.log 2>&1 ||
  { cat build.log; exit 1; }
python -c '
import torch
from gradacc_kernels import _C
assert _C.HAS_CUDA
print(f"built and imported the CUDA extension: torch {torch.__version__}, {_C.CUDA_ARCHITECTURES}")'
