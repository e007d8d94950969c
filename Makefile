# make demo   trains a language model three ways        make test     the test suite
# make bench  the kernel benchmark of this machine      make gpu      the GPU tests, and their record
# make lint   style, generated tables, GPU record       make format   rewrites the sources in style
# make check-cuda   assembles every kernel, builds the CUDA extension; needs nvcc and no GPU
# make docs         the documentation site, to build/docs/index.html; broken links fail
# make sanitize     the C++ of the CPU under AddressSanitizer and UndefinedBehaviorSanitizer

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
STYLED := gradacc_kernels tests benchmarks examples scripts setup.py
CXX_STYLED := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.inc')

.PHONY: demo test bench gpu lint format docs check-cuda sanitize clean

demo: $(VENV)/installed
	$(BIN)/python examples/train_lm.py

test: $(VENV)/installed
	$(BIN)/python -m pytest -q

bench: $(VENV)/installed
	$(BIN)/python benchmarks/bench_accumulate.py

gpu: $(VENV)/installed
	$(BIN)/python tests/gpu_record.py --write

lint: $(VENV)/linters
	$(BIN)/ruff check $(STYLED)
	$(BIN)/ruff format --check $(STYLED)
	$(BIN)/clang-format --dry-run --Werror $(CXX_STYLED)
	$(BIN)/python benchmarks/render.py --check
	$(BIN)/python tests/gpu_record.py --check || true

format: $(VENV)/linters
	$(BIN)/ruff check --fix $(STYLED)
	$(BIN)/ruff format $(STYLED)
	$(BIN)/clang-format -i $(CXX_STYLED)

# Not --quiet, which hides warnings from --strict too.
docs: $(VENV)/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

check-cuda:
	PYTHON=$(PYTHON) bash scripts/check_cuda.sh

sanitize: $(VENV)/torch
	PYTHON=$(BIN)/python bash scripts/sanitize_cpu.sh

# The package, built in place against the torch that the venv sees.
$(VENV)/installed: $(VENV)/torch $(SOURCES)
	$(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
	touch $@

$(VENV)/torch: scripts/venv.sh
	bash scripts/venv.sh $(PYTHON) $(VENV)
	touch $@

$(VENV)/linters: $(VENV)/torch
	$(BIN)/python -m pip install -q ruff==0.17.6 clang-format==23.1.5
	touch $@

# ruff, of the linters, formats the signatures of the reference.
$(VENV)/site: $(VENV)/linters
	$(BIN)/python -m pip install -q mkdocs==1.6.1 mkdocs-material==9.8.2 mkdocstrings==1.0.8 \
		mkdocstrings-python==2.0.11
	touch $@

clean:
	rm -rf build $(VENV) .venv-cuda *.egg-info gradacc_kernels/*.so out
