# Works from a fresh clone with nothing but make and Python 3.11 or newer: `make demo`.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

MODEL := var-c10-d4
BUNDLE := qexport-out/$(MODEL)-w4a16
PICTURES := qexport-out/demo.png

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format ci clean

help:  ## List these targets.
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 10

# Once, and again when a dependency changes. The stamp is written last, so a failed install is repeated.
$(STAMP): pyproject.toml .ci/constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"qexport needs Python 3.11 or newer; $(PYTHON) is {v[0]}.{v[1]}, try make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[export,dev]" -c .ci/constraints.txt
	@touch $@

install: $(STAMP)  ## Build .venv with qexport, what it needs for export, and the developer tools.

demo: $(STAMP)  ## Quantise a small VAR to 4 bits, verify the bundle, draw pictures with it.
	$(BIN)/qexport quantize --model $(MODEL) --wbits 4 --overwrite
	$(BIN)/qexport verify $(BUNDLE)
	$(BIN)/qexport generate $(BUNDLE) --classes 0,1,2,3,4,5,6,7,8,9 --n 20 --out $(PICTURES)
	@echo "Look at $(PICTURES)"

# Two processes of one thread each: threads of several share cores badly. A file's tests stay together.
test: $(STAMP)  ## Run the tests.
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(STAMP)  ## Check style, types and the order of the floors.
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright --pythonpath $(BIN)/python
	@$(BIN)/lint-imports

format: $(STAMP)  ## Rewrite the files in the house's style.
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

ci:  ## Everything that must hold before a change goes in.
	@.ci/run

clean:  ## Remove the environment and the demo's results.
	rm -rf .venv $(BUNDLE) $(PICTURES)
