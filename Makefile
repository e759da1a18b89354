# Every target is one line over the `gemma-gguf` command, run from a virtual environment that is made on first use.
PYTHON ?= python3
MODEL ?= demo
MODELS ?= models.toml
SCALE ?= full
LLAMA_CPP ?= pypi:0.3.36
CONFIRM ?=
# Extra options of `gemma-gguf run`, for example: make all-quants ARGS="--recipes Q4_K_M,Q6_K"
ARGS ?=
# Where pip finds no CPU build of torch, it downloads several GB for CUDA; PyTorch's own CPU index avoids that:
# make all-quants TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
TORCH_INDEX_URL ?=

VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := CMAKE_ARGS="-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF" $(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL))

.DEFAULT_GOAL := help
.PHONY: help all-quants all-quants-batch upload build cards refresh test proof bench check fmt messages calibration-table clean

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# What is not typed here comes from gemma-gguf.toml.
BUILD_OPTION = $(if $(filter file,$(origin LLAMA_CPP)),,--llama-cpp "$(LLAMA_CPP)")

all-quants: $(VENV)/.run  ## the whole quant set of MODEL (default: the demo, Gemma 3 270M)
	$(BIN)/gemma-gguf run "$(MODEL)" $(BUILD_OPTION) $(ARGS)

all-quants-batch: $(VENV)/.run  ## the sets of all models that MODELS lists (default: models.toml)
	$(BIN)/gemma-gguf batch "$(MODELS)" $(ARGS)

upload: $(VENV)/.run  ## send the set of MODEL to the Hub: shows the plan, CONFIRM=1 does it
	$(BIN)/gemma-gguf publish "$(MODEL)" $(if $(CONFIRM),--yes) $(ARGS)

build: $(VENV)/.run  ## llama.cpp alone, from LLAMA_CPP
	$(BIN)/gemma-gguf build $(BUILD_OPTION) $(ARGS)

cards: $(VENV)/.run  ## the cards of all sets under out/, with what LLAMA_CPP would write otherwise; makes no quant
	$(BIN)/gemma-gguf refresh out/*-GGUF $(BUILD_OPTION) $(ARGS)

refresh: $(VENV)/.run  ## ... and change that: new headers, stale recipes made again
	$(BIN)/gemma-gguf refresh out/*-GGUF $(BUILD_OPTION) --apply $(ARGS)

test: $(VENV)/.dev  ## all tests, against the real llama.cpp build
	$(BIN)/python -m pytest $(ARGS)

proof: $(VENV)/.dev $(if $(filter-out fuzz,$(PART)),,$(VENV)/.fuzz)  ## the long campaigns; PART=<name> runs those whose name holds it
	$(BIN)/python -m pytest -m proof -s $(if $(PART),-k "$(PART)") $(ARGS)

bench: $(VENV)/.dev  ## fan-out against llama-quantize, one JSON line last; SCALE=small ends sooner, SCALE=demo is the demo model, SCALE=header new headers against a full run
	$(BIN)/python -m $(if $(filter header,$(SCALE)),tests.bench_refresh,tests.bench --scale $(SCALE)) $(ARGS)

check: $(VENV)/.dev  ## lint, formatting and types; changes nothing
	$(BIN)/ruff check gemma_gguf tests
	$(BIN)/ruff format --check gemma_gguf tests
	$(BIN)/mypy

fmt: $(VENV)/.dev  ## format and fix what can be fixed
	$(BIN)/ruff check --fix gemma_gguf tests
	$(BIN)/ruff format gemma_gguf tests

messages: $(VENV)/.dev  ## bring the catalogues of the card's translations up to date, and compile them
	$(BIN)/pybabel --quiet extract -F pyproject.toml -k Recipe:3 --no-location -o $(VENV)/card.pot .
	for tag in ja zh_Hant; do $(BIN)/pybabel --quiet update -D card -i $(VENV)/card.pot -d templates/locale -l $$tag --no-fuzzy-matching --ignore-obsolete --ignore-pot-creation-date --width 120; done
	$(BIN)/pybabel --quiet compile -D card -d templates/locale

calibration-table: $(VENV)/.run  ## write calibration/parts.toml anew after editing the texts
	$(BIN)/python -c "from gemma_gguf import calibration; print(calibration.write_table())"

clean:  ## remove the virtual environment and everything under out/.work
	rm -rf $(VENV) out/.work

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml | $(BIN)/python
	@echo "Setting up $(VENV) (a few minutes the first time)"
	$(PIP_INSTALL) -e '.[build,convert,demo,pictures]'
	@touch $@

$(VENV)/.fuzz: pyproject.toml $(VENV)/.dev
	$(PIP_INSTALL) -e '.[fuzz]'
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.run
	$(PIP_INSTALL) -e '.[dev]'
	@touch $@
