#!/usr/bin/env bash
# All methods and ablations on the demo's two worlds, three seeds each, and their reports: about half an hour.
# One thread, so that the figures are the same on any number of cores. If it is interrupted, run it again: it continues.
#
#     make reproduce-demo                                  # sets up .venv first, then runs this script
#     scripts/reproduce_demo.sh --runs sku task_vector     # more flags for both calls of reproduce.py
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python

# compare WORLDS OUTPUT RECIPE [FLAG ...]: train and measure every run of a recipe on the worlds of three seeds.
compare() {
    local worlds=$1 output=$2 recipe=$3
    shift 3
    OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$python" harmful_unlearn/reproduce.py --seeds 0 1 2 \
        --model_name "$worlds/seed-{seed}/base" --output "$output" \
        --harmful_dataset "$worlds/seed-{seed}/data/harmful.jsonl" \
        --unseen_dataset "$worlds/seed-{seed}/data/unseen.jsonl" \
        --normal_dataset "$worlds/seed-{seed}/data/normal.csv" \
        --decoding sampled greedy --temperature 1 --top_k 0 --max_new_tokens 48 --precision fp32 \
        --recipe "$recipe" "$@"
}

# A base model that was taught to refuse a fifth of its harmful questions.
"$python" harmful_unlearn/demo.py --worlds_only --seeds 3
compare logs/demo logs/reproduce-demo demo \
    --alpha_sweep 0,0.25,...,2 --sweep_runs sku task_vector lands \
    --harm_category 'Economic Crime' --harm_category 'Environmental Damage' \
    --harm_category 'Disrupting Public Order' "$@"
"$python" harmful_unlearn/demo.py --check_judge logs/reproduce-demo

# A base model that was taught no refusals.
"$python" harmful_unlearn/demo.py --worlds_only --seeds 3 --refusal_share 0 --output logs/demo-no-refusals
compare logs/demo-no-refusals logs/reproduce-demo-no-refusals demo-no-refusals \
    --runs sku land lands lands-no-harm task_vector-alpha-2 ga_mismatch "$@"
"$python" harmful_unlearn/demo.py --check_judge logs/reproduce-demo-no-refusals --refusal_share 0
