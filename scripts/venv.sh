#!/usr/bin/env bash
# venv.sh PYTHON VENV: a virtual environment that sees the torch of PYTHON if it has one, and gets
# the CPU build otherwise; with what building, testing and the examples need, fetched where missing.
set -euo pipefail
python=$1
venv=$2
cpu_torch=torch==2.13.0

if ! command -v c++ > /dev/null && command -v apt-get > /dev/null && [ "$(id -u)" = 0 ]; then
  apt-get update -qq && apt-get install -qq -y g++ || true
fi
command -v c++ > /dev/null || echo "no C++ compiler: the package will be pure Python" >&2

"$python" -m venv --clear "$venv"
if "$python" -c 'import torch' 2> /dev/null; then
  # A .pth file and not --system-site-packages: PYTHON may be a virtual environment itself.
  "$python" -c 'import sys; print(*(p for p in sys.path if "-packages" in p), sep="\n")' \
    > "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch.pth"
else
  "$venv/bin/python" -m pip install -q "$cpu_torch"
fi

# missing NAME[>=MAJOR]...: prints those that are not installed.
missing() {
  "$venv/bin/python" - "$@" <<'PY'
import sys
from importlib.metadata import PackageNotFoundError, version

for wanted in sys.argv[1:]:
    name, _, least = wanted.partition(">=")
    try:
        if int(version(name).split(".")[0]) < int(least or 0):
            print(wanted)
    except PackageNotFoundError:
        print(wanted)
PY
}

needed=$(missing "setuptools>=77" wheel ninja pybind11 numpy triton pytest hypothesis matplotlib rich)
[ -z "$needed" ] || "$venv/bin/python" -m pip install -q $needed

# The libraries whose training loops and optimizers are tested. timm needs torchvision, of which the
# newest would bring another torch.
loops=$(missing transformers accelerate peft lightning timm schedulefree torchao)
if [ -n "$loops" ]; then
  "$venv/bin/python" -c 'from importlib.metadata import version; print("torch==" + version("torch"))' \
    > "$venv/constraints.txt"
  "$venv/bin/python" -m pip install -q -c "$venv/constraints.txt" $loops ||
    echo "not installed, so what is of them is not tested:" $loops >&2
fi
