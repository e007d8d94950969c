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

missing=$("$venv/bin/python" - <<'PY'
from importlib.metadata import PackageNotFoundError, version

needed = {"setuptools": 77, "wheel": 0, "ninja": 0, "pybind11": 0, "numpy": 0, "triton": 0,
          "pytest": 0, "hypothesis": 0, "matplotlib": 0, "rich": 0}
for name, least in needed.items():
    try:
        if int(version(name).split(".")[0]) < least:
            print(f"{name}>={least}")
    except PackageNotFoundError:
        print(name)
PY
)
[ -z "$missing" ] || "$venv/bin/python" -m pip install -q $missing
