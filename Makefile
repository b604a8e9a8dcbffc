PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test quick lowest bench docs lint clean triton

demo: $(STAMP)
	@$(BIN)/sdtrt demo --out out

# two processes, one thread in each, whole files, as fixtures are shared in a file; in the order of their names, as those of few
# tests, which are the longest, would come last
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# without Triton's server, where it cannot be had, its tests are skipped
test: $(STAMP)
	-@$(MAKE) --no-print-directory triton
	@$(PYTEST)

quick: $(STAMP)
	@$(PYTEST) -m "not slow and not gpu"

# `make lowest PYTHON=python3.13`: the quick tests with the oldest versions that pyproject.toml admits
lowest:
	@$(PYTHON) -m venv --clear .venv-lowest
	@.venv-lowest/bin/pip install -q --disable-pip-version-check packaging
	@.venv-lowest/bin/python tests/lowest.py > .venv-lowest/floors.txt
	@.venv-lowest/bin/pip install -q --disable-pip-version-check -c .venv-lowest/floors.txt -e '.[dev]'
	@$(MAKE) --no-print-directory quick BIN=.venv-lowest/bin STAMP=.venv-lowest/floors.txt

bench: $(STAMP)
	@$(BIN)/python -m pytest benchmarks

docs: $(STAMP)
	@$(BIN)/mkdocs build --strict --quiet --site-dir out/site
	@echo "the site is out/site/index.html"

lint: $(STAMP)
	@$(BIN)/ruff check
	@$(BIN)/mypy

# the server of tests/test_triton_server.py; on Linux on x86-64 alone
triton: .venv/triton

.venv/triton: tests/triton_server.sh | $(STAMP)
	@echo "fetching Triton Inference Server, 75 MB"
	@sh $< $@ $(BIN)/python
	@touch $@

$(STAMP): pyproject.toml constraints.txt
	@echo "setting up .venv: torch and the rest, a few minutes the first time"
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv out dist .benchmarks .pytest_cache .ruff_cache .mypy_cache
	find src tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} +
