# Every target creates the virtual environment by itself. `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-tiny test lint bench docs

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt oracles.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "safeopt needs Python 3.10 or newer: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps --requirement oracles.txt
	touch $@

setup: $(READY) ## create the virtual environment with the tested versions

demo: $(READY) ## a real model loses its refusals under AdamW and keeps them under ours (out/demo)
	$(BIN)/python -m benchmarks demo --out out/demo

demo-tiny: $(READY) ## the same on a small transformer trained from scratch, within a minute
	$(BIN)/python -m benchmarks demo --tiny --out out/demo-tiny

test: $(READY) ## all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(READY) ## ruff (style, docstrings) and mypy (strict)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY) ## one benchmark run: make bench CONFIG=benchmarks/configs/demo.yaml OUT=out/bench
	$(BIN)/python -m benchmarks run $(or $(CONFIG),benchmarks/configs/demo.yaml) --out $(or $(OUT),out/bench)

docs: $(READY) ## the documentation site, links checked (out/site)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
