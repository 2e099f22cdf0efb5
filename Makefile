# All need python3 (3.10 or newer, with venv; `dist` 3.11) and a package index, and nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test check gate bench docs dist clean

demo: $(VENV)/.ready  ## train on real digits: collapse, VICReg and VISReg side by side
	$(BIN)/python examples/demo.py $(ARGS)

# As many tests at a time as there are cores, each with one thread: threads that wait for each
# other's cores are slower than one alone. What ARGS names runs here, without the start of workers.
test: $(VENV)/.ready  ## the whole test suite, on all cores, or what ARGS names
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(or $(ARGS),-n logical --maxprocesses 8 --dist worksteal)

check: $(VENV)/.ready  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gate: $(VENV)/.ready  ## compile every kernel for every chip, without a GPU
	$(BIN)/python -m benchmarks.compile_gate $(ARGS)

bench: $(VENV)/.ready  ## ratios to the published formulas
	$(BIN)/python -m benchmarks --quick $(ARGS)

docs: $(VENV)/.ready  ## the documentation, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

dist: $(VENV)/.ready  ## wheel and sdist in dist/, checked as users would meet them
	$(BIN)/python tests/release/check.py $(ARGS)

# uv installs the same packages as pip, in a fraction of the time; pip serves where uv does not run.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv || true
	if $(BIN)/python -m uv --version >/dev/null 2>&1; then \
		$(BIN)/python -m uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[examples,dev,docs]'; \
	else \
		$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[examples,dev,docs]'; \
	fi
	touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info runs
