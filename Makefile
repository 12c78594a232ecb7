# Two commands for everybody: `make run` and `make test`. The rest is for those who work on it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install run test bench lint format chaos clean

install: $(VENV)/.installed

# One stamp for all groups: pip is asked once, and again only when pyproject.toml changes.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --editable ".[sqlite,postgresql,mysql,redis,web,top,otel]"
	touch $@

$(VENV)/.tests: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --group test
	touch $@

$(VENV)/.lint: $(VENV)/.tests
	$(BIN)/python -m pip install --quiet --group lint
	touch $@

$(VENV)/.bench: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --group bench
	touch $@

run: install
	$(BIN)/supervisor start -c conf/dev.toml

test: $(VENV)/.tests
	$(BIN)/python -m pytest $(or $(PYTEST),-n 3)

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.bench
	$(BIN)/python -m bench

chaos: $(VENV)/.tests
	$(BIN)/python -m tests.chaos.nemesis --seconds $(or $(SECONDS),60) $(if $(SEED),--seed $(SEED)) --pool $(or $(POOL),sqlite)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist build
