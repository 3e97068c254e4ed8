# make demo: train the digits pair and print where it is.   make test: every check that CI runs.
PYTHON ?= python3
BIN := .venv/bin
CONSTRAINED := PIP_CONSTRAINT=constraints.txt $(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: demo test clean
demo: .venv/base
	$(BIN)/sparsetwin train --out runs/digits

test: .venv/dev
	scripts/check

.venv/bin/pip:
	$(PYTHON) -m venv .venv

# torch goes first: anything that is installed before it could pull a build of its own choice.
.venv/base: .venv/bin/pip pyproject.toml constraints.txt
	$(CONSTRAINED) torch
	$(CONSTRAINED) --editable .
	touch $@

.venv/dev: .venv/base
	$(CONSTRAINED) --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv runs
