#!/usr/bin/env bash
# generate(no_repeat_ngram_size=...) counts the padding of a batch as a part of the prompt.
# Why one would guess otherwise: the attention mask says what is padding, and repetition_penalty beside it gives a padded
# prompt the scores of the prompt alone. The n-grams are read from all ids of a row.
# Where it hurts: a model whose pad token also ends its answers, as Qwen's base models in many recipes, cannot end them
# in a batch of prompts of several lengths, and alone it can: other answers, that go on to the limit.
# What this project does: ds_sft/evaluation gives the prompts of a batch one length where no_repeat_ngram_size holds.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
export HOME="$work" PATH="$work/venv/bin:$PATH" CUDA_VISIBLE_DEVICES=
cd "$work"
python -I - <<'EOF' >"$work/out" 2>&1 || { cat "$work/out" >&2; exit 1; }
import sys
from importlib.metadata import version

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

torch.manual_seed(0)
PAD = 0
model = Qwen3ForCausalLM(
    Qwen3Config(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                num_key_value_heads=1, head_dim=16, pad_token_id=PAD, eos_token_id=PAD)
).eval()


def tokens_without_a_chance(ids, **options):
    """What the first token of an answer can never be."""
    ids = torch.tensor([ids])
    mask = (torch.arange(ids.shape[1]) >= (ids[0] == PAD).sum()).long()[None]
    made = model.generate(ids, attention_mask=mask, max_new_tokens=1, do_sample=False, return_dict_in_generate=True,
                          output_scores=True, **options)
    return (made.scores[0][0] == -torch.inf).nonzero().flatten().tolist()


prompt = [5, 6, 7]
padded = [PAD, PAD, *prompt]
alone, beside = (tokens_without_a_chance(ids, no_repeat_ngram_size=1) for ids in (prompt, padded))
print("Versions: transformers", version("transformers"), "torch", version("torch"))
print("Tokens without a chance after the prompt 5 6 7, expected padded or not: 5 6 7")
print("Tokens without a chance, seen without padding:", *alone)
print("Tokens without a chance, seen with two pad tokens before it:", *beside)
if alone != prompt:
    sys.exit("Changed: without padding other tokens have no chance.")
if beside != [PAD, *prompt]:
    sys.exit("Changed: padding is not counted any more.")
print("As described: padding is counted.")
EOF
grep -E "^(Versions|Tokens|As described)" "$work/out"
