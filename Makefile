# The two commands: `make demo` and `make test`. Each sets up .venv when it is missing.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: help setup demo test test-slow data clean

help:
	@echo "make demo       SKU end to end on a small offline world (no hub, no GPU)"
	@echo "make test       the tests (make test-slow: the long ones)"
	@echo "make data       fetch TruthfulQA.csv into dataloader/"
	@echo "make setup      the virtual environment alone"
	@echo "make clean      remove the virtual environment and the demo's output"

# The stamp is newer than the pins, or the pins are installed again.
$(READY): requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

setup: $(READY)

demo: $(READY)
	$(RUN) harmful_unlearn/demo.py $(DEMO_FLAGS)

test: $(READY)
	HF_HUB_OFFLINE=1 $(RUN) -m pytest

test-slow: $(READY)
	HF_HUB_OFFLINE=1 $(RUN) -m pytest -m slow

data: $(READY)
	$(RUN) dataloader/fetch_truthfulqa.py

clean:
	rm -rf $(VENV) logs/demo
