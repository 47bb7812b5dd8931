# Everything a newcomer types: make demo · make test · make lint · make bench. Needs Python >= 3.11 and make, nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# On Linux the registry's plain torch brings gigabytes of CUDA; torch's own index has it for the CPU alone.
# It is only asked if it answers; set TORCH_INDEX= (empty) never to ask, or to another index.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH := $(shell grep '^torch==' constraints.txt)
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# Workers for the tests: one a core, since each uses one thread
WORKERS ?= auto

.PHONY: install demo test lint bench clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "flyweight needs Python 3.11 or newer; set PYTHON=")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (once, some minutes)"
	@$(BIN)/python -c 'import torch' 2>/dev/null || { \
	  index=; \
	  if [ -n "$(TORCH_INDEX)" ] && $(BIN)/python -c \
	    'import sys, urllib.request as u; u.urlopen(sys.argv[1], timeout=5)' "$(TORCH_INDEX)/torch/" 2>/dev/null; \
	  then index="--extra-index-url $(TORCH_INDEX)"; fi; \
	  $(PIP) install $$index "$(TORCH)"; }
	@$(PIP) install -c constraints.txt -e '.[test,lint]'
	@touch $@

demo: install
	$(BIN)/flyweight demo

test: install
	$(BIN)/pytest -n $(WORKERS)

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# The benchmarks read their data from ../shared/data (or pass DATA=folder) and write benchmarks/results/*.csv
DATA ?= ../shared/data
bench: install
	@$(PIP) install --no-deps $$(grep -o 'torch-pruning==[0-9.]*' pyproject.toml)
	$(BIN)/python benchmarks/structured_resnet20.py --data $(DATA)
	$(BIN)/python benchmarks/joint_resnet20.py --data $(DATA)
	$(BIN)/python benchmarks/ablation.py --data $(DATA)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis out demo-out
