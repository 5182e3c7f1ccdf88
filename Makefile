# Every verb sets up what it needs first, in .venv, and is quick when nothing changed (scripts/install.py).
#
#   VARIANT=cpu|cuda    which build of vLLM; by default CUDA where nvidia-smi lists a GPU
#   PYTHON=python3.12   the interpreter that .venv is made from, 3.11 or newer
#   ARGS="..."          further arguments for what the verb runs (bench: for the kernels' benchmarks)
#   BENCH_ARGS="..."    of `hydraserve bench`, for example BENCH_ARGS="--reference --repeats 5"

PYTHON ?= python3
VARIANT ?= auto
MODEL ?= demo
ADAPTERS ?= $(patsubst %/,%,$(wildcard examples/adapters/*/))
ARGS ?=
# Without compilation the demo answers after half a minute: it is to be looked at, not measured. 1 GiB holds 46,000
# tokens; by default vLLM asks a CPU for 92% of the memory, which a machine in use does not have free.
DEMO_ARGS := $(if $(filter demo,$(MODEL)),--enforce-eager --kv-cache-memory-bytes 1073741824)
BENCH_ARGS ?=
# Of tests: one starts engines, the others run what needs none. 0 for all in this process, one after the other.
PROCESSES ?= 2

BIN := .venv/bin
INSTALL = @$(PYTHON) scripts/install.py --variant $(VARIANT)
# Which kernels there are to measure depends on the device; their machine code is the same everywhere.
DEVICE = $$($(BIN)/python -c 'import torch; print("gpu" if torch.cuda.is_available() else "cpu")')
BENCHMARKS ?= kernels/benchmarks/bench_compile.py kernels/benchmarks/bench_$(DEVICE).py

.PHONY: help serve test lint check bench
.DEFAULT_GOAL := help

help:
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

serve: ## serve MODEL (demo: an embedded small model) with ADAPTERS (default: examples/adapters/*)
	$(INSTALL) serve
	@exec $(BIN)/hydraserve --model $(MODEL) $(addprefix --adapter ,$(ADAPTERS)) $(DEMO_ARGS) $(ARGS)

test: ## all tests; ARGS goes to pytest, for example ARGS="tests/adapters -x"
	$(INSTALL) dev
	$(BIN)/python -m pytest -n $(PROCESSES) $(ARGS)

lint: ## ruff, mypy, the layer contracts, and what is in deploy/
	$(INSTALL) dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/python scripts/check_deploy.py

check: lint test ## lint, then test: what a change has to pass

bench: ## the kernels' benchmarks, then MODEL end to end; results in kernels/benchmarks/results and build/bench.json
	$(INSTALL) dev
	@set -e; for file in $(BENCHMARKS); do echo "== $$file"; $(BIN)/python "$$file" $(ARGS); done
	$(BIN)/hydraserve bench --model $(MODEL) --output build/bench.json --plot build/bench.png $(BENCH_ARGS)
