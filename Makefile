# make demo: text from the shipped pair.  make test, make bench, make lint: as they say. Each makes its environment first.
PYTHON ?= python3
BIN := .venv/bin
# Threads that wait sleep instead of spinning: on two cores, one of them busy with other work, two texts of 256 tokens in
# 32 steps took 3.7 s instead of 6.3.
export OMP_WAIT_POLICY = PASSIVE

demo: .venv/installed
	$(BIN)/mdkern sample --schedule "L32 H192 L32" --steps 256 --num-samples 2 --seed 0

test: .venv/installed lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2 --dist loadfile

bench: .venv/installed
	$(BIN)/python -m pytest benchmarks --benchmark-only

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

csrc:
	nvcc -arch=compute_80 -rdc=true -ptx csrc/loop_condition.cu -o mdkern/engine/loop_condition.ptx

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks

.PHONY: demo test bench lint csrc clean
