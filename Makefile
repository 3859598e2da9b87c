# Two commands matter: `make run` and `make test`. Each sets up .venv itself; Python >= 3.11 is enough.
PYTHON ?= python3
ROUNDS ?= 8
RECIPE ?= shapes
BIN := .venv/bin
GO_BIN := .cache/bin

.PHONY: run test check lint types lock clean s3server
.DEFAULT_GOAL := help

help:
	@echo "make run    eight rounds of self-improvement on this machine   (ROUNDS=8 RECIPE=shapes)"
	@echo "make test   unit and integration tests"
	@echo "make check  lint, types and tests: what CI runs"
	@echo "make lock   pin the requirements again"

run: .venv/.run
	$(BIN)/python -m rsi_jobs.controller --rounds $(ROUNDS) --recipe $(RECIPE)

test: .venv/.dev s3server
	$(BIN)/python -m pytest tests

check: lint types test

lint: .venv/.dev
	$(BIN)/ruff check rsi_jobs tests benchmarks
	$(BIN)/ruff format --check rsi_jobs tests benchmarks

types: .venv/.dev
	$(BIN)/mypy rsi_jobs

# The S3 tests run against versitygw where Go is there to build it, and against moto's server elsewhere.
s3server: .venv/.dev
	@if command -v go >/dev/null; then $(BIN)/python -m tests.s3server --install; \
	 else echo "Go is not here: the S3 tests use moto's server instead of versitygw"; fi

.venv/bin/uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	 { echo "rsi-jobs needs Python >= 3.11, $(PYTHON) is $$($(PYTHON) --version): set PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.9

.venv/.run: requirements/local.txt pyproject.toml | .venv/bin/uv
	$(BIN)/uv pip install --quiet --require-hashes -r requirements/local.txt
	$(BIN)/uv pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

.venv/.dev: requirements/dev.txt .venv/.run
	$(BIN)/uv pip install --quiet --require-hashes -r requirements/dev.txt
	@touch $@

lock: .venv/bin/uv
	UV_CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/uv pip compile --quiet --upgrade pyproject.toml \
	 requirements/local.in --extra stages --universal --python-version 3.11 --generate-hashes \
	 --output-file requirements/local.txt
	UV_CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/uv pip compile --quiet --upgrade pyproject.toml \
	 requirements/dev.in --extra stages --universal --python-version 3.11 --generate-hashes \
	 --constraint requirements/local.txt --output-file requirements/dev.txt

clean:
	rm -rf .venv .cache build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
