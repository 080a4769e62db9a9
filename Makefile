# moeprune: the commands of the repository. `make help` lists them.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STATE  ?= .moeprune
ARGS   ?=
PROCESSES ?= 2
OUT ?= pipelines/compiled

MLFLOW_PORT ?= 5000
S3_PORT     ?= 8333
export MLFLOW_PORT S3_PORT

DOCKER ?= docker
TORCH  ?= cpu
BASE   ?= python:3.11-slim-bookworm
IMAGE  ?= moeprune:$(shell sed -n 's/__version__ = "\(.*\)"/\1/p' src/moeprune/__init__.py)

.DEFAULT_GOAL := help
.PHONY: help run up down test families methods bench reap-reference bench-quality launch-form submit deploy lint format image image-base image-size image-run image-check compile reference-model lock clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: $(VENV)/ready  ## prune the embedded model for code, start to end; ARGS='--ratio 0.25' changes it (moeprune run --help)
	@$(BIN)/moeprune run --state $(STATE) $(ARGS)

up: $(VENV)/ready  ## start the MLflow and S3 servers and leave them running
	@$(BIN)/moeprune up --state $(STATE)

down: $(VENV)/ready  ## stop them
	@$(BIN)/moeprune down --state $(STATE)

test: $(VENV)/ready-dev  ## the tests, in PROCESSES at once (2)
	@$(BIN)/pytest -q -n $(PROCESSES) --dist loadfile $(ARGS)

families: $(VENV)/ready-dev  ## prune a tiny model of every family, and write docs/families.md
	@$(BIN)/pytest -q tests/test_families.py --write-families

methods: $(VENV)/ready-dev  ## write the tables of docs/methods.md
	@$(BIN)/pytest -q tests/test_methods_page.py --write-methods

bench: $(VENV)/ready-dev build/peer/ready  ## measure speed and memory, alone on the machine; writes benchmarks/results
	@for name in surgery calibration streaming growth condensing; do $(BIN)/python benchmarks/$$name.py || exit 1; done
	@$(BIN)/python benchmarks/peers.py --peer-python build/peer/bin/python

bench-quality: $(VENV)/ready-dev  ## what every method keeps, at every size; ARGS='--model M --domain NAME=TRAIN,HELD': of yours
	@$(BIN)/python benchmarks/quality.py --state $(STATE)/quality $(ARGS)

reap-reference: $(VENV)/ready-dev build/peer/ready  ## ask llmcompressor what REAP keeps, for the tests; writes tests/reference
	@$(BIN)/python benchmarks/reap_reference.py --peer-python build/peer/bin/python

build/peer/ready:
	@echo "installing llmcompressor into build/peer ..."
	@$(PYTHON) -m venv build/peer
	@build/peer/bin/pip install -q --disable-pip-version-check 'torch==2.13.0' 'llmcompressor>=0.14' 'transformers>=5.15,<5.18'
	@touch $@

lint: $(VENV)/ready-dev  ## style and types
	@$(BIN)/hadolint Dockerfile
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(VENV)/ready-dev  ## put the code into the house's style
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

image:  ## build the image IMAGE of what is committed and what is not; TORCH=cu130: for NVIDIA's GPUs (docs/image.md)
	@$(PYTHON) image/build.py --docker $(DOCKER) --tag $(IMAGE) --torch $(TORCH) --build-arg BASE=$(BASE) $(ARGS)

image-base:  ## make BASE from Debian's packages alone, where no image registry can be reached (needs mmdebstrap)
	@image/base.sh $(DOCKER) $(BASE)

image-size:  ## weigh it, and write into docs/image.md what it is made of
	@$(PYTHON) image/sizes.py --docker $(DOCKER) --image $(IMAGE) --write

image-run: $(VENV)/ready  ## as `run`, its steps in containers of the image
	@$(BIN)/moeprune run --state $(STATE) --runner docker --image $(IMAGE) $(ARGS)

image-check: $(VENV)/ready-dev  ## build it, weigh it, look into it, run the pipeline in it: where there is an engine, or one can be started
	@PYTHON=$(PYTHON) BASE=$(BASE) IMAGE=$(IMAGE) image/check.sh

compile: $(VENV)/ready  ## write the pipelines to OUT (pipelines/compiled), to upload in the Kubeflow UI; ARGS='--workspace 200Gi'
	@$(BIN)/python -m moeprune.pipelines.compile $(OUT) $(ARGS)

launch-form: $(VENV)/ready  ## write docs/launch_form.md
	@$(BIN)/python -m moeprune.pipelines.launch_form docs/launch_form.md

submit: $(VENV)/ready  ## start a run on a cluster; ARGS='--host URL --parameters FILE --wait' (moeprune submit --help)
	@$(BIN)/moeprune submit $(ARGS)

deploy:  ## apply an overlay of manifests/overlays to the cluster of the kubeconfig: OVERLAY=dev, gpu or prod
	@test -d "manifests/overlays/$(OVERLAY)" -a -n "$(OVERLAY)" \
		|| { echo "which overlay? make deploy OVERLAY=$$(ls manifests/overlays | paste -sd'|')" >&2; exit 1; }
	@kubectl apply --server-side -k "manifests/overlays/$(OVERLAY)"

reference-model: $(VENV)/ready-dev  ## train the embedded model again (100 minutes on one core)
	@OMP_NUM_THREADS=1 $(BIN)/python reference_model/train.py --out src/moeprune/builtin/model

lock: $(VENV)/ready-dev  ## write the exact versions that are installed to constraints.txt
	@$(BIN)/pip freeze --exclude-editable | grep -viE '^(pip|setuptools|wheel)==| @ ' | sed 's/+cpu//' > constraints.txt

clean:  ## remove what the commands made, the environment too
	@rm -rf $(VENV) $(STATE) build .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info

# The environment: made once, and again when what it is made from changes.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
		|| { echo "moeprune needs Python 3.11 to 3.13; choose one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/ready: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "installing into $(VENV) (a few minutes, once) ..."
	@$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[local]'
	@touch $@

$(VENV)/ready-dev: $(VENV)/ready
	@echo "installing the tools for tests and lint into $(VENV) ..."
	@$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
