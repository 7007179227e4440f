# Every verb sets itself up: it needs Python 3.11+, a C++ compiler and the package registries, nothing else.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# SLOW=1: also the tests that are marked slow. ARGS="-m slow": those alone.
SLOW ?=
# Most tests use one core, and a file's tests share what is costly to make.
WORKERS ?= -n logical --maxprocesses 4 --dist loadfile
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install -q --disable-pip-version-check
READY := $(VENV)/.installed

.PHONY: demo test check bench kernels-report clean

demo: $(READY)  ## fine-tune a real model on the built-in tasks, two processes
	$(PY) -m flex demo

test: $(READY)  ## the tests, but those marked slow, which SLOW=1 adds; ARGS="tests/flex -k penalty" selects
	OMP_NUM_THREADS=1 $(PY) -m pytest $(WORKERS) $(if $(SLOW),,-m "not slow") $(ARGS)

check: $(VENV)/.checkers  ## format, lint, types, import rules
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy flex
	$(PY) -m pytest -q tests/test_imports.py tests/security

bench: $(READY)  ## the benchmarks; see benchmarks/
	$(PY) -m pytest benchmarks $(ARGS)

kernels-report: $(READY)  ## registers, spills, shared memory of every kernel on every target; ARGS=--update records them
	$(PY) -m flex.kernel_report $(ARGS)

clean:  ## remove what the build and the tests leave; runs/ and the environment stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .benchmarks
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# torch goes first, and nothing is built in isolation: DeepSpeed's installer imports torch, and an isolated build would
# download a second, CUDA one.
$(READY): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; say which: make PYTHON=python3.12 ..." >&2; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt torch setuptools wheel
	$(PIP) -c constraints.txt --no-build-isolation -e '.[test]'
	touch $@

$(VENV)/.checkers: $(READY)
	$(PIP) -c constraints.txt --no-build-isolation -e '.[test,dev]'
	touch $@
