# Two commands do all the set-up: `make serve` and `make test`. Everything they install goes into .venv.

# Triton's stubs exist for Python 3.10 to 3.13. Their numpy, 1.26, has wheels up to 3.12: on 3.13 it is compiled.
PYTHON ?= $(shell for newest in 12 13; do for p in python3 python3.12 python3.11 python3.10 python3.13; do \
	"$$p" -c "import sys; raise SystemExit(not (3, 10) <= sys.version_info[:2] <= (3, $$newest))" 2>/dev/null && echo $$p && exit; \
	done; done)
VENV ?= .venv
PORT ?= 8080
GRPC_PORT ?= 8001
PIPELINE ?=

.PHONY: setup serve test lint bench clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "make: no Python 3.10 to 3.13 found: install one, or say PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): torch and Triton are large, this takes some minutes the first time."
	$(VENV)/bin/python -m pip install --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(VENV)/bin/python -m pip install --disable-pip-version-check --quiet --editable ".[dev]"
	@touch $@

serve: $(VENV)/.installed
	@exec $(VENV)/bin/triptych serve --port $(PORT) --triton-grpc-port $(GRPC_PORT) $(addprefix --pipeline ,$(PIPELINE))

# What needs no Triton in two processes, of one thread each: they share the cores. Then what does, which has deadlines:
# two at a time as well, since most of it is waiting for servers to start, to be mended and to end.
test: $(VENV)/.installed-dev
	@status=0; \
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m "not server" -n 2 --dist loadfile --no-loadscope-reorder || status=1; \
	$(VENV)/bin/python -m pytest -m server -n 2 --dist loadfile --no-loadscope-reorder || status=1; \
	exit $$status

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

bench: $(VENV)/.installed-dev
	$(VENV)/bin/python -m bench.stack

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
