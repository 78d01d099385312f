# Two commands for a fresh machine: `make demo` and `make test`. Both make .venv first; constraints.txt pins what CI proved.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test check bench clean

$(STAMP): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[eval,dev]'
	touch $@

demo: $(STAMP)   ## prune the built-in model: three methods, two patterns, a table
	$(BIN)/python -m oneshot.run

test: $(STAMP)   ## the whole suite, two files at a time
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: $(STAMP)  ## ruff, then the suite
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n 2 --dist loadfile

bench: $(STAMP)  ## this program against the published way, on this machine
	$(BIN)/python scripts/bench_prune.py

clean:
	rm -rf $(VENV) build runs *.egg-info
