#!/usr/bin/env bash
# Unlearning on a real language model, on a laptop: train, measure beside the base, and show answers side by side. It
# needs the hub once, no GPU, and 5.5 GB of memory. If it is interrupted, run it again: it continues.
#
#     make laptop                                          # sets up .venv first, then runs this script
#     scripts/laptop.sh --n_unseen 20                      # more flags for reproduce.py, but --seeds and --output
#
#     LAPTOP_RUN     what to train: sku, lands, ...        (ga_mismatch, which docs/claims.md recommends)
#
# Your own model and data, hub ids or paths (from the repository, if they are relative):
#     LAPTOP_MODEL   an instruct model                     (HuggingFaceTB/SmolLM2-135M-Instruct)
#     LAPTOP_DATA    harmful data, PKU-SafeRLHF's columns  (PKU-Alignment/PKU-SafeRLHF)
#     LAPTOP_UNSEEN  where unseen prompts come from        (its split "test"; of your own data, untouched rows)
#     LAPTOP_NORMAL  normal data, TruthfulQA's columns     (fetched to dataloader/TruthfulQA.csv)
#     LAPTOP_OUTPUT  where everything goes                 (logs/laptop)
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
recipe=HuggingFaceTB/SmolLM2-135M-Instruct
model=${LAPTOP_MODEL:-$recipe}
output=${LAPTOP_OUTPUT:-logs/laptop}
run=${LAPTOP_RUN:-ga_mismatch}

if [ -z "${LAPTOP_NORMAL:-}" ]; then
    "$python" dataloader/fetch_truthfulqa.py
    LAPTOP_NORMAL=dataloader/TruthfulQA.csv
fi
if [ -n "${LAPTOP_UNSEEN:-}" ]; then
    unseen=(--unseen_dataset "$LAPTOP_UNSEEN")
elif [ -z "${LAPTOP_DATA:-}" ]; then
    unseen=(--unseen_split test)
else
    unseen=()
fi

"$python" harmful_unlearn/reproduce.py --model_name "$model" --recipe "$recipe" --runs "$run" \
    --harmful_dataset "${LAPTOP_DATA:-PKU-Alignment/PKU-SafeRLHF}" ${unseen[@]+"${unseen[@]}"} \
    --normal_dataset "$LAPTOP_NORMAL" \
    --decoding greedy --max_new_tokens 80 --n_seen 50 --n_unseen 100 --n_normal 50 \
    "$@" --seeds 8888 --output "$output"
"$python" main.py --base "$model" --unlearned "$output/seed-8888/$run/unlearned" --greedy --max_length 200
