# ScheduleZero. `make help` lists the targets.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
# The one list of dependencies is the header of schedulezero.py.
DEPENDENCIES = $$(sed -n 's/^\#   "\(.*\)",$$/\1/p' schedulezero.py)
# With what newer Pythons need not, for the older; pyzmq is no pure Python.
BUNDLED = $$(sed -n '/pyzmq/d; s/^\#   "\(.*\)",$$/\1/p' schedulezero.py) typing_extensions
TOOLS := pytest pytest-xdist pytest-rerunfailures hypothesis ruff mypy types-PyYAML cronsim croniter playwright websockets schemathesis

.PHONY: help run test lint torture bench dist clean

help:  ## Show what can be made
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1|\2/p' Makefile | column -t -s '|'

run: .venv/run  ## Set up, then run the clock deployment in the foreground (Ctrl-C ends it)
	exec $(BIN)/python -m schedulezero --deployment clock run

test: .venv/test lint  ## Set up, then run every test
	$(BIN)/python -m pytest -c tests/pytest.ini $(ARGS)
	node --test tests/web/*.test.mjs

lint: .venv/test  ## Check style and types
	$(BIN)/ruff check --config tests/ruff.toml . && $(BIN)/ruff format --check --config tests/ruff.toml .
	$(BIN)/mypy --config-file tests/mypy.ini

torture: .venv/test  ## Kill everything at random under load and check every promise (ARGS="--minutes 10")
	$(BIN)/python tests/torture/torture.py $(ARGS)

bench: .venv/test  ## Measure the figures of the README on this machine
	$(BIN)/python tests/bench/bench.py $(ARGS)

dist: .venv/run  ## Make dist/schedulezero.pyz, the one file that needs only Python and pyzmq
	rm -rf dist && $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --target dist/app $(BUNDLED)
	cp -r schedulezero.py handler.py config.yaml static LICENSE dist/app && cp .ci/launcher.py dist/app/__main__.py && rm -rf dist/app/{bin,yaml/*.so,*.dist-info/RECORD}
	find dist/app -exec touch -t 198001010000 {} + -exec chmod u=rwX,go=rX {} + && $(BIN)/python -m zipfile -c dist/app.zip dist/app/. && $(BIN)/python -m zipapp dist/app.zip -p '/usr/bin/env python3' -o dist/schedulezero.pyz

clean:  ## Remove what was made, but neither data nor logs
	rm -rf .venv dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/run: schedulezero.py handler.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(DEPENDENCIES)
	$(BIN)/python -m compileall -q schedulezero.py handler.py && touch $@

.venv/test: .venv/run Makefile
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TOOLS) && touch $@
