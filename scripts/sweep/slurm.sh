#!/usr/bin/env bash
# A sweep on a Slurm cluster: every task of the array does one share of the runs, one GPU each.
#
#   sbatch --array=1-8 scripts/sweep/slurm.sh my_sweep.yaml                    # flags of sweep.py may follow
#   python scripts/sweep/sweep.py my_sweep.yaml --list                         # what is finished
#
# Give `device: cuda` in the YAML, and --results a folder that all nodes see. A task that was killed continues when it is
# submitted again; finished runs are not repeated.
#SBATCH --job-name=oneshot-sweep
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --requeue
set -euo pipefail
: "${SLURM_ARRAY_TASK_ID:?submit it as an array: sbatch --array=1-N}" "${SLURM_ARRAY_TASK_COUNT:?}"
exec python scripts/sweep/sweep.py "$@" --shard "$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN + 1))/$SLURM_ARRAY_TASK_COUNT"
