# Every target says what it does: `make help`. CI runs the same words.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
MODEL  ?=
ARGS   ?=
BENCHMARKS := async_scheduling cold_start http_concurrency http_overhead kv_waste lora offline_vs_transformers prefix_sharing speculation static_batch_vs_continuous step_overhead

.DEFAULT_GOAL := help
.PHONY: help serve test test-slow test-clients fmt lint type bench bench-peers docs sim sanitize clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' \
		| awk -F'|' '{ printf "  make %-14s %s\n", $$1, $$2 }'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v[:2] <= (3, 13) else \
		f"{sys.executable} is Python {v[0]}.{v[1]}, Penstock needs 3.11 to 3.13: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

# Stamps: the install runs again only when what it depends on has changed.
NATIVE := CMakeLists.txt $(shell find csrc -type f)

$(VENV)/.installed: pyproject.toml constraints.txt $(NATIVE) | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt $(NATIVE) | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.installed

serve: $(VENV)/.installed ## Install, then serve the embedded model (MODEL=folder-or-hub-id, ARGS='--port 9000')
	$(BIN)/penstock serve $(MODEL) $(ARGS)

test: lint type ## Install, lint, type-check and pass every test (about 4 minutes)
	$(BIN)/python -m pytest -n 2 -m 'not slow and not node'

test-slow: $(VENV)/.installed-dev ## What make test leaves out: more shapes, families and seeds of the same tests
	$(BIN)/python -m pytest -n 2 -m slow

test-clients: $(VENV)/.installed-dev ## Tests that need Node.js: the unmodified OpenAI client for JavaScript
	npm --prefix tests/clients/node ci --no-audit --no-fund
	$(BIN)/python -m pytest -m node

fmt: $(VENV)/.installed-dev ## Format the code and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(VENV)/.installed-dev ## Check style, formatting, import arrows and function sizes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python -m tools.tidy

type: $(VENV)/.installed-dev ## Check types (strict)
	$(BIN)/mypy --strict -p penstock -p tools

bench: $(VENV)/.installed-dev ## Run the benchmarks and write benchmarks/results
	for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name --write || exit 1; done

bench-peers: $(VENV)/.installed-dev ## Install the engines to compare with (PEERS_DIR=folder, ARGS='vllm llama.cpp')
	$(BIN)/python -m tools.bench_peers $(if $(PEERS_DIR),--into $(PEERS_DIR)) $(ARGS)

docs: $(VENV)/.installed-dev ## Generate the generated pages again
	$(BIN)/python -m tools.compatibility --write
	$(BIN)/python -m tools.reference --write
	$(BIN)/python -m penstock.observe.catalogue > docs/metrics.md

sim: $(VENV)/.installed-dev ## Run the simulator over 200 seeds
	$(BIN)/python -m pytest -n 2 tests/sim

sanitize: $(VENV)/.installed-dev ## Run the kernels' tests with the compiler's sanitizers (minutes; not part of make test)
	$(BIN)/python -m tools.sanitizers address
	$(BIN)/python -m tools.sanitizers thread

clean: ## Remove what the targets made
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
