#!/usr/bin/env bash
# Forgetting a Trainer's model and optimizer frees not a byte: its callback handler has both a second time.
# Why one would guess otherwise: after free_memory(), the documented call between two trainings, the attributes of the
# Trainer look like the last owners. callback_handler is internal, and its name tells nothing of weights.
# Where it hurts: evaluation, generation or a second training in the same process, with the Trainer still in a variable
# (for its state or its log): weights and two Adam states a parameter stay on the device, and the next model may find no
# room though "everything" was set to None.
# What this project does: ds_sft/engine/release.py empties the whole Trainer, after free_memory().
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0
"$work/venv/bin/pip" install --quiet transformers==5.23.0 accelerate==1.15.0
export HOME="$work" CUDA_VISIBLE_DEVICES=
cd "$work"
venv/bin/python -I - <<'EOF'
import gc
import sys
import weakref
from importlib.metadata import version

import torch
from transformers import PrinterCallback, Qwen3Config, Qwen3ForCausalLM, Trainer, TrainingArguments

config = Qwen3Config(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                     num_key_value_heads=1, head_dim=16)
rows = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 2
arguments = TrainingArguments(output_dir="out", max_steps=1, use_cpu=True, save_strategy="no", report_to="none",
                              disable_tqdm=True, logging_strategy="no")


def alive():
    """Bytes of the model's weights and of Adam's states that somebody still refers to."""
    gc.collect()
    return sum(tensor.nbytes for one in watched if (tensor := one()) is not None)


def trained():
    """A Trainer after its training; nobody else refers to its model."""
    trainer = Trainer(model=Qwen3ForCausalLM(config), args=arguments, train_dataset=rows)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    tensors = list(trainer.model.parameters())
    for states in trainer.optimizer.state.values():
        tensors += [state for state in states.values() if torch.is_tensor(state)]
    return trainer, [weakref.ref(tensor) for tensor in tensors]


trainer, watched = trained()
total = alive()
trainer.accelerator.free_memory()
trainer.model = trainer.model_wrapped = trainer.optimizer = trainer.lr_scheduler = None
forgotten = alive()
handler = trainer.callback_handler
handler.model = handler.optimizer = handler.lr_scheduler = None
cleared = alive()

print("transformers", version("transformers"), "accelerate", version("accelerate"), "torch", torch.__version__)
print(f"weights and Adam's states after training: {total} bytes")
print("after free_memory() and model, model_wrapped, optimizer, lr_scheduler = None. Expected: 0 bytes")
print(f"  seen: {forgotten} bytes, so {total - forgotten} were freed")
print(f"after the same of trainer.callback_handler: {cleared} bytes")
if forgotten != total:
    sys.exit("Changed: forgetting them frees memory.")
if cleared != 0:
    sys.exit("Changed: somebody else than the callback handler has them, too.")
print("As described: the callback handler kept them all.")
EOF
