# Everything happens in .venv, which is made on first use and kept while pyproject.toml and constraints.txt stay the same.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL = $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

.PHONY: demo test lint docs clean

demo: $(VENV)/demo.installed
	$(BIN)/gpusq demo --out demo

test: $(VENV)/dev.installed
	$(BIN)/python -m pytest --cov --cov-report=term --numprocesses auto --dist loadfile

lint: $(VENV)/dev.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/dev.installed
	$(BIN)/python -m deploy.reference > docs/cli.md.new
	mv docs/cli.md.new docs/cli.md

clean:
	rm -rf $(VENV) demo .coverage .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache

$(VENV)/demo.installed: pyproject.toml constraints.txt
	@echo "Installing into $(VENV); the first time takes minutes."
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) '.[export,cpu,rtx]'
	touch $@

$(VENV)/dev.installed: $(VENV)/demo.installed tests/without-dependencies.txt
	$(INSTALL) '.[export,cpu,rtx,timm,torchvision,hf,ultralytics,torchao,brevitas,sign,sbom,parquet,dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --requirement tests/without-dependencies.txt
	touch $@
