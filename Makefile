# Both commands need python3 (3.10 or newer, with venv) and a package index, and nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test check gate bench clean

demo: $(VENV)/.ready  ## train on real digits: collapse, VICReg and VISReg side by side
	$(BIN)/python examples/demo.py $(ARGS)

test: $(VENV)/.ready  ## the whole test suite
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/.ready  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gate: $(VENV)/.ready  ## compile every kernel for every chip, without a GPU
	$(BIN)/python -m benchmarks.compile_gate $(ARGS)

bench: $(VENV)/.ready  ## ratios to the published formulas
	$(BIN)/python -m benchmarks --quick $(ARGS)

# uv installs the same packages as pip, in a fraction of the time; pip serves where uv does not run.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv || true
	if $(BIN)/python -m uv --version >/dev/null 2>&1; then \
		$(BIN)/python -m uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[examples,dev]'; \
	else \
		$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[examples,dev]'; \
	fi
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info runs
