# make setup | test | test-all | demo | lint | bench | docs; everything is installed in .venv, by `make setup`, once

PYTHON ?= python3.11
BIN := .venv/bin
STAMP := .venv/.installed
# the constraints keep every pip call from bringing in another torch
INSTALL := $(BIN)/python -m pip install --quiet --constraint requirements/constraints.txt

.PHONY: setup test test-all demo lint bench docs

setup: $(STAMP)

# onedl-mmcv compiles for 10 to 16 minutes on 2 cores; pip's wheel cache serves it after that
$(STAMP): $(wildcard requirements/*.txt) setup.py pyproject.toml $(wildcard sn_openmmlab/ops/*.cpp sn_openmmlab/ops/*.h)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) torch
	$(INSTALL) --requirement requirements/build.txt
	$(INSTALL) --no-build-isolation --requirement requirements/onedl.txt --requirement requirements/dev.txt
	$(INSTALL) --requirement requirements/docs.txt
# two packages own cv2; the last one installed stays, and only the headless one works without libGL
	$(INSTALL) --force-reinstall --no-deps opencv-python-headless
	$(INSTALL) --no-build-isolation --no-deps --editable .
	touch $@

test: setup
	$(BIN)/python -m pytest -m 'not slow'

test-all: setup
	$(BIN)/python -m pytest

demo: setup
	$(BIN)/python tools/demo.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: setup
	$(BIN)/python -m benchmarks.bench_switch_norm --seconds 7
	$(BIN)/python -m benchmarks.bench_switch_norm --layout channels_last --no-compiled --seconds 4
	$(BIN)/python -m benchmarks.bench_switch_norm --dtype bfloat16 --no-compiled --seconds 4
	$(BIN)/python -m benchmarks.bench_models --seconds 40
	$(BIN)/python -m benchmarks.report

docs: setup
	$(BIN)/python -m sphinx --fresh-env --write-all --fail-on-warning --keep-going --quiet -c docs -d build/doctrees . build/site
	@echo build/site/index.html
