# make demo   make an environment, install, quantize and measure the model that ships with the package
# make test   make an environment, install, and run every check
# make fast   make an environment, install, import, and run the fast tests
# make smoke  the same, and the demo
# make docs   make an environment, install, and build the pages into docs/_build/html; every warning is an error
#
# TORCH_INDEX=URL   take torch from this index: https://download.pytorch.org/whl/cpu has the build without CUDA
# PYTHON=python3.13 the interpreter of the environment
# ALSO="python3.10 python3.13"   `make test` also runs `make fast` with these interpreters

VENV ?= .venv
PYTHON ?= python3
TORCH_INDEX ?=
ALSO ?=
PIP = $(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test fast smoke docs clean

demo: $(VENV)/installed
	$(VENV)/bin/gptq demo

test: $(VENV)/installed-dev
	PATH="$(abspath $(VENV))/bin:$$PATH" scripts/check
	$(if $(ALSO),$(MAKE) -j2 $(addprefix fast-,$(ALSO)))

fast: $(VENV)/installed-dev
	$(VENV)/bin/python -c 'import gptq; print(gptq.__version__, gptq.quantize)'
	$(VENV)/bin/pytest -n 1 -m 'not slow'

smoke: fast
	$(VENV)/bin/gptq demo

fast-%:
	$(MAKE) fast PYTHON=$* VENV=$(VENV)-$*

docs: $(VENV)/installed-docs
	$(VENV)/bin/python -m sphinx -b html -W --keep-going docs docs/_build/html
	@echo "docs/_build/html/index.html"

# First and by itself, so that no other requirement chooses another torch.
$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	touch $@

$(VENV)/installed: $(VENV)/torch pyproject.toml constraints.txt
	$(PIP) --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/torch pyproject.toml constraints.txt
	$(PIP) --editable '.[dev]'
	touch $@

$(VENV)/installed-docs: $(VENV)/torch pyproject.toml constraints.txt
	$(PIP) --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) *.egg-info docs/_build
