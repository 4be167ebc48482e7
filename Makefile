# Every target makes its own virtual environment in .venv; a second call is quick.
# Choose another interpreter with: make test PYTHON=python3.12

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
	&& { echo "$$p"; break; }; done)

# pip compiles with one core, compileall with all of them.
INSTALL := -m pip install --quiet --disable-pip-version-check --no-compile
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Tests start hundreds of processes: what these import is compiled once, where the machine says no too.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-main test-datarax test-loaders test-long trust bench lint types layers clean
.DEFAULT_GOAL := test

$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or later found; set PYTHON=..." >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	$(BIN)/python $(INSTALL) -e '.[test,demo,lint]'
	-@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib
	@touch $@

demo: $(STAMP)
	$(BIN)/python -m datarax_dist.demo --out demo_out

test: test-main test-datarax test-loaders

# A test that crashes its process fails the run: restarted workers may wait for ever.
test-main: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup --max-worker-restart 0

# Today's datarax needs a newer Python and a newer jax: an environment of its own, in .venv-datarax.
test-datarax:
	@.ci/test-datarax

# torchdata, Hugging Face, Keras and Mosaic with their real packages: .venv-loaders and .venv-mosaic.
test-loaders:
	@PYTHON="$(PYTHON)" .ci/test-loaders

# What make test does in a few phases, in all; and what it does on two hosts, on four.
test-long: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup --max-worker-restart 0 -m long

# Tries hard to break the promises, and prints what was tried; under ten minutes on two cores.
# Exit code 3 of a part: it cannot run here (no root, no loop devices, no atheris), and says so.
trust: $(STAMP)
	$(BIN)/python -m datarax_dist.testing.explorer --seeds 20000
	$(BIN)/python -m datarax_dist.testing.explorer --exhaust --every 89
	$(BIN)/python -m benchmarks.power_cut || [ $$? -eq 3 ]
	-$(BIN)/python $(INSTALL) -e '.[fuzz]'
	$(BIN)/python tests/fuzz_records.py --seconds 15 || [ $$? -eq 3 ]
	$(BIN)/python tests/guards.py

# How fast, how large, how disturbing a save is, beside the raw medium and the peers: bench_out/.
bench: $(STAMP)
	$(BIN)/python -m benchmarks

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

layers: $(STAMP)
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) .venv-datarax .venv-loaders .venv-mosaic build dist demo_out bench_out *.egg-info .ci/out
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find datarax_dist tests -type d -name __pycache__ -prune -exec rm -rf {} +
