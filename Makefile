# `make demo` and `make test` set everything up themselves; see scripts/setup.sh for MOMO_VENV.
MOMO_VENV ?= $(CURDIR)/.venv
export MOMO_VENV
BIN := $(MOMO_VENV)/bin

.PHONY: demo test check bench clean setup

setup:
	@scripts/setup.sh

demo: setup
	$(BIN)/momo demo $(ARGS)

test: setup
	$(BIN)/python -m pytest $(ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PATH="$(BIN):$$PATH" scripts/typecheck.sh

bench: setup
	for script in $$(ls scripts/bench/*.py | grep -v /gpu); do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf demo build .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
