# make lab    set up what a reader needs, and open JupyterLab
# make test   set up the test libraries too, and run everything that CI runs
# The other targets: setup · data · notebooks · sync · bench · pretrain (an hour) · clean
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -c constraints.txt
JOBS ?= 2
# One thread a process: the notebooks run side by side, and their outputs do not depend on the cores.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: setup data lab test notebooks sync bench pretrain clean
.DELETE_ON_ERROR:

setup: .venv/.reader data
	@echo
	@echo "Ready. Next: 'make lab' opens the course in JupyterLab, 'make test' runs every check."

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, and $(PYTHON) is " + sys.version.split()[0] + ". Try: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv

.venv/.reader: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing what a reader needs; the first time takes some minutes (PyTorch is large)."
	$(PIP) -e '.[serve]'
	@touch $@

.venv/.tester: .venv/.reader
	@echo "Installing what the tests compare with."
	$(PIP) -e '.[test]'
	@touch $@

data: .venv/.reader
	$(BIN)/python -m support.data

# In a container people are root, and JupyterLab wants to be told that this is meant.
ROOT_FLAG := $(if $(filter 0,$(shell id -u 2>/dev/null)),--allow-root)

lab: setup
	$(BIN)/jupyter lab notebooks $(ROOT_FLAG) $(LAB_FLAGS)

test: .venv/.tester data
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --nbval --nbval-current-env --nbval-cell-timeout=300

notebooks: .venv/.tester data
	$(ONE_THREAD) $(BIN)/python tests/tools/execute.py $(ONLY)

sync: .venv/.tester
	$(BIN)/python tests/tools/sync.py

bench: .venv/.tester data
	$(BIN)/python tests/bench/tokenizer.py
	$(BIN)/python tests/bench/gpt.py
	$(BIN)/python tests/bench/pretrained.py
	$(BIN)/python tests/bench/shakespeare.py

pretrain: .venv/.reader
	$(BIN)/python -m support.house

clean:
	rm -rf .venv data/cache
