#!/bin/bash
# One rank: srun starts this once for each, and it becomes the command, so that signals reach Python itself.
#
#     srun --ntasks-per-node=8 slurm/task.sh python ds_sft/train.py --config CONFIG.yaml
#
# Nothing in torch, transformers or DeepSpeed reads Slurm's variables for a rank. The ranks of a node are consecutive,
# however srun deals tasks to nodes (--distribution): so are those that share a row, or a disk.
: "${SLURM_PROCID:?start this with srun}"
tasks=()  # of each node
for part in ${SLURM_STEP_TASKS_PER_NODE//,/ }; do  # such as 8(x2),4
    [[ $part =~ ^([0-9]+)(\(x([0-9]+)\))?$ ]]
    for ((i = 0; i < ${BASH_REMATCH[3]:-1}; i++)); do tasks+=("${BASH_REMATCH[1]}"); done
done
rank=$SLURM_LOCALID
for ((node = 0; node < SLURM_NODEID; node++)); do ((rank += tasks[node])); done
export RANK=$rank LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS NODE_RANK=$SLURM_NODEID
export LOCAL_WORLD_SIZE=${tasks[SLURM_NODEID]}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
exec "$@"
