# Two commands for a fresh machine: `make demo` and `make test`. Both make .venv first; constraints.txt pins what CI proved.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
OLDEST ?= python3.10
NEWEST ?= python3.13
CORE   := tests/test_layers.py $(patsubst %,tests/%,calibrate checkpoint/test_folder.py data pipeline report/test_report.py \
          settings $(patsubst %,prune/test_%.py,patterns solvers linalg))

.PHONY: demo test check core pythons bench soak clean

$(STAMP): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[eval,gguf,dev]'
	touch $@

demo: $(STAMP)   ## prune the built-in model: three methods, two patterns, a table
	$(BIN)/python -m oneshot.run

test: $(STAMP)   ## the whole suite, two files at a time
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: $(STAMP)  ## ruff, then the suite
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n 2 --dist loadfile

core: $(STAMP)   ## the part of the suite that needs little time
	$(BIN)/python -m pytest -n 2 --dist loadfile $(CORE)

pythons:         ## the core on the oldest and the newest Python, each in an environment of its own (3 to 6 GB)
	$(MAKE) core PYTHON=$(OLDEST) VENV=build/oldest
	$(MAKE) core PYTHON=$(NEWEST) VENV=build/newest

bench: $(STAMP)  ## this program against the published way, on this machine
	$(BIN)/python scripts/bench/prune.py

soak: $(STAMP)   ## hundreds of kills, pairs of processes, bit flips and mutations; an hour, continues where it was
	$(BIN)/python tests/soak.py --page results/soak.md

clean:
	rm -rf $(VENV) build runs *.egg-info
