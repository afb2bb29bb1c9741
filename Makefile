# make demo: text from the shipped pair.  make check: lint, types and the quick tests.  make test: all tests.
# make test-transformers-4: the adapters' tests under the oldest transformers.
# make test-harness: the tests of mdkern inside lm-evaluation-harness.
# make docs: the API reference, in build/docs.
# make bench: how fast it is here.  make bench-results: the same at full size, kept in benchmarks/results.
# make study [DATA=books.txt]: the experiments of docs/study.md, small, in minutes.
# make dist REPOSITORY=https://...: what is uploaded.  Each makes its environment first.
PYTHON ?= python3
BIN := .venv/bin
# Threads that wait sleep instead of spinning: on two cores, one of them busy with other work, two texts of 256 tokens in
# 32 steps took 3.7 s instead of 6.3.
export OMP_WAIT_POLICY = PASSIVE
# The tests start a hundred processes, which then need not compile our modules anew.
unexport PYTHONDONTWRITEBYTECODE

demo: .venv/installed
	$(BIN)/mdkern sample --schedule "L32 H192 L32" --steps 256 --num-samples 2 --seed 0

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2 --dist worksteal

check: .venv/installed lint
	$(PYTEST) -m "not slow"

test: .venv/installed lint
	$(PYTEST)

# The adapters' tests under the oldest transformers that is supported. Everything else is that of .venv.
OLD := .venv-transformers-4
test-transformers-4: $(OLD)/installed
	OMP_NUM_THREADS=1 $(OLD)/bin/python -m pytest -q -p no:cacheprovider -k "not slow_loop" \
	  tests/models/test_adapters.py tests/models/test_split.py tests/models/test_split_cached.py \
	  tests/models/test_split_blocks.py tests/models/test_compat.py tests/models/test_probe.py \
	  tests/models/test_loading.py tests/compat

$(OLD)/installed: .venv/installed
	rm -rf $(OLD) && $(BIN)/python -m venv $(OLD)
	$(OLD)/bin/pip install --quiet --no-deps transformers==4.57.6 huggingface_hub==0.36.2 tokenizers==0.22.2 \
	  requests==2.34.2 urllib3==2.8.0 charset_normalizer==3.5.3 certifi==2026.10.19.post1
	echo "import sysconfig; print(sysconfig.get_path('purelib'))" > $(OLD)/where.py
	$(BIN)/python $(OLD)/where.py > "$$($(OLD)/bin/python $(OLD)/where.py)/rest.pth"
	touch $@

# mdkern inside lm-evaluation-harness, whose many dependencies stay out of .venv.
HARNESS := .venv-lm-eval
test-harness: $(HARNESS)/installed
	HF_DATASETS_OFFLINE=1 OMP_NUM_THREADS=1 $(HARNESS)/bin/python -m pytest -q -p no:cacheprovider tests/test_harness.py

$(HARNESS)/installed: .venv/installed
	rm -rf $(HARNESS) && $(BIN)/python -m venv $(HARNESS)
	echo "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
	  > "$$($(HARNESS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/rest.pth"
	$(HARNESS)/bin/pip install --quiet lm-eval==0.4.13
	touch $@

docs: .venv/installed
	$(BIN)/python docs/build.py build/docs

bench: .venv/installed
	$(BIN)/python -m pytest benchmarks --benchmark-only -s

bench-results: .venv/installed
	$(BIN)/python -m pytest benchmarks --benchmark-only -s --keep-results

# DATA: text that a small family of models is trained on, and compared on what is held out of it; SECOND: another one.
# The study itself: SIZE=full, as docs/study.md says.
SIZE ?= small
study: .venv/installed
	$(BIN)/python -m benchmarks.study.everything --out runs/study --size $(SIZE) $(if $(DEVICE),--devices $(DEVICE)) $(if $(DATA),--data $(DATA)) $(if $(SECOND),--second $(SECOND))

# Links of the README to files of the repository are absolute on a package's page, where there are no such files.
dist: .venv/installed
	@test -n "$(REPOSITORY)" || { echo "say where the sources are: make dist REPOSITORY=https://host/owner/mdkern"; exit 2; }
	rm -rf build/release && mkdir -p build/release
	git archive HEAD | tar -x -C build/release
	sed -i -E 's#\]\(((docs|benchmarks|mdkern|training|tests)/|([A-Z]+\.md))#](REPOSITORY/\1#g; s#REPOSITORY/([^)]*\.(png|svg))#$(REPOSITORY)/raw/HEAD/\1#g; s#REPOSITORY/#$(REPOSITORY)/blob/HEAD/#g' build/release/README.md
	sed -i -E 's#^\[project.urls\]#&\nRepository = "$(REPOSITORY)"#' build/release/pyproject.toml
	cd build/release && ../../$(BIN)/python -c "from setuptools import build_meta as b; b.build_sdist('../../dist'); b.build_wheel('../../dist')"

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/installed: pyproject.toml constraints.txt
	@echo "Installing PyTorch and what else is needed into .venv: a minute, or several on a slow line."
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable '.[test,docs]'
	$(BIN)/python -m compileall -qq -j 0 .venv/lib || true  # as pip does, which uses one core only
	touch $@

# On a GPU, with CUDA's compute-sanitizer: wild and uninitialised reads of the kernels, wild ones of graphs, and races in
# shared memory; it takes many minutes. PyTorch's caching allocator hides them, so each tensor gets an allocation of its
# own; tests that capture graphs need that allocator, so they are left out there.
SANITIZE = PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 --target-processes all --tool
KERNEL_TESTS = tests/kernels tests/models/test_dit_fused.py
memcheck: .venv/installed
	$(SANITIZE) memcheck $(BIN)/python -m pytest -q -x -m gpu -k "not graph" $(KERNEL_TESTS)
	$(SANITIZE) initcheck $(BIN)/python -m pytest -q -x -m gpu -k "not graph" $(KERNEL_TESTS)
	compute-sanitizer --error-exitcode 1 --tool memcheck $(BIN)/python -m pytest -q -x -m gpu tests/engine/test_graphs.py -k Replay
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool racecheck $(BIN)/python -m tests.suites.small_launches | $(BIN)/python -m tests.suites.race_reports

csrc:
	nvcc -arch=compute_80 -rdc=true -ptx csrc/loop_condition.cu -o mdkern/engine/loop_condition.ptx

clean:
	rm -rf .venv $(OLD) $(HARNESS) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks

.PHONY: demo check test test-transformers-4 test-harness docs bench bench-results study lint memcheck dist csrc clean
