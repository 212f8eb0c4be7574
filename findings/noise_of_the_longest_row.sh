#!/usr/bin/env bash
# NEFTune in transformers' Trainer (neftune_noise_alpha): a row gets less noise beside a longer one.
# Why one would guess otherwise: the method (Jain et al., 2310.05914) adds to each number of an embedding uniform noise
# of at most alpha / sqrt(L * d), where L is the length of the sequence, and d the width. A row's noise then depends on
# its own length, and padding is no part of it: attention does not see it, and no loss is computed on it.
# Trainer takes for L all places of a row in the batch, padding included. Rows that are laid end to end in one sequence
# are one row of all their tokens to it.
# Where it hurts: the same rows and the same alpha are another training with another batch size, another order of rows, or
# with packing: with the longest row in the batch 16 times as long as another one, that has a quarter of its noise.
# What this project does: ds_sft/model/neftune.py adds the noise by a row's own length, padded or laid end to end.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6
export HOME="$work" HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES=
cd "$work"
venv/bin/python -I - <<'EOF'
import sys

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

ALPHA, WIDTH, SHORT, LONG = 5.0, 32, 16, 256


def row(length):
    ids = [5] * length + [0] * (LONG - length if padded else 0)
    mask = [1] * length + [0] * (len(ids) - length)
    return {"input_ids": ids, "attention_mask": mask, "labels": [i if m else -100 for i, m in zip(ids, mask)]}


class Listen(TrainerCallback):
    """Hears what the embedding puts out in training, behind the noise."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        model.get_input_embeddings().register_forward_hook(lambda module, ids, out: heard.append((ids[0], out.detach())))


def largest_noise():
    """Of the numbers of the short row's embeddings."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=1,
                                         num_attention_heads=2, max_position_embeddings=LONG))
    table = model.get_input_embeddings().weight.detach().clone()
    args = TrainingArguments("out", max_steps=1, per_device_train_batch_size=len(rows), neftune_noise_alpha=ALPHA,
                             report_to="none", disable_tqdm=True, save_strategy="no", use_cpu=True,
                             train_sampling_strategy="sequential")
    Trainer(model, args, train_dataset=rows, callbacks=[Listen()]).train()
    ids, out = heard.pop()
    return (out[0, :SHORT] - table[ids[0, :SHORT]]).abs().max().item()


heard, padded = [], False
rows = [row(SHORT)]
alone = largest_noise()
padded = True
rows = [row(SHORT), row(LONG)]
beside = largest_noise()
bound = ALPHA / (SHORT * WIDTH) ** 0.5
print("transformers", transformers.__version__)
print(f"a row of {SHORT} tokens, alpha {ALPHA:g}, width {WIDTH}: noise of at most {bound:.3f} by the method")
print(f"alone: {alone:.3f}")
print(f"beside a row of {LONG} tokens: expected: as much; seen: {beside:.3f}")
if not 0.9 * bound < alone <= bound:
    sys.exit("Changed: a row alone has other noise than the method says.")
if not beside <= bound / 3.9:
    sys.exit("Changed: a row has its own noise beside a longer one.")
print("As described: the noise is that of the longest row of the batch.")
EOF
