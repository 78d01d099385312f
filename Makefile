# Three commands for a fresh machine: `make demo`, `make smollm2` and `make test`. All make .venv first; constraints.txt pins what CI proved.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
OLDEST ?= python3.10
NEWEST ?= python3.13
CORE   := tests/test_layers.py $(patsubst %,tests/%,calibrate checkpoint/test_folder.py data pipeline report/test_record.py report/test_tables.py \
          settings $(patsubst %,prune/test_%.py,patterns solvers linalg))

.PHONY: demo smollm2 test check core pythons bench soak clean

$(STAMP): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[eval,heal,gguf,compressed,dev]'
	touch $@

demo: $(STAMP)   ## prune the built-in model: three methods, two patterns, a table
	$(BIN)/python -m oneshot.run

smollm2: $(STAMP) ## the same with a real model of 135M parameters (fetched once, 92 MB), and what each version of it says
	$(BIN)/python -m oneshot.run --model smollm2 --pattern 2:4 --method magnitude,wanda,sparsegpt --no-layer-errors \
	  --nsamples 32 --seqlen 512 --evaluate builtin:prose --results runs/smollm2 --say "What is the capital of France?" \
	  --say "Why is the sky blue?" --say "Write the first sentence of a story about a lighthouse."

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

soak: $(STAMP)   ## hundreds of kills, pairs of processes, bit flips and mutations; a quarter of an hour, continues where it was
	$(BIN)/python tests/soak.py --page results/soak.md

clean:
	rm -rf $(VENV) build runs *.egg-info
