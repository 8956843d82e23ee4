# Everything runs in .venv, which the first target makes; `make help` lists the targets.

PYTHON := $(shell for p in python3.12 python3; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' \
	2>/dev/null && echo $$p && break; done)
SMOKE = pipeline name=smoke

.PHONY: help setup gpu rehearsal smoke test docs lint bench faults gpu-wheels gpu-check clean
.DELETE_ON_ERROR:

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

setup: .venv/.installed .venv/.developed ## make .venv with everything pinned in constraints.txt

INSTALL = .venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt

.venv/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "omni_train needs Python 3.12 or newer: no python3.12 or python3 of that age is on PATH" >&2; exit 1; }
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv; torch is large, so the first time takes minutes"
	@$(INSTALL) -e '.[rehearsal]'
	@touch $@

# What runs do not need: the checks of a change, and measures of speech.
.venv/.developed: .venv/.installed
	@$(INSTALL) -e '.[rehearsal,speech,dev]'
	@$(INSTALL) --no-deps resemblyzer # see pyproject.toml
	@$(INSTALL) -e '.[pesq]' || \
		echo "pesq was not installed, for want of a C compiler: PESQ of the codec's speech will not be measured" >&2
	@touch $@

# They compile against the torch that is there, so they are built outside pip's isolation, with our own build tools.
gpu: setup ## add the GPU kernels to .venv; compiling takes minutes, and needs the CUDA toolkit
	.venv/bin/python -m pip install -q --disable-pip-version-check hatchling wheel
	.venv/bin/python -m pip install -q --disable-pip-version-check --no-build-isolation -c constraints.txt -e '.[gpu]'

rehearsal: .venv/.installed # adds what is missing, and is quick where nothing is
	@.venv/bin/omni-train data rehearsal out=rehearsal

smoke: rehearsal ## train a tiny Thinker through every stage, on every GPU or else on two CPU processes, and report
	@rm -rf runs/smoke
	@gpus=$$(.venv/bin/python -c 'import torch; print(torch.cuda.device_count())'); rows=$$((4 * gpus)); \
	if [ $$gpus -gt 0 ]; then launchers/local.sh $$gpus $(SMOKE) parallel.tensor=1 parallel.context=1 \
		schedule.global_batch=$$rows schedule.eval_rows=$$rows data.streams=$$rows; \
	else launchers/local.sh 2 $(SMOKE); fi

test: setup ## all tests
	env $$(.venv/bin/python -m omni_train.machine 2) .venv/bin/python -m pytest -q --numprocesses 2 --dist loadfile

docs: setup ## write the tables of keys in docs/recipes.md
	.venv/bin/python -m omni_train.recipe.tables

lint: setup ## style, formatting, the walls between the rooms, types, and whether the tables of keys are the schema's
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/lint-imports
	.venv/bin/python -m omni_train.recipe.tables --check
	.venv/bin/mypy

bench: setup ## run benchmarks/ and write the results into docs/performance.md
	.venv/bin/python -m benchmarks

faults: setup ## kill, stop, damage and starve runs, and write what came of it into docs/reliability.md
	.venv/bin/python -m benchmarks.faults

# All that the check needs beside PyTorch: 45 MiB, for Python 3.12 on x86-64. Where they are, nothing else is set up.
gpu_wheels:
	@$(MAKE) --no-print-directory setup
	@rm -rf $@.partial
	@.venv/bin/python -m pip wheel -q --disable-pip-version-check --no-deps -c constraints.txt -w $@.partial \
		megatron-core fla-core einops emerging-optimizers hydra-core omegaconf antlr4-python3-runtime \
		deepspeed hjson py-cpuinfo pydantic pydantic_core annotated-types typing-inspection av soundfile cffi pycparser soxr langcodes
	@mv $@.partial $@

gpu-wheels: gpu_wheels ## fetch what the GPU check carries to a machine without a network

gpu-check: gpu_wheels ## compare every path that only a GPU takes with the CPU's numbers, and time a slice of 35B-A3B
	@launchers/gpu_check.sh

clean: ## remove caches and runs; .venv and the rehearsal stay
	rm -rf runs outputs multirun build dist .pytest_cache .ruff_cache .import_linter_cache .mypy_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
