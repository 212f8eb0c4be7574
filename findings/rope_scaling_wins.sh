#!/usr/bin/env bash
# Where config.json has rope_parameters and the older rope_scaling, the older key replaces the newer one, silently.
# Why one would guess otherwise: rope_parameters is the key of transformers 5, a deprecated spelling usually yields to
# its successor, and a comment in modeling_rope_utils.py gives "values in rope_parameters dict" the first priority.
# Where it hurts: files that transformers 5 saved keep rope_theta inside rope_parameters. Who adds a model card's
# "rope_scaling": {"rope_type": "yarn", ...} for long rows loses it: positions turn at the default base, 10,000 instead
# of 1,000,000, and the model loads without a word. The other way round, a new factor in rope_parameters does nothing.
# What this project does: for rows that are too long ds_sft/model/limits.py writes out the whole rope_parameters,
# rope_theta included, and says to put it in place of rope_scaling.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0
"$work/venv/bin/pip" install --quiet transformers==5.23.0
export HOME="$work" CUDA_VISIBLE_DEVICES=
cd "$work"
venv/bin/python -I - <<'EOF'
import contextlib
import io
import json
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

from transformers import AutoConfig, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()
own = {"rope_type": "default", "rope_theta": 1000000.0}
yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
Qwen3ForCausalLM(Qwen3Config(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                             num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=256,
                             rope_parameters=own)).save_pretrained("model")
file = Path("model/config.json")
saved = json.loads(file.read_text())


def load(**keys):
    """The rotation of a model whose config.json has these keys, too, and what was said on loading it."""
    file.write_text(json.dumps(saved | keys))
    said = io.StringIO()
    handler = logging.logging.StreamHandler(said)
    logging.add_handler(handler)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        config = AutoConfig.from_pretrained("model")
    logging.remove_handler(handler)
    return config.rope_parameters, said.getvalue() + "".join(str(one.message) for one in warned)


print("transformers", version("transformers"))
print("saved by it: rope_parameters", saved["rope_parameters"])
added, said_added = load(rope_scaling=yarn)
print("added: rope_scaling", yarn)
print("  expected: yarn with rope_theta 1000000, or a word about two keys")
print("  seen:", added, "| said:", said_added or "nothing")
changed, said_changed = load(rope_scaling=yarn, rope_parameters=own | yarn | {"factor": 8.0})
print("added: rope_scaling as above, and factor 8 in rope_parameters")
print("  expected: factor 8, rope_theta 1000000")
print("  seen:", changed, "| said:", said_changed or "nothing")
if added != yarn | {"rope_theta": 10000.0} or changed != added:
    sys.exit("Changed: rope_scaling does not replace rope_parameters.")
if said_added or said_changed:
    sys.exit("Changed: something is said about it.")
print("As described: rope_scaling replaces all of rope_parameters, and nothing is said.")
EOF
