# Each target creates its environment if needed. Only Python >= 3.11 and pip are required.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Real photographs and weights for some tests, if they are next to the checkout; without them those tests are skipped.
export CAE2PIPE_REAL ?= $(wildcard $(abspath ../shared/real))
export PYTHON

.PHONY: demo docs test faults fuzz coverage gpu versions check clean

$(VENV)/.demo: pyproject.toml
	.ci/install $(VENV) demo
	touch $@

$(VENV)/.installed: pyproject.toml
	.ci/install $(VENV) dev
	touch $@ $(VENV)/.demo

$(VENV)/.docs: pyproject.toml
	.ci/install $(VENV) docs
	touch $@

demo: $(VENV)/.demo  ## the whole pipeline on photographs that pip installs, into demo/
	$(BIN)/cae2pipe demo demo

docs: $(VENV)/.docs  ## the documentation, into site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist worksteal

N ?= 30
faults: $(VENV)/.installed  ## N random points of every kind of fault; each must end in the bytes of an undisturbed run
	CAE2PIPE_FAULTS=$(N) $(BIN)/python -m pytest -n 2 --dist worksteal tests/faults

fuzz: N := 500
fuzz: $(VENV)/.installed  ## N damaged folders through every command: clear errors, or correct results
	CAE2PIPE_FUZZ=$(N) $(BIN)/python -m pytest -n 2 --dist worksteal tests/faults/test_fuzz.py

coverage: $(VENV)/.installed  ## lines and branches that the tests reach, including their subprocesses, into .coverage.d/html/
	rm -rf .coverage.d
	mkdir .coverage.d
	$(BIN)/coverage run -m pytest -n 2 --dist worksteal $(TESTS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage html --quiet
	$(BIN)/coverage report

gpu: $(VENV)/.installed  ## on a GPU: correctness and speed, into gpu.json
	$(BIN)/python -m benchmarks.gpu --out gpu.json

versions:  ## the tests under each installed Python, with the oldest and the newest supported packages
	.ci/versions

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/python -m pytest -q --noconftest --disable-plugin-autoload tests/test_docs.py tests/test_language.py

clean:
	rm -rf $(VENV) .versions .coverage.d demo site build dist *.egg-info
