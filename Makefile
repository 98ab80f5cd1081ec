# For a machine with Python and make. `pixi run report` and `pixi run test` do the same with conda packages.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
TESTS  := python -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder --durations=25
# snakefmt runs shfmt, which is installed beside it.
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: quick report test test-all test-slow test-slurm test-gpu bench-gpu check format rulegraph reference clean help

help:
	@echo "make quick    set up, then run the whole pipeline with small models, in minutes: quick/results/report.md"
	@echo "make report   set up, then run the whole pipeline for the hardware that is here: results/report.md"
	@echo "make test     set up, then run the tests that are quick"
	@echo "make test-all  set up, then run all tests: those of test-slow and of test-slurm"
	@echo "make test-slow  set up, then run these and the slow tests, such as every command of the README"
	@echo "make test-slurm set up, then run the tests that start a SLURM cluster (Debian: slurmctld slurmd slurm-client munge)"
	@echo "make test-gpu  set up, then run the tests that need a CUDA device"
	@echo "make bench-gpu  set up, then measure training and sampling on the GPU: one table (NANOGPT=path/to/model.py beside it)"
	@echo "make check    set up, then check style and types of Python and Snakemake files"
	@echo "make reference  keep what was measured here in results/reference/ and media/reference/, to be committed"
	@echo "make format   set up, then format Python and Snakemake files"
	@echo "make rulegraph  set up, then draw docs/rulegraph.svg again (needs dot of Graphviz)"
	@echo "make clean    delete what the pipeline wrote; runs made by hand and resources/ stay"

quick: $(READY)
	$(BIN)/snakemake --directory quick --configfile config/quick.yaml

report: $(READY)
	@$(BIN)/picogpt plan --estimate
	$(BIN)/snakemake

test: $(READY)
	$(BIN)/$(TESTS) -m "not slurm and not slow"
	@echo "not run: the tests marked slow (make test-slow) and slurm, which start a cluster (make test-slurm); make test-all runs all"

test-slurm: $(READY)
	$(BIN)/python -m pytest -m slurm

test-slow: $(READY)
	$(BIN)/$(TESTS) -m "not slurm"

test-all: test-slow test-slurm

test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu

bench-gpu: $(READY)
	@$(BIN)/picogpt fetch tinyshakespeare
	@$(BIN)/picogpt tokenize gpt2
	@$(BIN)/picogpt tokenize char
	$(BIN)/picogpt bench table $(if $(NANOGPT),--nanogpt $(NANOGPT))

check: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/snakefmt --check Snakefile workflow

format: $(READY)
	$(BIN)/ruff format
	$(BIN)/ruff check --fix
	$(BIN)/snakefmt Snakefile workflow

rulegraph: $(READY)
	$(BIN)/python docs/rulegraph.py > docs/rulegraph.svg

reference: $(READY)
	$(BIN)/picogpt reference

clean:
	rm -rf weights/*/pipeline logs results/samples results/records results/report.md results/report.html results/summary.csv \
	  media/char_*_loss.png media/char_*_sample.txt \
	  media/gpt2_*_loss.png media/gpt2_*_sample.txt media/gpt2_*_throughput.png

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11)' 2>/dev/null \
	  || { echo "picogpt needs Python 3.11 or later: install it, or name it with make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "picogpt needs Python's venv module: install it (Debian: apt install python3-venv)" >&2; exit 1; }
	@command -v c++ >/dev/null \
	  || echo "no C++ compiler (c++) is here: everything works, but torch.compile cannot make training on a CPU faster" >&2
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[workflow,slurm,test]'
	@# pip compiles file after file; on all cores it takes a fraction. Some packages carry files that cannot be compiled.
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	@touch $@
