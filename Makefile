# The two commands: `make demo` and `make test`. Each makes .venv first if it is missing.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
# The oldest versions that are supported; transformers of that time needs a hub client below 2.
OLDEST := torch==2.11.0 transformers==5.17.0 huggingface_hub==1.33.0

.PHONY: help setup demo laptop reproduce-demo robustness-demo search-demo bench-gpu lint
.PHONY: test test-slow test-oldest fuzz data clean

help:
	@echo "make demo            SKU end to end on a small offline world (no hub, no GPU); DEMO_FLAGS=..."
	@echo "make test            lint, then the tests"
	@echo "make test-slow       the long tests"
	@echo "make test-oldest     the tests with the oldest supported versions: $(OLDEST)"
	@echo "make lint            ruff (lint and format) and mypy"
	@echo "make fuzz            random inputs for everything that reads files, flags and judges' replies; FUZZ_EXAMPLES=2000"
	@echo "make laptop          unlearning on a real language model of 135M parameters, on a CPU; LAPTOP_MODEL=..."
	@echo "make reproduce-demo  all methods and ablations on two small worlds, three seeds, with reports (half an hour)"
	@echo "make robustness-demo  the demo's worlds under every attack, beside an oracle, three seeds (under an hour)"
	@echo "make search-demo     every method with the same budget of search on the demo's worlds, three seeds (hours)"
	@echo "make bench-gpu       the GPU rows of benchmarks/RESULTS.md, in 8 minutes on one H100; BENCH_FLAGS=..."
	@echo "make data            fetch TruthfulQA.csv into dataloader/"
	@echo "make setup           only the virtual environment"
	@echo "make clean           remove the virtual environment and the output of the demos"

# The stamp is newer than the pins, or the pins are installed again.
$(READY): requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

setup: $(READY)

demo: $(READY)
	$(RUN) harmful_unlearn/demo.py $(DEMO_FLAGS)

laptop: $(READY)
	scripts/laptop.sh $(LAPTOP_FLAGS)

reproduce-demo: $(READY)
	scripts/reproduce_demo.sh $(REPRODUCE_FLAGS)

robustness-demo: $(READY)
	scripts/robustness_demo.sh $(ROBUSTNESS_FLAGS)

search-demo: $(READY)
	scripts/search_demo.sh $(SEARCH_FLAGS)

bench-gpu: $(READY)
	$(RUN) benchmarks/gpu.py $(BENCH_FLAGS)

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

test: lint
	HF_HUB_OFFLINE=1 $(RUN) -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-slow: $(READY)
	HF_HUB_OFFLINE=1 $(RUN) -m pytest -m slow

$(VENV)-oldest/.ready: requirements.txt Makefile
	$(PYTHON) -m venv $(VENV)-oldest
	grep -vE '^(torch|transformers|huggingface_hub)==' requirements.txt > $(VENV)-oldest/others.txt
	$(VENV)-oldest/bin/python -m pip install --quiet --disable-pip-version-check -r $(VENV)-oldest/others.txt $(OLDEST)
	@touch $@

test-oldest: $(VENV)-oldest/.ready
	@echo "the oldest supported versions: $(OLDEST)"
	HF_HUB_OFFLINE=1 $(VENV)-oldest/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Inputs are drawn anew each time. A failure is printed with the line that reproduces it, and kept in .hypothesis.
fuzz: $(READY)
	FUZZ_EXAMPLES=$(or $(FUZZ_EXAMPLES),2000) HF_HUB_OFFLINE=1 $(RUN) -m pytest tests/guarantees/test_fuzz_*.py

data: $(READY)
	$(RUN) dataloader/fetch_truthfulqa.py

clean:
	rm -rf $(VENV) $(VENV)-oldest logs/demo logs/demo-no-refusals logs/reproduce-demo logs/reproduce-demo-no-refusals \
		logs/robustness-demo logs/search-demo logs/search-demo-no-refusals
