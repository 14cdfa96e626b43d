#!/usr/bin/env bash
# Every method with the same budget of search, on the demo's two worlds: 12 trials each on validation prompts, then the
# chosen settings on test prompts, over three seeds. Some hours; once it has built the worlds, other processes may share
# the trials (its command of reproduce.py with --search_only).
# One thread, and verdicts that are exact. If it is interrupted, run it again: it continues.
#
#     make search-demo                                     # sets up .venv first, then runs this script
#     scripts/search_demo.sh --search 24                   # more flags for both calls of reproduce.py
#     scripts/search_demo.sh demo-no-refusals              # one of the two worlds
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
worlds=(demo demo-no-refusals)
if [[ ${1:-} == demo* ]]; then
    worlds=("$1")
    shift
fi

for world in "${worlds[@]}"; do
    refusals=()
    [[ $world == demo ]] || refusals=(--refusal_share 0 --output "logs/$world")
    "$python" harmful_unlearn/demo.py --worlds_only --seeds 3 "${refusals[@]}"
    data="logs/$world/seed-{seed}/data"
    OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$python" harmful_unlearn/reproduce.py --search 12 --seeds 0 1 2 \
        --model_name "logs/$world/seed-{seed}/base" --recipe "$world" --output "logs/search-$world" \
        --harmful_dataset "$data/harmful.jsonl" --unseen_dataset "$data/unseen.jsonl" \
        --normal_dataset "$data/normal.csv" --judge "phrases:$data/harmful_phrases.txt" \
        --decoding sampled greedy --temperature 1 --top_k 0 --max_new_tokens 48 --precision fp32 "$@"
done
