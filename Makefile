# `make` lists the commands. Each sets up .venv first, where that has not been done.

bin := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help install quickstart test faults soak lint types bench bench-gpu

help: ## List these commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: .venv/.installed ## Set up .venv with the pinned dependencies (PYTHON=python3.12 picks the interpreter)

quickstart: install ## Train a small protein model from start to finish on a laptop's CPU
	$(bin)/pretrain fit -c configs/quickstart.yaml

test: install ## Run the tests, offline and on the CPU
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(bin)/pytest -n 2

faults: install ## Kill runs in every way, on one and two processes, and compare with runs that were not (an hour or more)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(bin)/pytest -n 2 -m "slow or not slow" tests/faults \
		$(foreach topic,resume ledger sick_steps spikes branch one_process checkpoints signals,tests/e2e/test_$(topic).py)

soak: install ## Train for 30 minutes with kills at random times; check memory, files, processes and curves (MINUTES=5: shorter)
	$(bin)/python benchmarks/soak.py --minutes $(or $(MINUTES),30)

lint: install ## Check style, formatting and which package may import which
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/lint-imports --no-logo

types: install ## Check the types
	$(bin)/mypy

bench: install ## Measure training throughput on this machine
	$(bin)/python benchmarks/throughput.py

bench-gpu: ## Measure training throughput on this machine's GPU, in the Python that is active
	python benchmarks/gpu.py

# The stamp appears only when everything is installed; a change of the pins or of the package's metadata renews it.
.venv/.installed: requirements.lock pyproject.toml
	@scripts/install.sh
