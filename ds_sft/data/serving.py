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
    remarks = []
    end_ids = [i for i, token in tokenizer.added_tokens_decoder.items() if str(token) == template.end]
    if not end_ids:
        remarks.append(f"template: an answer ends with the text {template.end!r}, which is no token of this tokenizer: "
                       "no server stops there unless told to (stop).")  # fmt: skip
    source = _with_default_system(template)
    if source is None:
        source = template.source
        remarks.append("template: the chat template that is exported cannot add the system turn of this run by itself: "
                       f"a client has to send it: {config.system_prompt[:100]!r}.")  # fmt: skip
    return Serving(end_ids, source, remarks)


def _reference_template(template: Reference) -> str:
    system_turn = f"<|im_start|>system\n{template.system_prompt}<|im_end|>\n"
    values = {"system_turn": system_turn, "end": template.end, "thinking": template.thinking}
    lines = [f"{{%- set {name} = {_literal(value)} %}}" for name, value in values.items()]
    return "\n".join([*lines, REFERENCE])


def _reference_remarks(tokenizer: Any) -> list[str]:
    """Where this tokenizer reads the reference's layout as something else than turns."""
    own = (
        "template: tokenizer has the model's own" if tokenizer.chat_template else "template: FILE.jinja may have others"
    )
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


def _with_default_system(template: ChatTemplate) -> str | None:
    """The author's template, given the run's system turn where a dialogue has none; None where that fails.

    The line end after the last tag is none of the text (`trim_blocks`), and the author's text begins a line as before.
    """
    from jinja2 import TemplateError

    if not template.system_prompt:
        return template.source
    system = {"role": "system", "content": template.system_prompt}
    turn = f"{{'role': 'system', 'content': {_literal(template.system_prompt)}}}"
    source = (
        f"{{%- if messages[0]['role'] != 'system' %}}{{%- set messages = [{turn}] + messages %}}{{%- endif %}}\n"
        + template.source
    )
    talk = [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant")]
    render = template.tokenizer.apply_chat_template
    try:
        for messages, prompt in ((talk, False), (talk[:2], False), (talk[:1], True), (talk[:3], True)):
            shown = render(messages, chat_template=source, tokenize=False, add_generation_prompt=prompt)
            told = [system, *messages]
            if shown != render(told, chat_template=template.source, tokenize=False, add_generation_prompt=prompt):
                return None
    except TemplateError:
        return None
    return source


def _literal(text: str) -> str:
    """A text as Jinja reads it in its source: JSON's escapes are Python's."""
    return json.dumps(text, ensure_ascii=False)
