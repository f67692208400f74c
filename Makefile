# make demo   make an environment, install, quantize and measure the model that ships with the package
# make test   make an environment, install, and run every check

VENV ?= .venv
PYTHON ?= python3
PIP = $(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test clean

demo: $(VENV)/installed
	$(VENV)/bin/gptq demo

test: $(VENV)/installed-dev
	PATH="$(abspath $(VENV))/bin:$$PATH" scripts/check

# First and by itself, so that no other requirement chooses another torch.
$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	touch $@

$(VENV)/installed: $(VENV)/torch pyproject.toml constraints.txt
	$(PIP) --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/torch pyproject.toml constraints.txt
	$(PIP) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) *.egg-info
