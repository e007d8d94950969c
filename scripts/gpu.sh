#!/usr/bin/env bash
# gpu.sh OUT PART...: what a machine with a GPU is needed for. Results go to the folder OUT.
#
#   tests        the tests marked gpu, and tests/gpu_record.json
#   accumulate   the elementwise kernels            training     a micro-batch in CUDA graphs
#   multi_tensor   the same on lists of tensors
#   wgrad        weight gradients, embeddings       eager        training loops, and their memory
#   close        closing a window                   memory       bytes a parameter
#   hook         what a hook costs the host          queue        adding at once or waiting
#   master_params  training with float32 masters     counters     what bounds the elementwise kernels
#   ranks        windows on all GPUs, against DDP and FSDP2
#   monitor      what it costs to look              loops        loops of libraries, integrated or not
#
# Builds the extension in place first, for the GPU that is there, unless one lies there already.
# Exits with 1 when a part failed; the others run all the same.
# Where the repository is not that of the sources, GRADACC_COMMIT names their commit.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=$1
shift
mkdir -p "$out"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1

if ! compgen -G 'gradacc_kernels/_C*.so' > /dev/null; then
  TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0} GRADACC_CUDA=1 \
    "$python" setup.py -q build_ext --inplace
fi
"$python" -m gradacc_kernels

status=0
benchmark() {
  local name=$1
  shift
  "$python" "$@" --json "$out/$name.json" > "$out/$name.txt" 2> "$out/$name.log" ||
    { status=1; echo "$name failed:"; tail -n 30 "$out/$name.log"; }
}
for part in "$@"; do
  echo "== $part"
  case $part in
    tests)
      "$python" tests/gpu_record.py --write > "$out/tests.log" 2>&1 || status=1
      cp tests/gpu_record.json "$out"
      grep -E '^(FAILED|ERROR)' "$out/tests.log" || true
      tail -n 1 "$out/tests.log"
      ;;
    accumulate) benchmark accumulate benchmarks/bench_accumulate.py ;;
    multi_tensor) benchmark multi_tensor benchmarks/bench_multi_tensor.py ;;
    training) benchmark training benchmarks/bench_training.py ;;
    wgrad) benchmark wgrad benchmarks/bench_wgrad.py ;;
    hook) benchmark hook benchmarks/bench_hook.py ;;
    queue) benchmark queue benchmarks/bench_queue.py ;;
    counters) benchmark counters benchmarks/counters.py ;;
    close) benchmark close benchmarks/bench_close.py ;;
    memory) benchmark memory benchmarks/bench_memory.py ;;
    master_params) benchmark master_params benchmarks/bench_master_params.py ;;
    ranks)
      benchmark ranks -m torch.distributed.run --nproc_per_node=gpu benchmarks/bench_ranks.py
      ;;
    monitor) benchmark monitor benchmarks/bench_monitor.py ;;
    loops) benchmark loops benchmarks/bench_loops.py ;;
    eager) benchmark eager benchmarks/bench_training.py --eager ;;
    *)
      echo "gpu.sh: unknown part $part" >&2
      exit 2
      ;;
  esac
  [ ! -f "$out/$part.txt" ] || cat "$out/$part.txt"
done
exit $status
