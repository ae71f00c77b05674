# make test | test-all | lint | demo | demo-long | clean-venv
# All but the last create .venv first, or install into it again if a requirements file has changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# a file's tests run in order in one process; several files at a time, on at most four cores
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

# Ctrl-C reaches the demo and make: the demo stops and says so, and make ends by the signal, without an error of its own
DEMO := @trap by=ctrl-c INT; $(BIN)/python -m latent_verse.demo
UNLESS_STOPPED := || { code=$$?; test "$$code$$by" = 130ctrl-c || exit $$code; }

.PHONY: test test-all lint demo demo-long clean-venv

$(VENV)/.installed: requirements.txt requirements-dev.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	@touch $@

test: $(VENV)/.installed
	$(PYTEST) -m "not slow"

test-all: $(VENV)/.installed
	$(PYTEST)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: $(VENV)/.installed  # 10.5 minutes on two cores; if interrupted, rerun it to resume; writes demo/index.html
	$(DEMO) --world small --out demo $(UNLESS_STOPPED)

demo-long: $(VENV)/.installed  # the full world: 1 h 45 on two cores; uses a GPU if there is one; writes demo/long/index.html
	$(DEMO) --world full --out demo/long $(UNLESS_STOPPED)

clean-venv:
	rm -rf $(VENV)
