"""What a server must know of the dialogues that were learned: which tokens end an answer, and the chat template.

Both are exported with the weights, so that whoever loads the folder, and nothing of ours, talks to the model as it was
trained: `generate` stops by itself, and `apply_chat_template` renders what the encoder did.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ds_sft.config import Config
from ds_sft.data.templates import ChatTemplate, Reference, open_template
from ds_sft.data.turns import EMPTY_BLOCK
from ds_sft.runtime.distributed import Launch

# `Reference.pieces` in Jinja, under the values of `system_turn`, `end` and `thinking`.
REFERENCE = """
{%- if tools %}{{- raise_exception('this model was trained without tools') }}{%- endif %}
{%- if messages[0]['role'] != 'system' %}{{- system_turn }}{%- endif %}
{%- for message in messages %}
{%- if message['role'] == 'assistant' %}
{%- set content = message['content'] %}
{%- if thinking == 'keep' %}
{%- if message['reasoning_content'] %}
{%- set content = '<think>\\n' + message['reasoning_content'] + '\\n</think>\\n\\n' + content %}
{%- endif %}
{%- else %}
{%- if content.lstrip().startswith('<think>') and '</think>' in content %}
{%- set content = content.split('</think>', 1)[1].lstrip() %}
{%- endif %}
{%- if thinking == 'empty' %}{%- set content = '<think>\\n\\n</think>\\n\\n' + content %}{%- endif %}
{%- endif %}
{{- '<|im_start|>assistant\\n' + content + end }}
{%- if not loop.last or add_generation_prompt %}{{- '\\n' }}{%- endif %}
{%- else %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
""".strip()
# Put before an author's template. The line end after the last tag is none of the text (`trim_blocks`), and the author's
# text begins a line as before.
DEFAULT_SYSTEM = "{%- if messages[0]['role'] != 'system' %}{%- set messages = [TURN] + messages %}{%- endif %}\n"
NO_THINKING = "{%- if enable_thinking is not defined %}{%- set enable_thinking = false %}{%- endif %}\n"


@dataclass(frozen=True)
class Serving:
    """What is exported beside the weights, and what the user is told of it, a line each."""

    end_ids: list[int]  # what training taught to end an answer with; none where that is no token
    chat_template: str  # Jinja
    remarks: list[str]

    def say(self, launch: Launch) -> None:
        for line in self.remarks:
            launch.say(line)


def serving(config: Config, tokenizer: Any) -> Serving:
    """What a model trained with this configuration is served with.

    Raises:
        UserError: the key `template` names none that can be used.
    """
    template = open_template(config, tokenizer)
    if isinstance(template, Reference):
        return Serving([tokenizer.pad_token_id], _reference_template(template), _reference_remarks(tokenizer))
    known = {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}
    ends = dict.fromkeys([template.end, template.turns.call_end])  # not <|end|> between gpt-oss's channels
    source, remarks = _own_template(template, tokenizer)
    if template.end not in known:
        remarks.append(f"template: an answer ends with the text {template.end!r}, which is no token of this tokenizer: "
                       "no server stops there unless told to (stop).")  # fmt: skip
    return Serving([known[end] for end in ends if end in known], source, remarks)


def _reference_template(template: Reference) -> str:
    system_turn = f"<|im_start|>system\n{template.system_prompt}<|im_end|>\n"
    values = {"system_turn": system_turn, "end": template.end, "thinking": template.thinking}
    lines = [f"{{%- set {name} = {_literal(value)} %}}" for name, value in values.items()]
    return "\n".join([*lines, REFERENCE])


def _reference_remarks(tokenizer: Any) -> list[str]:
    """Where this tokenizer reads the reference's layout as something else than turns."""
    own = "template: tokenizer has the model's own" if tokenizer.chat_template else "a template: FILE.jinja may fit it"
    backend, remarks = tokenizer.backend_tokenizer, []
    pieces = {mark: backend.encode(mark, add_special_tokens=False).tokens for mark in ("<|im_start|>", "<|im_end|>")}
    split = [mark for mark, tokens in pieces.items() if len(tokens) > 1]
    if split:
        counts = " and ".join(f"{mark} ({len(pieces[mark])} tokens)" for mark in split)
        remarks.append(f"template: reference: {counts} are plain text to this tokenizer, no marks of a turn; {own}.")
    first = tokenizer("x").input_ids[:1]
    if tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]:
        remarks.append(f"template: reference: no {tokenizer.bos_token} stands before a row, though this tokenizer puts "
                       f"it before every text; {own}.")  # fmt: skip
    return remarks


def _own_template(template: ChatTemplate, tokenizer: Any) -> tuple[str, list[str]]:
    """The author's template with what this run adds by itself put before it; a line on what could not be put there."""
    source = template.renderer.source
    if template.system_prompt:
        turn = f"{{'role': 'system', 'content': {_literal(template.system_prompt)}}}"
        source = DEFAULT_SYSTEM.replace("TURN", turn) + source
    block = "" if template.thinking == "empty" else _written_before_an_answer(template, tokenizer)
    if not block:
        return source, []
    if template.thinking == "drop" and _renders(template, tokenizer, NO_THINKING + source, block):
        return NO_THINKING + source, []
    return source, [
        "template: an answer without reasoning is learned after an empty <think> block that generation does not start "
        "with, unless a client sends enable_thinking: false and this template knows it; with thinking: empty the model "
        "learns the block, too."
    ]


def _written_before_an_answer(template: ChatTemplate, tokenizer: Any) -> str:
    """The empty thinking block that the template writes before an answer, but not where generation starts."""
    question, answer = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
    prompt = _render(tokenizer, template.renderer.source, [question], True)
    whole = _render(tokenizer, template.renderer.source, [question, answer])
    found = EMPTY_BLOCK.match(whole, len(prompt)) if whole.startswith(prompt) else None
    return found[0] if found else ""


def _renders(template: ChatTemplate, tokenizer: Any, source: str, block: str = "") -> bool:
    """Whether `source` makes of dialogues what training made of them: the run's system turn, `block` after a prompt."""
    talk = [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant")]
    system = [{"role": "system", "content": template.system_prompt}] if template.system_prompt else []
    for messages, prompt in ((talk, False), (talk[:2], False), (talk[:1], True), (talk[:3], True)):
        wanted = _render(tokenizer, template.renderer.source, [*system, *messages], prompt) + (block if prompt else "")
        if not wanted or _render(tokenizer, source, messages, prompt) != wanted:
            return False
    return True


def _render(tokenizer: Any, source: str, messages: list[dict[str, str]], prompt: bool = False) -> str:
    """As a server does; nothing where the template refuses."""
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            messages, chat_template=source, tokenize=False, add_generation_prompt=prompt
        )
    except TemplateError:
        return ""
    return str(text)


def _literal(text: str) -> str:
    """A text as Jinja reads it in its source: JSON's escapes are Python's."""
    return json.dumps(text, ensure_ascii=False)
