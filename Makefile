# make demo | test | check | clean. The environment in .venv is made when missing.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
PIP_ARGS ?= -c constraints.txt
BIN := $(VENV)/bin

.PHONY: demo test check clean

demo: $(VENV)/installed
	$(BIN)/sfumato fit digits --out runs/digits --budget 2m --overwrite
	$(BIN)/sfumato generate runs/digits -n 100 --out samples/digits --sheet samples/digits.png --overwrite
	$(BIN)/sfumato reconstruct runs/digits digits -n 50 --out samples/digits-reconstructed --sheet samples/digits-reconstructed.png --overwrite
	$(BIN)/sfumato evaluate runs/digits digits
	@echo
	@echo "Look at samples/digits.png (new) and samples/digits-reconstructed.png (through the codec and back)."
	@echo "Next: $(BIN)/sfumato fit mnist --out runs/mnist --budget 5m"

test: $(VENV)/installed-dev
	$(BIN)/pytest -q

check: $(VENV)/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache

$(BIN)/pip:
	@test -n "$(PYTHON)" || { echo "sfumato needs Python 3.11 or newer (name one: make PYTHON=/path/to/python3)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/pip install -q $(PIP_ARGS) -e .
	@touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/pip install -q $(PIP_ARGS) -e '.[dev]'
	@touch $@ $(VENV)/installed
