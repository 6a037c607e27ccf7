# make demo    train an encoder and a generator on real digits over two ranks, and evaluate them
# make test    prove the contracts          make test-all   with what takes long
# make check   format, lint, types
# make test-gpu      on a machine with a GPU: losses, groups, graphs and commands there
# make slurm   install SLURM for its tests (Debian, as root); without it they are skipped
# make test-slurm    all of them: also dead nodes, time limits, accounting (a quarter of an hour)
# make bench   memory, speed, precision, the stream, what each supervision and larger groups are worth (hours)
# make clean   remove what these made
#
# Each builds .venv by itself when it is missing or older than what it is made from.

PYTHON ?= python3
BIN := .venv/bin

# Tests start hundreds of processes, each of which would compile the package anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all test-slurm test-gpu slurm check format bench clean

demo: .venv/stamp
	$(BIN)/dist-contrastive shards pack digits data/digits
	$(BIN)/python -m launch.local configs/digits_encoder.yaml --ranks 2
	$(BIN)/python -m launch.local configs/digits_generator.yaml --ranks 2
	$(BIN)/dist-contrastive eval runs/digits_encoder runs/digits_generator

test: .venv/stamp
	$(BIN)/python -m pytest -n 3 --no-loadscope-reorder

test-all: .venv/stamp
	$(BIN)/python -m pytest -n 3 --no-loadscope-reorder -m "slow or not slow"

test-slurm: .venv/stamp
	$(BIN)/python -m pytest tests/test_slurm.py -m "slow or not slow"

test-gpu: .venv/stamp
	$(BIN)/python -m pytest tests/test_gpu.py -m gpu

slurm:
	tests/slurm/install.sh

check: .venv/stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/stamp
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/precision.py
	$(BIN)/python benchmarks/force.py
	$(BIN)/python benchmarks/force_precision.py
	$(BIN)/python benchmarks/supervision.py
	$(BIN)/python benchmarks/gallery.py
	$(BIN)/python benchmarks/group_size.py
	$(BIN)/python benchmarks/stream.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/evaluation.py large
	tests/slurm/run.sh 2 $(BIN)/python benchmarks/launch.py

.venv/stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,deepspeed]'
	touch $@

clean:
	rm -rf .venv build dist runs data *.egg-info
