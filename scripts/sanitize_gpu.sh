#!/usr/bin/env bash
# sanitize_gpu.sh OUT [SECONDS]: compute-sanitizer's tools over every CUDA kernel of the package
# (sanitize_gpu.py), all at once, each for SECONDS at the most (300). Logs and a table,
# sanitizers.txt, go to the folder OUT.
# memcheck: reads and writes outside of allocations. racecheck: hazards in shared memory. initcheck:
# reads of device memory that nothing wrote. synccheck: wrong barriers.
# Exits with 1 when a tool found an error or did not finish, or a result was wrong under it.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=$1
seconds=${2:-300}
mkdir -p "$out"
export PYTHONPATH=$PWD

# Every allocation of its own, so that a read behind its end is one outside of any.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1

check() {
  local tool=$1 part=$2 start=$SECONDS status=0
  local name=$tool.$part
  timeout "$seconds" compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 20 \
    --log-file "$out/$name.log" "$python" scripts/sanitize_gpu.py "$part" \
    > "$out/$name.txt" 2>&1 || status=$?
  echo "$name: exit $status, $((SECONDS - start)) s, $(tail -n 1 "$out/$name.txt")," \
    "$(grep -h 'SUMMARY' "$out/$name.log" | tail -n 1)" > "$out/$name.result"
  return "$status"
}

pids=()
for tool in memcheck racecheck initcheck synccheck; do
  for part in elementwise weight_gradients embeddings; do
    check "$tool" "$part" & pids+=($!)
  done
done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=1; done
cat "$out"/*.result | tee "$out/sanitizers.txt"
rm -f "$out"/*.result
exit $status
