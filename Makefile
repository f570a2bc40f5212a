# `make demo` and `make test` do all the set-up that they need; `make help` lists the rest.
.DEFAULT_GOAL := help
.PHONY: help install lock demo demo-vision test format lint types unit test-latest test-oldest test-exhaustive docs docs-test notebooks world gallery \
	bench-hdpo bench-gates bench-overhead bench-update bench-sandbox bench-search bench-trainer bench-partially-known bench-store \
	bench-report bench-vision bench-real-size evidence wheel-test clean

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
# Tiny models run fastest on one thread, and two processes then do not fight for the cores.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Nothing here needs a model hub.
export HF_HUB_OFFLINE ?= 1

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' Makefile

# Every package at the version of the lock, those that build packages too: a newer release of one changes nothing here.
LOCK := constraints.txt
# PyTorch is moved by hand, `make lock TORCH=...`: another release of it may bring several GB of CUDA.
TORCH ?= $(shell sed -n 's/^torch==//p' $(LOCK))
PIP := -m pip --disable-pip-version-check

$(VENV)/installed: pyproject.toml $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Metis needs Python 3.11 or newer; set PYTHON=python3.11")'
	@echo "Installing the $$(grep -c == $(LOCK)) packages of $(LOCK) into $(VENV): 3 GB, a few minutes"
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python $(PIP) install --constraint $(LOCK) --upgrade pip setuptools
	$(RUN)/python $(PIP) install --constraint $(LOCK) --build-constraint $(LOCK) --editable ".[dev]"
	@touch $@

install: $(VENV)/installed ## the virtual environment in .venv

lock: ## write constraints.txt anew with today's releases; then make test
	$(PYTHON) -m venv --clear build/lock
	build/lock/bin/python $(PIP) install uv
	printf '%s\n' pip setuptools wheel editables "torch==$(TORCH)" | build/lock/bin/uv pip compile --universal --upgrade --extra dev \
	  --no-annotate --custom-compile-command "make lock" --output-file $(LOCK) pyproject.toml - >/dev/null

demo: $(VENV)/installed ## train the tiny agent by HDPO and show before and after (5 to 10 minutes)
	$(RUN)/metis demo

demo-vision: $(VENV)/installed ## the same about pictures: the sign read at a glance, the tiny one cropped, then read (3 minutes)
	$(RUN)/metis demo --world gallery

test: format lint types unit ## everything that CI runs

format: $(VENV)/installed ## is the code formatted?
	$(RUN)/ruff format --check .

lint: $(VENV)/installed ## ruff
	$(RUN)/ruff check .

types: $(VENV)/installed ## mypy --strict
	$(RUN)/mypy --num-workers 2

# Environments of their own, for the two ends of the ranges in pyproject.toml; there a deprecation is an error.
# But for those that others cause between themselves: TRL 1.16 and PEFT 0.21 by transformers' old names, and
# langgraph-supervisor 0.0.31 by LangGraph's.
DEPRECATIONS := -W error::DeprecationWarning -W error::PendingDeprecationWarning -W error::FutureWarning \
	-W 'ignore:`is_gradient_checkpointing` is deprecated:FutureWarning' \
	-W 'ignore:`gradient_checkpointing_disable` is deprecated:FutureWarning' \
	-W 'ignore:create_react_agent has been moved'
TESTS ?= tests

test-latest: ## all tests with the newest releases that the ranges admit, PyTorch as in the lock: TORCH=... TESTS=...
	$(PYTHON) -m venv --clear build/latest
	build/latest/bin/python $(PIP) install --upgrade pip setuptools "torch==$(TORCH)"
	build/latest/bin/python $(PIP) install --editable ".[dev]"
	build/latest/bin/pytest -n 2 --dist loadfile $(DEPRECATIONS) $(TESTS)

test-oldest: $(VENV)/installed ## all tests with the oldest releases that the ranges admit: TORCH=... TESTS=...
	$(PYTHON) -m venv --clear build/oldest
	$(RUN)/uv pip compile --quiet --resolution lowest-direct --extra dev --no-header --no-annotate pyproject.toml | \
	  sed 's/^torch==.*/torch==$(TORCH)/' > build/oldest.txt
	build/oldest/bin/python $(PIP) install --constraint build/oldest.txt --editable ".[dev]"
	build/oldest/bin/pytest -n 2 --dist loadfile $(DEPRECATIONS) $(TESTS)

docs: $(VENV)/installed ## the documentation as a site in build/site
	NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build

docs-test: $(VENV)/installed ## README, documentation and notebooks: do they run, and print what they say?
	$(RUN)/pytest tests/test_readme.py tests/test_docs.py tests/test_examples.py

notebooks: $(VENV)/installed ## run the notebooks again and keep what they print
	$(RUN)/python -m tests.notebooks

unit: $(VENV)/installed ## all tests, on two processes
	$(RUN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

test-exhaustive: $(VENV)/installed ## whole products of cases and long fuzzing, which `make test` samples (hours): TESTS=...
	$(RUN)/pytest -n 2 --dist loadfile -m exhaustive $(TESTS)

wheel-test: $(VENV)/installed ## wheel and sdist in clean environments, alone and with every extra: EXTRAS="runtime train" for some (an hour)
	$(RUN)/python -m tests.packaging.clean_rooms --full-demo $(EXTRAS)

world: $(VENV)/installed ## train the shipped cold start again from nothing (about 12 minutes)
	$(RUN)/python -m metis_agent.worlds.almanac.cold_start

gallery: $(VENV)/installed ## train the tiny Qwen3-VL that the vision world ships again from nothing (about 25 minutes)
	$(RUN)/python -m metis_agent.worlds.gallery.cold_start

bench-hdpo: $(VENV)/installed ## HDPO beside six other objectives in two worlds, three seeds each (about an hour)
	$(RUN)/python benchmarks/hdpo.py

bench-overhead bench-update bench-trainer bench-sandbox bench-search: bench-%: $(VENV)/installed
	$(RUN)/python benchmarks/$*.py

bench-vision: $(VENV)/installed ## the gallery with three seeds: HDPO, GRPO, a font never seen, a control (about 30 minutes)
	$(RUN)/python benchmarks/vision.py

bench-partially-known: $(VENV)/installed ## a gate where the model knows partially, beside plain HDPO and coupled (about 10 minutes)
	$(RUN)/python benchmarks/partially_known_gate.py

bench-store: $(VENV)/installed ## a million trajectories to outcomes: seconds and memory (about 5 minutes, 4 GB of disk)
	$(RUN)/python benchmarks/store.py

bench-report: $(VENV)/installed ## metis report of 100,000 trajectories: the page, and its first paint in Chromium
	$(RUN)/python benchmarks/report.py

bench-real-size: $(VENV)/installed ## Qwen3-VL-2B's shape with random weights: built, rolled out, one HDPO step (about 12 minutes, 8 GB)
	$(RUN)/python benchmarks/real_size.py

bench-gates: $(VENV)/installed ## a gate on recorded outcomes beside its baselines: make bench-gates DATA=DIR
	$(RUN)/python benchmarks/gates.py --data $(DATA)

evidence: $(VENV)/installed ## every table of DATA beside peers, promises over 200 splits, learning curves (hours): make evidence DATA=DIR
	$(RUN)/python benchmarks/evidence.py --data $(DATA) --curves

clean: ## remove the environment, runs and caches
	rm -rf $(VENV) runs dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
