#!/usr/bin/env bash
# sanitize_cpu.sh [PYTEST'S OPTIONS]: the C++ of the CPU under AddressSanitizer and
# UndefinedBehaviorSanitizer, driven by the tests. The first error ends the run with its stacks;
# leaks are listed at the end.
# Works on a copy in build/sanitize, so that the extension in place stays as it is. Needs gcc.
#
# Only the extension is instrumented, so of torch's memory it sees what our code reads and writes.
# All main gradients lie in one allocation: a write from one into the next is for the tests to find.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(command -v "${PYTHON:-.venv/bin/python}")
[ "${python#/}" != "$python" ] || python=$PWD/$python
copy=$PWD/build/sanitize
cxx=${CXX:-c++}

# libstdc++ too: libasan looks for its __cxa_throw at the start, when Python has not loaded it.
preload=
for library in libasan.so libubsan.so libstdc++.so; do
  path=$("$cxx" -print-file-name=$library)
  if [ "${path#/}" = "$path" ]; then
    echo "sanitize: $cxx has no $library; nothing was checked" >&2
    exit 1
  fi
  preload+=" $path"
done

mkdir -p "$copy"
rm -rf "$copy"/{csrc,gradacc_kernels,tests}
# With their times: what did not change is not compiled again.
cp -rp setup.py pyproject.toml README.md csrc gradacc_kernels tests "$copy"
cd "$copy"
rm -f gradacc_kernels/*.so report.*
# vptr checks need the type information of torch's autograd classes, which torch does not export.
sanitize="-fsanitize=address,undefined -fno-sanitize=vptr"
# Python compiles with -fwrapv, under which a sum that overflows is no error.
flags="$sanitize -fno-sanitize-recover=undefined -fno-wrapv -fno-omit-frame-pointer -O1 -g"
GRADACC_CUDA=0 GRADACC_NO_EXT=0 GRADACC_CXX_FLAGS=$flags LDFLAGS="${LDFLAGS:-} $sanitize" \
  "$python" setup.py -q build_ext --inplace > build.log 2>&1 ||
  { tail -n 40 build.log; exit 1; }

# malloc, so that Python's objects are watched too, where our code touches them, and are no leaks.
# Abort: at that, pytest prints the Python stack. Reports go to files, for pytest captures stderr.
export PYTHONMALLOC=malloc PYTHONPATH=$copy
common=log_path=$copy/report:abort_on_error=1
export ASAN_OPTIONS=$common:exitcode=0:detect_stack_use_after_return=1:strict_init_order=1
export UBSAN_OPTIONS=$common:print_stacktrace=1
instrumented() { LD_PRELOAD=$preload "$python" "$@"; }
# Without the extension the tests would run on eager torch, and pass.
instrumented -c 'from gradacc_kernels import _C; print(_C.__file__)' ||
  { cat report.* 2> /dev/null; exit 1; }
rm -f report.*

# Left out: what starts processes or compilers, what runs no C++ of ours, and what counts memory, of
# which AddressSanitizer keeps the freed.
ignored=()
for name in compile dispatch docs leaks libraries processes python_fused real_loops reference \
  tune; do
  ignored+=("--ignore-glob=*/test_*$name*.py")
done
deselected='triton or cpu-reference or reference-cpu or new_process or free_their_sums'
status=0
instrumented -m pytest -q -p no:cacheprovider -m 'not gpu and not large' -k "not ($deselected)" \
  "${ignored[@]}" tests "$@" || status=$?
[ $status = 0 ] || cat report.* 2> /dev/null || true
# Python and its packages leave memory behind at exit. A leak is ours where its stack says so.
if cat report.* 2> /dev/null | awk -v RS= -v ORS='\n\n' '/ leak of / && /gradacc::|_C\.cpython/' |
  grep .; then
  echo "sanitize: memory leaked" >&2
  status=1
fi
exit $status
