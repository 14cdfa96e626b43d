#!/usr/bin/env bash
#SBATCH --signal=B:TERM@600
#SBATCH --requeue
# One run of unlearn_harm_new.py on one node, however often the scheduler stops it. Ten minutes before the end of a job
# this script, not its launcher, gets a SIGTERM. It passes that on to the training processes, which end their step and
# save a checkpoint; then the job is queued again and continues. (Not for zero3_offload.yaml, which has no checkpoints.)
# Submit it from the repository's folder. It uses .venv/bin/python, which `make setup` makes; PYTHON names another one.
#
#     sbatch --gpus 8 scripts/slurm.sh harmful_unlearn/launch/fsdp2.yaml 8 --model_name facebook/opt-2.7b --batch_size 2
set -euo pipefail
fail() {
    echo "error: $1" >&2
    exit 2
}
[[ $# -ge 2 ]] || fail "slurm.sh LAUNCH_FILE PROCESSES [FLAGS of unlearn_harm_new.py]"
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
[[ -f harmful_unlearn/unlearn_harm_new.py ]] || fail "$PWD is not the repository's folder: submit the job from there"
python=${PYTHON:-.venv/bin/python}
command -v "$python" > /dev/null || fail "there is no $python: run make setup, or set PYTHON to an interpreter"
config=$1 processes=$2
shift 2

stopped= passed_on=
trap 'stopped=1' TERM
"$python" -m accelerate.commands.launch --config_file "$config" --num_processes "$processes" \
    harmful_unlearn/unlearn_harm_new.py "$@" --resume &
launcher=$!
while kill -0 "$launcher" 2> /dev/null; do
    # The launcher may not have started them yet. Once only: at a second signal they would save no checkpoint.
    if [[ $stopped && ! $passed_on ]] && pkill -TERM -P "$launcher" -f unlearn_harm_new.py; then
        passed_on=1
    fi
    sleep 1 || true # a signal to the whole group ends it
done
code=0
wait "$launcher" || code=$?
if [[ $stopped && $code -ne 0 ]]; then
    ${SLURM_JOB_ID:+scontrol requeue "$SLURM_JOB_ID"}
fi
exit "$code"
