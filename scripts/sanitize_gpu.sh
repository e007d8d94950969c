#!/usr/bin/env bash
# sanitize_gpu.sh OUT [SECONDS]: compute-sanitizer's tools over the tests of the CUDA kernels, all
# at once, each for SECONDS at the most (300). Logs and a table, sanitizers.txt, go to the folder OUT.
# memcheck: reads and writes outside of allocations. racecheck: hazards in shared memory. initcheck:
# reads of device memory that nothing wrote. synccheck: wrong barriers.
# Exits with 1 when a tool found an error, did not finish, or tests failed under it.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=$1
seconds=${2:-300}
mkdir -p "$out"
export PYTHONPATH=$PWD

# Every allocation of its own, so that a read behind its end is one outside of any. Graphs cannot be
# captured so: their tests are left out.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
# So is the test whose kernel is to stop at an index out of range.
selected='cuda-cuda and not captur and not replay and not out_of_range'
kernels=(tests/test_ops.py tests/test_embedding.py tests/test_wgrad.py tests/test_statistics.py)

check() {
  local tool=$1 start=$SECONDS status=0
  timeout "$seconds" compute-sanitizer --tool "$tool" --target-processes all --error-exitcode 9 \
    --log-file "$out/$tool.%p.log" \
    "$python" -m pytest -q -p no:cacheprovider -m gpu -k "$selected" -n 4 "${kernels[@]}" \
    > "$out/$tool.txt" 2>&1 || status=$?
  cat "$out/$tool".*.log > "$out/$tool.log" 2> /dev/null || true
  rm -f "$out/$tool".*.log
  local errors
  errors=$(grep -ch 'ERROR SUMMARY: [1-9]\|RACECHECK SUMMARY: [1-9]' "$out/$tool.log" || true)
  echo "$tool: exit $status, $((SECONDS - start)) s, ${errors:-?} processes with errors, $(tail -n 1 "$out/$tool.txt")" \
    > "$out/$tool.result"
  return "$status"
}

pids=()
check memcheck & pids+=($!)
check racecheck & pids+=($!)
check initcheck & pids+=($!)
check synccheck & pids+=($!)
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=1; done
cat "$out"/*.result | tee "$out/sanitizers.txt"
rm -f "$out"/*.result
exit $status
