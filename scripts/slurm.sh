#!/usr/bin/env bash
#SBATCH --signal=B:TERM@600
#SBATCH --requeue
# One run of unlearn_harm_new.py on one node, however often the scheduler stops it. Ten minutes before the end of a job
# this script, not its launcher, gets a SIGTERM. It passes that on to the training processes, which end their step and
# save a checkpoint; then the job is queued again and continues. (Not for zero3_offload.yaml, which has no checkpoints.)
#
#     sbatch --gpus 8 scripts/slurm.sh harmful_unlearn/launch/fsdp2.yaml 8 --model_name facebook/opt-2.7b --batch_size 2
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
config=$1 processes=$2
shift 2

.venv/bin/python -m accelerate.commands.launch --config_file "$config" --num_processes "$processes" \
    harmful_unlearn/unlearn_harm_new.py "$@" --resume &
launcher=$! stopped=
trap 'stopped=1; pkill -TERM -P "$launcher" || true' TERM
code=0
wait "$launcher" || code=$?
while kill -0 "$launcher" 2> /dev/null; do # the trap has ended the first wait
    code=0
    wait "$launcher" || code=$?
done
if [[ $stopped && $code -ne 0 ]]; then
    ${SLURM_JOB_ID:+scontrol requeue "$SLURM_JOB_ID"}
fi
exit "$code"
