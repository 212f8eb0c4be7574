"""What a server must know of the dialogues that were learned: which tokens end an answer, and the chat template.

Both are exported with the weights, so that whoever loads the folder, and nothing of ours, talks to the model as it was
trained: `generate` stops by itself, and `apply_chat_template` renders what the encoder did. Where an author's template
does not, a remark says so; but for reasoning in a field that it does not know: the encoder wrote it into the content.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NamedTuple

from ds_sft.config.keys import Config
from ds_sft.data.bad_row import BadRow
from ds_sft.data.records import Dialogue
from ds_sft.data.shapes import Message
from ds_sft.data.templates import ChatTemplate, Reference, open_template
from ds_sft.data.turns import EMPTY_BLOCK, common_start
from ds_sft.ranks.launch import Launch

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
NO_BLOCK = (
    "template: an answer without reasoning is learned after an empty <think> block that generation does not start "
    "with, unless a client sends enable_thinking: false and this template knows it; with thinking: empty the model "
    "learns the block, too."
)
TALK = [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant")]


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
    source, remarks = _own_template(template, tokenizer, config.mask)
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


def _own_template(template: ChatTemplate, tokenizer: Any, mask: str) -> tuple[str, list[str]]:
    """The author's template with what this run adds by itself put before it; a line on what could not be put there."""
    source = template.renderer.source
    if template.system_prompt:
        turn = f"{{'role': 'system', 'content': {_literal(template.system_prompt)}}}"
        before = DEFAULT_SYSTEM.replace("TURN", turn)
        source = source if before in source else before + source  # a checkpoint's tokenizer has it already
    last, remarks = _start(template, tokenizer, source, TALK[:2], 1), _policy_remarks(template)
    if template.thinking == "drop" and _renders(template, tokenizer, NO_THINKING + source, last.missing):
        source = NO_THINKING + source
    elif EMPTY_BLOCK.fullmatch(last.missing):
        remarks.append(NO_BLOCK)
    elif last.missing:
        remarks.append(f"template: an answer is learned after {last.missing!r}, which the generation prompt lacks.")
    if last.surplus:
        remarks.append(f"template: the generation prompt ends with {last.surplus!r}, and answers are learned without "
                       "it; serve with a template that does not write it.")  # fmt: skip
    elif mask == "all" and (surplus := _start(template, tokenizer, source, TALK, 1).surplus):
        remarks.append(f"template: the generation prompt ends with {surplus!r}, and with mask: all an answer before "
                       "the last is learned without it; mask: last learns none of these.")  # fmt: skip
    return source, remarks


def _policy_remarks(template: ChatTemplate) -> list[str]:
    """What the key `thinking` did to contents, which the author's template does not do."""
    if template.turns.reasoning != "content" or template.thinking == "keep":
        return []
    does = "takes reasoning out of" if template.thinking == "drop" else "puts an empty <think> block before"
    return [f"template: the exported template knows nothing of thinking: {template.thinking}, which {does} every "
            "answer: a client must send earlier answers so."]  # fmt: skip


class _Start(NamedTuple):
    """How a server's prompt differs from what an answer without reasoning is learned after."""

    missing: str = ""  # stands before the answer that was learned alone: an empty block of reasoning
    surplus: str = ""  # stands in the server's prompt alone: an opened block


def authors_template(source: str) -> str:
    """An exported chat template without what this package put before it."""
    source = source.removeprefix(NO_THINKING)
    before, after = DEFAULT_SYSTEM.split("TURN")
    line, end, rest = source.partition("\n")
    return rest if line.startswith(before) and f"{line}{end}".endswith(after) else source


def _start(template: ChatTemplate, tokenizer: Any, source: str, talk: list[dict[str, str]], index: int) -> _Start:
    """The difference for the answer `talk[index]`; none where the template refuses the dialogue."""
    dialogue = Dialogue(tuple(Message(turn["role"], turn["content"]) for turn in talk))
    try:
        pieces = template.pieces(dialogue, [i == index for i in range(len(talk))])
    except BadRow:
        return _Start()
    prompt = _render(tokenizer, source, talk[:index], True)
    before = "".join(str(piece.text) for piece in takewhile(lambda piece: not piece.learned, pieces))
    whole = "".join(str(piece.text) for piece in pieces)
    if prompt and whole.startswith(prompt):
        return _Start(missing=before[len(prompt) :])
    return _Start(surplus=prompt[len(common_start([prompt, whole])) :])


def _renders(template: ChatTemplate, tokenizer: Any, source: str, block: str) -> bool:
    """Whether `source` makes of dialogues what training made of them: the run's system turn, `block` after a prompt."""
    if not block:
        return False
    system = [{"role": "system", "content": template.system_prompt}] if template.system_prompt else []
    for messages, prompt in ((TALK, False), (TALK[:2], False), (TALK[:1], True), (TALK[:3], True)):
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
