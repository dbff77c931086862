# Needs Python >= 3.11 and make; everything else is installed into .venv from the locked requirements.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
export PIP_REQUIRE_VIRTUALENV = 1
# Containers often set it; then each of the hundreds of processes that tests start compiles the whole gateway.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup run test test-deploy test-full coverage transport full mutation lint types layers unit bench soak promises promises-check schema dashboards lock clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 18

# The stamps are made anew when what they were made from changes.
$(VENV)/.run: requirements/run.txt requirements/build.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is %d.%d; try make PYTHON=python3.12" % sys.version_info[:2])'
	@test -x $(BIN)/python || { echo "Setting up $(VENV) (once)"; $(PYTHON) -m venv $(VENV); }
	@$(PIP) install --require-hashes -r requirements/run.txt -r requirements/build.txt
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.test: $(VENV)/.run requirements/test.txt
	@echo "Setting up the test tools (once)"
	@$(PIP) install --no-compile --require-hashes -r requirements/test.txt
	@touch $@

setup: $(VENV)/.test  ## Install everything into .venv

run: $(VENV)/.run  ## Start the gateway; pass options as ARGS='--port 9000'
	@$(BIN)/xenios serve --show-key $(ARGS)

test: lint types layers unit  ## Lint, types, layer rules and all tests (under 10 minutes)

lint: $(VENV)/.test
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .

types: $(VENV)/.test
	@$(BIN)/mypy

layers: $(VENV)/.test
	@$(BIN)/lint-imports --no-logo

unit: $(VENV)/.test
	@$(BIN)/python -m pytest -m "not full and not deploy" -n 2 --dist loadfile

test-deploy: $(VENV)/.test  ## Build the image, run what deploy/ describes (as root, on Debian)
	@$(BIN)/python -m pytest -m deploy tests/deploy

test-full: lint types layers coverage transport full test-deploy promises-check mutation  ## What takes longer too (about 100 minutes)

# Processes that tests start are measured too.
coverage: $(VENV)/.test  ## All tests under coverage: at least 90 % of the branches
	@$(BIN)/coverage erase
	@$(BIN)/coverage run -m pytest -m "not full and not deploy" -n 2 --dist loadfile --hypothesis-profile=new
	@$(BIN)/coverage combine --quiet
	@$(BIN)/coverage report --fail-under=90
	@$(BIN)/coverage json --quiet -o - | $(BIN)/python -m tests.branches 90

transport: $(VENV)/.test  ## The tests that reach upstreams, on aiohttp's client
	@XENIOS_TEST_TRANSPORT=aiohttp $(BIN)/python -m pytest -m "not full and not deploy" -n 2 --dist loadfile \
		tests/faults tests/contract tests/clients tests/integration tests/transport

full: $(VENV)/.test  ## The tests that take minutes: many streams at once, a hammering
	@$(BIN)/python -m pytest -m full --hypothesis-profile=new

mutation: $(VENV)/.test  ## Change the core's logic in 1,900 places and see unit tests fail
	@$(BIN)/python -m tests.mutation

bench: $(VENV)/.test  ## Measure against a bare aiohttp proxy (12 minutes); options as ARGS='--quick'
	@$(BIN)/python -m tests.benchmarks.bench $(ARGS)

soak: $(VENV)/.test  ## A million mixed requests: does memory grow? (15 minutes or more); options as ARGS='--minutes 10'
	@$(BIN)/python -m tests.soak $(ARGS)

promises: $(VENV)/.test  ## Which promises are proven, by which test
	@$(BIN)/python -m tests.promises.report

promises-check: $(VENV)/.test  ## Break the code for each promise and see its test fail
	@$(BIN)/python -m tests.promises.check -j 2 $(ARGS)

schema: $(VENV)/.run  ## Write config/schema.json and the table of metrics anew
	@$(BIN)/xenios schema > config/schema.json
	@$(BIN)/python -m tests.integration.metrics_table

dashboards: $(VENV)/.run  ## Write the dashboards in deploy/grafana anew
	@$(BIN)/python deploy/grafana/make.py

lock: $(VENV)/.test  ## Resolve the requirements anew (needs uv)
	@uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header -q pyproject.toml -o requirements/run.txt
	@uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header -q --extra test -c requirements/run.txt pyproject.toml -o requirements/test.txt
	@uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header -q -c requirements/test.txt requirements/build.in -o requirements/build.txt
	@uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header -q requirements/deploy.in -o requirements/deploy.txt

clean:
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .coverage* mutants
