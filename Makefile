# Usage: `make help`.
PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=

bin   := $(VENV)/bin
stamp := $(VENV)/.svdalign-installed

.DEFAULT_GOAL := help
.PHONY: help compare test quick docs lint

help:  ## show this text
	@echo 'make TARGET [VENV=.venv] [PYTHON=python3] [ARGS="..."]'
	@echo
	@sed -n 's/^\([a-z]*\):.*  ## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST)
	@echo
	@echo 'compare and test first make the virtual environment VENV, with the versions'
	@echo 'of constraints.txt, if it is missing or out of date. ARGS goes to svdalign'
	@echo 'compare, or to pytest: make compare ARGS="--epochs 2", make test ARGS="-k data".'

compare: $(stamp)  ## BP, SVD-BP, DFA and SSA side by side on the embedded images; table and page
	$(bin)/svdalign compare --config benchmarks/configs/compare.yaml $(ARGS)

test: lint  ## lint, format check, type check, tests
	$(bin)/pytest -n 2 --dist worksteal $(ARGS)

quick: lint  ## the same without the tests that take longer than a few seconds
	$(bin)/pytest -n 2 --dist worksteal -m 'not slow' $(ARGS)

docs: $(stamp)  ## build the documentation into site/; a warning is an error
	$(bin)/mkdocs build --strict --quiet $(ARGS)

lint: $(stamp)
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy --strict src

# --no-compile: thousands of modules are never imported; without compiling them it takes half the time.
$(stamp): pyproject.toml constraints.txt
	@echo 'Setting up $(VENV): a minute or two'
	$(PYTHON) -m venv $(VENV)
	$(bin)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	@touch $@
