#!/bin/bash
#SBATCH --job-name=qtune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --signal=B:TERM@180
# One agent on each computer, which starts a process for each of its cards; TERM three minutes before the limit saves.
# The folder that this is started from, with recipe, rows and runs/, is on all computers.  sbatch tools/slurm.sh recipe.toml
set -euo pipefail
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
port=$((29500 + SLURM_JOB_ID % 10000))  # two jobs may share a computer
srun torchrun \
  --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" \
  --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first:$port" \
  -m qtune run "$@" &
trap 'kill -TERM $!' TERM
wait $! || wait $!
