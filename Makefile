# Every target works by itself on a machine with only make and Python >= 3.11: it makes the environment it needs.
#   make test PYTHON=python3.11 VENV=.venv-3.11    another interpreter, in an environment of its own

VENV ?= .venv
VENV_GPU ?= .venv-gpu
PYTHON ?=
VENV_PYTHON = $(VENV)/bin/python

.PHONY: help demo test test-versions test-gpu-compile test-gpu-compile-short lint typecheck docs clean

help:
	@echo "make demo       perplexity, generation and recall of the shipped model by cache; results in demo/"
	@echo "make test       the tests, without those marked slow"
	@echo "make test-versions"
	@echo "                the part of them that can differ between versions of jax and flax"
	@echo "make test-gpu-compile"
	@echo "                compile the GPU kernels and whole programs for H200s; needs Python >= 3.12 and no GPU"
	@echo "make test-gpu-compile-short"
	@echo "                the kernels at the tiles that most calls get, and programs of few layers"
	@echo "make lint       ruff: rules and format"
	@echo "make typecheck  pyright, on the installed package and the tests"
	@echo "make docs       the documentation as HTML in build/docs/html; warnings are errors, nothing is downloaded"
	@echo "make clean      remove what the targets above made"
	@echo "PYTHON=... and VENV=... choose the interpreter and the environment's folder."

demo: $(VENV)/.installed-plot
	$(VENV_PYTHON) -m jsparse demo --output demo

test: $(VENV)/.installed-test
	$(VENV_PYTHON) -m pytest --numprocesses 2 --dist worksteal

# What can differ between two pairs of versions of jax and flax: that every module imports and its examples are true,
# one suite per room, and the comparison with transformers if torch is installed.
VERSIONS = tests/test_doctests.py tests/test_plan.py \
    tests/jsparse/test_attention.py tests/jsparse/masks/test_estimate.py \
    tests/jsparse/cache/test_decode.py tests/jsparse/cache/test_pages.py tests/jsparse/texts/test_tokenizer.py \
    tests/jsparse/texts/test_chat_template_parity.py tests/jsparse/texts/test_plain_form.py \
    tests/jsparse/texts/test_samples_parity.py \
    tests/models/test_weights_parity.py \
    tests/serve/test_sampling_parity.py \
    tests/models/test_parity.py tests/models/test_adapter_parity.py \
    tests/models/test_merge_adapters_parity.py tests/models/test_llama.py \
    tests/models/test_checkpoint.py tests/models/test_frozen_base.py \
    tests/serve/test_generation.py tests/evaluate/test_perplexity.py \
    tests/train/test_finetuning.py tests/train/test_export.py tests/train/test_export_parity.py \
    tests/train/test_preferences_parity.py \
    tests/train/test_many_devices.py

test-versions: $(VENV)/.installed-test
	$(VENV_PYTHON) -m pytest --numprocesses 2 --dist worksteal $(VERSIONS)

# In an environment of its own: with the CUDA plugin installed, tests on a CPU would start by looking for a GPU.
test-gpu-compile:
	$(MAKE) --no-print-directory VENV=$(VENV_GPU) $(VENV_GPU)/.installed-gpu-compile
	$(VENV_GPU)/bin/python tests/gpu_compile/run.py

test-gpu-compile-short:
	$(MAKE) --no-print-directory VENV=$(VENV_GPU) $(VENV_GPU)/.installed-gpu-compile
	$(VENV_GPU)/bin/python tests/gpu_compile/run.py --short

lint: $(VENV)/.installed-lint
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .

# A checker cannot follow the package-dir mapping of an editable install, so it reads a plain one. setuptools builds in
# build/ and would pack what an earlier build left there.
typecheck: $(VENV)/.installed-lint $(VENV)/.installed-test
	rm -rf build
	$(VENV_PYTHON) -m pip install -q --disable-pip-version-check --no-deps --target build/check .
	$(VENV_PYTHON) -m pyright --pythonpath $(VENV_PYTHON)

# Always from scratch, so that no warning hides in a page that Sphinx kept.
docs: $(VENV)/.installed-docs
	rm -rf build/docs
	JAX_PLATFORMS=cpu $(VENV_PYTHON) -m sphinx -q -W --keep-going -b html -d build/docs/doctrees docs build/docs/html
	@echo "build/docs/html/index.html"

clean:
	rm -rf $(VENV) $(VENV_GPU) .venv-3.11 build demo *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Installed once for each extra, and again when pyproject.toml changes.
$(VENV)/.installed-%: pyproject.toml
	@if ! $(VENV_PYTHON) -m pip --version >/dev/null 2>&1; then \
	    python=$$(scripts/find-python $(PYTHON)) || exit 1; \
	    echo "making $(VENV) with $$python"; \
	    "$$python" -m venv --clear $(VENV); \
	fi
	$(VENV_PYTHON) -m pip install -q --disable-pip-version-check -e '.[$*]'
	@touch $@
