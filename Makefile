# Two commands matter: `make demo` and `make test`. Each creates the environment it needs.
.DELETE_ON_ERROR:
.SUFFIXES:

PYTHON ?= $(firstword $(shell command -v python3.11 python3) python3.11)
BIN := .venv/bin
MONOREPO := examples/monorepo
SOURCES := $(wildcard cdc conductor tools examples benchmarks tests deploy/*.py)

.PHONY: .venv test check lint types demo bench format clean

test: check
	$(BIN)/pytest

check: lint types
	$(BIN)/pytest -q tests/unit/test_budgets.py tests/unit/test_layers.py

lint: .venv
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: .venv
	$(BIN)/mypy $(SOURCES)
	MYPYPATH=$(MONOREPO)/schemas/src:$(MONOREPO)/worker/src:$(MONOREPO)/api/src \
		$(BIN)/mypy -m myapp_worker.main -m myapp_api.main
	$(BIN)/pyright
	$(BIN)/pyright --project tests/typing

demo: .venv
	KEEP=$(KEEP) $(BIN)/python -m examples.shop.demo

bench: .venv/bench
	$(BIN)/python -m benchmarks $(ARGS)

format: .venv
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean:
	rm -rf .venv .cache .bench .demo .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv: .venv/complete

.venv/complete: pyproject.toml constraints.txt
	$(PYTHON) -m tools.venv .venv
	@touch $@

.venv/bench: .venv/complete
	$(PYTHON) -m tools.venv .venv bench
	@touch $@
