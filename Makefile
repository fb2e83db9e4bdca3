# Everything works in .venv and can be run again at any time.
SHELL := /bin/bash
PYTHON ?= python3
TORCH ?= torch==2.13.0
PIP := .venv/bin/pip --disable-pip-version-check --quiet
export OMP_NUM_THREADS ?= 1
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1

.PHONY: help install demo test check fuzz wire fmt bench clean
.DEFAULT_GOAL := help

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' Makefile

install: .venv/.dev ## Install the library with all extras and the developers' tools into .venv

demo: .venv/.base ## Simulate a small federation on phantoms: tables on the screen, pictures in runs/demo
	.venv/bin/fedseg simulate simulations/demo.toml --output runs/demo --overwrite

# one worker more than cores: a third of the time is spent waiting for other processes
test: .venv/.dev ## Install, then run all tests
	.venv/bin/pytest -n 3 --dist loadfile --no-loadscope-reorder

check: .venv/.dev ## Lint, types, import contracts
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

FUZZ_SECONDS ?= 30
fuzz: .venv/.dev ## Search each decoder for FUZZ_SECONDS for input that it does not survive (atheris, Linux)
	@.venv/bin/python -c 'import atheris' 2>/dev/null || $(PIP) install -c constraints.txt -e '.[fuzz]'
	@mkdir -p runs/fuzz
	@for name in $$(.venv/bin/python -c 'from tests.fuzz.decoders import DECODERS; print(*DECODERS)'); do \
		echo "== $$name"; .venv/bin/python -m tests.fuzz.guided $$name $(FUZZ_SECONDS) runs/fuzz 2>&1 | tee runs/fuzz/$$name.log \
		| grep -a '^Done\|^ERROR\|Uncaught' ; [ $${PIPESTATUS[0]} = 0 ] || exit 1; done

wire: .venv/.dev ## Write the code that is generated from site.proto
	.venv/bin/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. fedseg/site/wire/site.proto

fmt: .venv/.dev ## Format the code
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

bench: .venv/.dev ## Run every benchmark; each prints ratios measured side by side
	@for bench in benchmarks/*/bench.py; do echo "== $$bench"; .venv/bin/python $$bench || exit 1; done

clean: ## Remove .venv and caches; results in runs/ stay
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache dist build

# torch first and by itself: a range, or another package's wish, could fetch a build of several gigabytes.
# TORCH='torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu' takes the small CPU build.
.venv/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fedseg needs Python 3.11 or later; PYTHON=... chooses one")'
	@echo "installing torch into .venv (once)"
	@$(PYTHON) -m venv .venv
	@$(PIP) install $(TORCH)
	@touch $@

.venv/.base: .venv/.torch pyproject.toml constraints.txt
	@echo "installing fedseg into .venv"
	@$(PIP) install -c constraints.txt -e .
	@touch $@

.venv/.dev: .venv/.torch pyproject.toml constraints.txt
	@echo "installing fedseg, its extras and the developers' tools into .venv"
	@$(PIP) install -c constraints.txt -e '.[dev,onnx,ray]'
	@touch $@ .venv/.base
