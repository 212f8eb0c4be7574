# What differs between sites; sourced by every job on its first node. Its exports travel to all nodes.
# shellcheck shell=bash disable=SC2034
# ---- Edit these lines ----
# module load cuda/12.8
# source /path/to/venv/bin/activate    # without it: .venv beside the folder slurm, else `python3`
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0 HF_HOME=/shared/huggingface HF_HUB_OFFLINE=1
SRUN_FLAGS=()    # pyxis and enroot: (--container-image=/shared/ds_sft.sqsh --container-mounts=/shared,/home)
CONTAINER=()     # apptainer: (apptainer exec --nv --bind /shared /shared/ds_sft.sif)
