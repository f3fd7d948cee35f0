# `make` lists the commands. Each sets up .venv first, where that has not been done.

bin := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help install quickstart test faults soak lint types test-lowest test-newest docs test-docs test-image locks drawings bench bench-gpu

help: ## List these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: .venv/.installed ## Set up .venv with the pinned dependencies (PYTHON=python3.12 picks the interpreter)

quickstart: install ## Train a small protein model from start to finish on a laptop's CPU
	$(bin)/pretrain fit -c configs/quickstart.yaml

test: install ## Run the tests, offline and on the CPU
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(bin)/pytest -n 2

faults: install ## Kill runs in every way, on one and two processes, and compare with runs that were not
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(bin)/pytest -n 2 -m "slow or not slow" tests/faults \
		$(foreach topic,resume ledger sick_steps spikes branch one_process checkpoints signals mirror dropout,tests/e2e/test_$(topic).py)

soak: install ## Train for 30 minutes, the second half with kills at random times; check memory, files, processes and curves (MINUTES=10: shorter)
	$(bin)/python benchmarks/soak.py --minutes $(or $(MINUTES),30)

lint: install ## Check style, formatting, which package may import which, and the Dockerfile
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/lint-imports --no-logo
	$(bin)/hadolint docker/Dockerfile

types: install ## Check the types
	$(bin)/mypy

test-lowest: ## Run the tests with the lowest releases that pyproject.toml admits (PYTHON=python3.12: with that Python; needs uv)
	scripts/test_range.sh lowest

test-newest: ## Run them with the newest ones
	scripts/test_range.sh newest

docs: install ## Build the documentation as a site, into build/docs
	$(bin)/mkdocs build --strict

test-docs: install ## Run every command of README and docs, page by page, and build the site (ten minutes)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(bin)/pytest -n 2 -m "slow or not slow" tests/docs

test-image: install ## Build and run the image, compose.yaml and the SLURM scripts (as root; tests/docker say what they need)
	$(bin)/pytest -m "slow or not slow" tests/docker

locks: ## Write the lock files with hashes (CPU_TORCH=folder or page with torch's wheels for the CPU)
	scripts/lock.sh

drawings: install ## Draw docs/images from the code
	$(bin)/python scripts/drawings.py

bench: install ## Measure training throughput on this machine
	$(bin)/python benchmarks/throughput.py

bench-gpu: ## Measure training throughput on this machine's GPU, in the Python that is active
	PYTHONPATH=. python benchmarks/gpu.py

# The stamp appears only when everything is installed; a change of the pins or of the package's metadata renews it.
.venv/.installed: requirements.lock pyproject.toml
	@scripts/install.sh
