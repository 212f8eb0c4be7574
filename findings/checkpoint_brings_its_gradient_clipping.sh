#!/usr/bin/env bash
# A ZeRO-2 checkpoint's gradient clipping replaces the one that the engine was configured with when it is loaded.
# Why one would guess otherwise: gradient_clipping is a key of the configuration, no state of training, and after the
# load engine.gradient_clipping() still answers with the configured value. The optimizer clips to the checkpoint's.
# Where it hurts: after a loss spike one goes back to an earlier checkpoint with a stricter clipping, and trains on with
# the old one: the engine names the remedy and does not apply it.
# What this project does: ds_sft/training/hyperparameters.py takes the asked value before loading and sets it again
# afterwards.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0
"$work/venv/bin/pip" install --quiet deepspeed==0.19.8
export HOME="$work" DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=
cd "$work"
venv/bin/python -I - <<'EOF'
import logging
import os
import socket
import sys

import deepspeed
import deepspeed.ops
import torch

deepspeed.utils.logger.setLevel(logging.ERROR)
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # an operator for inference, else compiled for a minute
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
deepspeed.init_distributed(dist_backend="gloo")


def engine(clipping):
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8, bias=False)
    config = {"train_batch_size": 1, "zero_optimization": {"stage": 2}, "gradient_clipping": clipping,
              "zero_allow_untested_optimizer": True}
    return deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), config=config)[0]


def step_length(engine):
    """How far a step with rate 1 moves the weights: the norm of its gradient, which is far above both limits."""
    weights = engine.module.weight.detach().clone()
    engine.backward(100 * engine(torch.ones(1, 8)).square().sum())
    engine.step()
    return (engine.module.weight.detach() - weights).norm().item()


first = engine(0.5)
moved_first = step_length(first)
first.save_checkpoint("checkpoint", tag="one")
fresh, resumed = engine(0.05), engine(0.05)
moved_fresh = step_length(fresh)
resumed.load_checkpoint("checkpoint", tag="one")
clip, configured, moved = resumed.optimizer.clip_grad, resumed.gradient_clipping(), step_length(resumed)
torch.distributed.destroy_process_group()

print("deepspeed", deepspeed.__version__, "torch", torch.__version__, "ZeRO-2, SGD with rate 1")
print(f"configured with 0.5, saved after it:   a step of length {moved_first:.3f}")
print(f"configured with 0.05, nothing loaded: a step of length {moved_fresh:.3f}")
print("configured with 0.05, that checkpoint loaded. Expected: clip_grad 0.05, and a step of length 0.050")
print(f"  seen: engine.gradient_clipping() {configured}, optimizer.clip_grad {clip}, a step of length {moved:.3f}")
if abs(moved_first - 0.5) > 0.001 or abs(moved_fresh - 0.05) > 0.001:
    sys.exit("Changed: a step is not as long as its gradient's limit.")
if (configured, clip) != (0.05, 0.5) or abs(moved - 0.5) > 0.001:
    sys.exit("Changed: the checkpoint does not replace the configured limit.")
print("As described: the checkpoint's limit is used.")
EOF
