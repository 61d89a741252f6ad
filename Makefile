# make demo: simulate plates, then all steps from images to results. make demo-real: the same with part of a
# public plate. make test: quick tests. All create .venv.
# make test-full: all tests of continuous integration (half an hour). make test-slow: checks of minutes each.
# make aot: compile for accelerators without having one, in a separate environment (6 GB).
PYTHON ?= python3
VENV ?= .venv
AOT_VENV ?= .venv-aot
BIN := $(VENV)/bin
DEMO ?= demo
DEMO_REAL ?= demo-real
# Of JUMP-Target-1: the 14 compounds with two wells, and every second of the 64 DMSO wells.
JUMP_WELLS := A02,A17,B14,C06,C09,C15,C21,D05,D08,D11,D15,D22,E05,E06,E10,E13,E14,E20,E21,E24,F03,F09,F16,F19,F22,G09,G13,H04,H05,H13,H18,I05,I06,I09,I14,I17,I21,J06,J14,J20,J23,K06,K11,K16,K20,L02,L06,L09,L12,L18,M04,M10,M22,N04,N07,N17,N18,N21,O07,P05
# Two workers, each with one file of tests at a time, so that fixtures of a file are created once. Files
# in their order: otherwise long files with few tests come last and one worker waits for the other.
PYTEST_FLAGS ?= -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo demo-real test test-full test-slow lint types docs faults storm bench aot aot-env clean

demo: $(VENV)/.base
	rm -rf $(DEMO)
	$(BIN)/perturbjax simulate --design screen --plates 2 --wells 72 --sites 1 --effect 3 --out $(DEMO)/plates
	$(BIN)/perturbjax run --preset demo --load-data $(DEMO)/plates/load_data.csv --images $(DEMO)/plates --out $(DEMO)/results

# Part of a real plate: downloads 300 images (one site of 60 wells in five channels, at most 2.3 MB each)
# from the Cell Painting Gallery. Repeat it to resume.
demo-real: $(VENV)/.base
	$(BIN)/perturbjax fetch --plate BR00116991 --wells $(JUMP_WELLS) --sites 1 --channels DNA,RNA,ER,AGP,Mito --out $(DEMO_REAL)/plate
	$(BIN)/perturbjax run --preset linear --load-data $(DEMO_REAL)/plate/load_data.csv --images $(DEMO_REAL)/plate --out $(DEMO_REAL)/results

test: $(VENV)/.test
	$(BIN)/python -m pytest -m "not slow and not full" $(PYTEST_FLAGS)

test-full: $(VENV)/.test
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_FLAGS)

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -m slow $(PYTEST_FLAGS)

lint: $(VENV)/.test
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Fault injection: damaged files, kills, full disks, hostile names; prints the outcome of each case.
faults: $(VENV)/.test
	$(BIN)/python -m tests.faults

# Former name of faults.
storm: faults

bench: $(VENV)/.test
	$(BIN)/python -m experiments.bench --out runs/bench --readme docs/performance.md

aot: aot-env
	$(AOT_VENV)/bin/python -m experiments.bench --only aot --out runs/bench --readme docs/performance.md

aot-env: $(AOT_VENV)/.aot

# Compilers for TPUs and NVIDIA GPUs; no such device is needed.
$(AOT_VENV)/.aot: pyproject.toml
	@test -d $(AOT_VENV) || $(PYTHON) -m venv $(AOT_VENV)
	@echo "installing the compilers for TPU and GPU into $(AOT_VENV) (some minutes, 6 GB)"
	$(AOT_VENV)/bin/python -m pip install --quiet --disable-pip-version-check "jax[tpu,cuda13]==0.10.2" pytest pytest-timeout beartype hypothesis --editable .
	@touch $@

# The demo needs no extras; the test environment serves it too.
$(VENV)/.base: pyproject.toml
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@echo "installing perturbjax into $(VENV) (about a minute)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

# torch first and pinned: an open range would install gigabytes of CUDA libraries.
$(VENV)/.test: pyproject.toml
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@echo "installing perturbjax and its test dependencies into $(VENV) (some minutes)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@ $(VENV)/.base

$(VENV)/.docs: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[docs]"
	@touch $@

clean:
	rm -rf $(DEMO) $(DEMO_REAL) build dist site *.egg-info
