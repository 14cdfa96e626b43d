# The two commands: `make demo` and `make test`. Each sets up .venv when it is missing.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: help setup demo reproduce-demo test test-slow data clean

help:
	@echo "make demo       SKU end to end on a small offline world (no hub, no GPU)"
	@echo "make reproduce-demo  all methods and ablations on that world, three seeds, and the report (25 minutes)"
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

# One thread: the same figures on any number of cores.
reproduce-demo: $(READY)
	$(RUN) harmful_unlearn/demo.py --worlds_only --seeds 3
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(RUN) harmful_unlearn/reproduce.py --recipe demo --seeds 0 1 2 \
		--model_name 'logs/demo/seed-{seed}/base' --output logs/reproduce-demo \
		--harmful_dataset 'logs/demo/seed-{seed}/data/harmful.jsonl' \
		--unseen_dataset 'logs/demo/seed-{seed}/data/unseen.jsonl' \
		--normal_dataset 'logs/demo/seed-{seed}/data/normal.csv' \
		--decoding sampled greedy --temperature 1 --top_k 0 --max_new_tokens 48 --batch_size 64 --precision fp32 \
		--alpha_sweep 0,0.25,...,2 --harm_category 'Economic Crime' --harm_category 'Environmental Damage' \
		--harm_category 'Disrupting Public Order' $(REPRODUCE_FLAGS)
	$(RUN) harmful_unlearn/demo.py --check_judge logs/reproduce-demo

test: $(READY)
	HF_HUB_OFFLINE=1 $(RUN) -m pytest

test-slow: $(READY)
	HF_HUB_OFFLINE=1 $(RUN) -m pytest -m slow

data: $(READY)
	$(RUN) dataloader/fetch_truthfulqa.py

clean:
	rm -rf $(VENV) logs/demo logs/reproduce-demo
