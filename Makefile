# The two commands: `make demo` and `make test`. Each sets up .venv when it is missing.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
, := ,

.PHONY: help setup demo reproduce-demo test test-slow fuzz data clean

help:
	@echo "make demo       SKU end to end on a small offline world (no hub, no GPU)"
	@echo "make reproduce-demo  all methods and ablations on two such worlds, three seeds, and the reports (an hour)"
	@echo "make test       the tests (make test-slow: the long ones)"
	@echo "make fuzz       many random inputs to all that reads files, flags and judges' words (FUZZ_EXAMPLES=2000 a test)"
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

# One thread: the same figures on any number of cores. $(call compare,WORLDS,OUTPUT,RECIPE and more flags)
define compare
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(RUN) harmful_unlearn/reproduce.py --seeds 0 1 2 \
		--model_name '$(1)/seed-{seed}/base' --output $(2) \
		--harmful_dataset '$(1)/seed-{seed}/data/harmful.jsonl' \
		--unseen_dataset '$(1)/seed-{seed}/data/unseen.jsonl' \
		--normal_dataset '$(1)/seed-{seed}/data/normal.csv' \
		--decoding sampled greedy --temperature 1 --top_k 0 --max_new_tokens 48 --batch_size 64 --precision fp32 \
		--recipe $(3) $(REPRODUCE_FLAGS)
endef

# Two worlds: a base that was taught to refuse a fifth of its harmful questions, and one that was taught none.
reproduce-demo: $(READY)
	$(RUN) harmful_unlearn/demo.py --worlds_only --seeds 3
	$(call compare,logs/demo,logs/reproduce-demo,demo --alpha_sweep 0$(,)0.25$(,)...$(,)2 \
		--sweep_runs sku task_vector lands --harm_category 'Economic Crime' \
		--harm_category 'Environmental Damage' --harm_category 'Disrupting Public Order')
	$(RUN) harmful_unlearn/demo.py --check_judge logs/reproduce-demo
	$(RUN) harmful_unlearn/demo.py --worlds_only --seeds 3 --refusal_share 0 --output logs/demo-no-refusals
	$(call compare,logs/demo-no-refusals,logs/reproduce-demo-no-refusals,demo-no-refusals \
		--runs sku land lands lands-no-harm task_vector-alpha-2 ga_mismatch)
	$(RUN) harmful_unlearn/demo.py --check_judge logs/reproduce-demo-no-refusals --refusal_share 0

test: $(READY)
	HF_HUB_OFFLINE=1 $(RUN) -m pytest --numprocesses 2 --dist worksteal

test-slow: $(READY)
	HF_HUB_OFFLINE=1 $(RUN) -m pytest -m slow

# Inputs drawn anew each time. What fails is printed, with the line that reproduces it, and kept in .hypothesis.
fuzz: $(READY)
	FUZZ_EXAMPLES=$(or $(FUZZ_EXAMPLES),2000) HF_HUB_OFFLINE=1 $(RUN) -m pytest tests/test_fuzz.py

data: $(READY)
	$(RUN) dataloader/fetch_truthfulqa.py

clean:
	rm -rf $(VENV) logs/demo logs/demo-no-refusals logs/reproduce-demo logs/reproduce-demo-no-refusals
