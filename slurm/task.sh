#!/bin/bash
# One rank: srun starts this once for each, and it becomes the command, so that signals reach Python itself.
#
#     srun --ntasks-per-node=8 slurm/task.sh python ds_sft/train.py --config CONFIG.yaml
#
# Nothing in torch, transformers or DeepSpeed reads Slurm's variables for a rank.
: "${SLURM_PROCID:?start this with srun}"
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS NODE_RANK=$SLURM_NODEID
export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_STEP_NUM_NODES))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
exec "$@"
