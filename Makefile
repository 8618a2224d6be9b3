# Archipel's commands. `make demo` and `make test` set up all they need in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2  # processes of make test; each computes with one thread

.PHONY: help setup setup-sky setup-ray demo test test-system test-ray check bench faults docs clean

help:
	@echo "make demo         the main job: clips in; experts, router, monolith, samples, scores and a report out"
	@echo "make test         the tests (minutes; no root, no network beyond the installation)"
	@echo "make setup-sky    .venv-sky, in which SkyPilot reads our task files (for one test)"
	@echo "make check        ruff, types, import directions"
	@echo "make test-system  the slow tests, and those that need Debian packages (installs them: needs root)"
	@echo "make test-ray     the tests with a Ray cluster on this machine"
	@echo "make bench        the head-to-heads, all of them; .venv/bin/python -m bench --goals: those that have a goal of speed"
	@echo "make faults       every fault of docs/reliability.md, in full counts (half an hour; root for full disks)"
	@echo "make docs         the generated pages of docs/"

# Installed anew only when what is declared has changed.
$(STAMP): pyproject.toml constraints.txt constraints-peers.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Archipel needs Python 3.11 or newer; set PYTHON=python3.12, for example"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement constraints-peers.txt
	@touch $(STAMP)

setup: $(STAMP)

# SkyPilot does not fit beside the rest; it only reads our task files, in an environment of its own.
.venv-sky/.installed: constraints-sky.txt
	test -x .venv-sky/bin/python || $(PYTHON) -m venv .venv-sky
	.venv-sky/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-sky.txt skypilot
	@touch $@

setup-sky: .venv-sky/.installed

# Ray has an environment of its own. It sees what lies in .venv through a .pth file (torch alone is a gigabyte), so that only
# what Ray brings along is installed, in half a minute; site.addsitedir also reads the .pth files there, Archipel's own.
.venv-ray/.installed: $(STAMP) constraints-ray.txt
	test -x .venv-ray/bin/python || $(PYTHON) -m venv .venv-ray
	.venv-ray/bin/python -c 'import pathlib, sys, sysconfig; pathlib.Path(sysconfig.get_path("purelib"), "beside.pth").write_text(f"import site; site.addsitedir({sys.argv[1]!r})\n")' "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	.venv-ray/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --constraint constraints-ray.txt 'ray[data]'
	@touch $@

setup-ray: .venv-ray/.installed

demo: setup
	$(BIN)/archipel demo demo

test: setup
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m "not slow and not system and not ray"

test-system: setup
	./.ci/system-packages
	./.ci/azurite
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m "slow and not system and not ray"
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile -m system

test-ray: setup-ray
	.venv-ray/bin/python -m pytest -q -m ray tests/ray

check: setup
	$(BIN)/ruff check src tests bench faults
	$(BIN)/ruff format --check src tests bench faults
	$(BIN)/mypy
	$(BIN)/lint-imports --config .importlinter

bench: setup
	$(BIN)/python -m bench

faults: setup
	$(BIN)/python -m faults --docs docs/reliability

docs: setup
	$(BIN)/python -m archipel.docs

clean:
	rm -rf $(VENV) .venv-sky .venv-ray build dist
