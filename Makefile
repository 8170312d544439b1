# Each target makes its own environment when there is none. Nothing is needed but Python >= 3.11 and pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Real photographs and weights for some tests, where they lie beside the checkout; those tests skip without.
export CAE2PIPE_REAL ?= $(wildcard $(abspath ../shared/real))

.PHONY: demo test faults oldest check clean

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: $(VENV)/.installed  ## the whole pipeline on photographs that pip brings, into demo/
	$(BIN)/cae2pipe demo demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist worksteal

N ?= 30
faults: $(VENV)/.installed  ## N random points of every kind of fault, each ending in the undisturbed run's bytes
	CAE2PIPE_FAULTS=$(N) $(BIN)/python -m pytest -n 2 --dist worksteal tests/faults

# What pyproject.toml allows at least; the other tests run with the newest.
OLDEST := timm==1.0.20
oldest: $(VENV)/.installed  ## what hangs on timm's own code, with the oldest timm that is supported
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/oldest $(OLDEST)
	PYTHONPATH=$(VENV)/oldest $(BIN)/python -m pytest -n 2 --dist worksteal -o filterwarnings=ignore \
		tests/models tests/evaluation tests/teachers

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) demo build dist *.egg-info
