# Everything from a fresh checkout: `make demo`, `make test`.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint slow bench bench-transport clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    train SSR and its rivals on Wikipedia text and write runs/demo/report.html"
	@echo "             (options: make demo ARGS='--train.steps 100 --only softmax ssr-s')"
	@echo "make test    lint and the whole test suite        make slow    the long tests"
	@echo "make bench   time per step of SSR against vanilla        make bench-transport   the solver against public ones"
	@echo "PYTHON=python3.12 chooses the interpreter, TORCH='torch==2.13.0 --index-url ...' the build of torch"

# torch first and by itself: what comes after is satisfied by it and cannot pull another build.
$(VENV)/.installed: pyproject.toml scripts/make_venv.py
	$(PYTHON) scripts/make_venv.py $(VENV)
	@echo "Installing torch and the lab into $(VENV) (some minutes) ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[lab,dev]"
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/sinkroute demo $(ARGS)

test: $(VENV)/.installed lint
	$(BIN)/python -m pytest -n 2 -q $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

slow: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 -q -m slow

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/step_time.py

# The peers' pins are no business of the project's: they get an environment of their own.
.venv-bench/.installed: benchmarks/requirements.txt pyproject.toml scripts/make_venv.py
	$(PYTHON) scripts/make_venv.py .venv-bench
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/requirements.txt -e .
	@touch $@

bench-transport: .venv-bench/.installed
	.venv-bench/bin/python -m benchmarks.transport $(ARGS)

clean:
	rm -rf $(VENV) .venv-bench runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
