"""What is exported beside the weights: the chat template renders what was learned, and the ends are those learned."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from ds_sft.data.encode import Encoder
from ds_sft.data.records import Dialogue
from ds_sft.data.serving import serving
from ds_sft.data.shapes import Message
from ds_sft.export.weights import end_answers_at, save_tokenizer
from tests.families import FAMILIES, family
from tests.test_encode import config

FAMILY = {name: family(name) for name in FAMILIES}
SYSTEM = 'Answer "briefly",\nin {{ the }} user\'s language: 用中文 \\ 👋.  \n'
TALKS = {
    "one turn": [("user", "What is the capital of France?"), ("assistant", "Paris.")],
    "own system turn": [("system", "Own. "), ("user", "q"), ("assistant", "a")],
    "several turns": [("user", "今天天气怎么样？"), ("assistant", "很好。"), ("user", "Как?"), ("assistant", "Да!")],
    "white space": [("user", "  q \n\n"), ("assistant", "a \n\n"), ("user", "\nx\t"), ("assistant", " b\n")],
    "ends with a question": [("user", "q"), ("assistant", "a"), ("user", "and now?")],
    "empty": [("system", ""), ("user", "q"), ("assistant", ""), ("user", ""), ("assistant", "a")],
}  # fmt: skip


def messages(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in turns]


def dialogue(turns: list[tuple[str, str]]) -> Dialogue:
    return Dialogue(tuple(Message(role, text) for role, text in turns))


def exported(tokenizer: Any, folder: Path, **keys: Any) -> Any:
    """The tokenizer of the exported folder, as anything else than this package finds it."""
    served = serving(config(**keys), tokenizer)
    save_tokenizer(tokenizer, folder, served.chat_template, served.end_ids)
    assert (folder / "chat_template.jinja").is_file()
    return AutoTokenizer.from_pretrained(folder)


def check(found: Any, encoder: Encoder, turns: list[tuple[str, str]], block: str = "") -> None:
    """The tokens of a dialogue are those that were learned from; those of its prompt are what was answered to."""
    talk = dialogue(turns)
    ((ids, _),) = encoder.encode([talk]).rows()
    assert found.apply_chat_template(messages(turns), return_dict=False) == ids
    before = messages(turns)[: talk.last_answer]
    prompt = found.apply_chat_template(before, return_dict=False, add_generation_prompt=True)
    assert prompt + found(block, add_special_tokens=False).input_ids == encoder.prompt(talk)


@pytest.mark.parametrize("name", TALKS)
@pytest.mark.parametrize("system", [SYSTEM, ""])
def test_the_reference_template_in_jinja(tokenizer: Any, tmp_path: Path, name: str, system: str) -> None:
    keys = {"template": "reference", "system_prompt": system}
    check(exported(tokenizer, tmp_path, **keys), Encoder(tokenizer, config(**keys)), TALKS[name])


@pytest.mark.parametrize("name", TALKS)
@pytest.mark.parametrize("kind", ["qwen", "llama", "gemma", "marked"])
@pytest.mark.parametrize("system", [SYSTEM, ""])
def test_the_models_own_template_with_the_runs_system_turn(tmp_path: Path, kind: str, name: str, system: str) -> None:
    keys = {"template": "tokenizer", "system_prompt": system}
    turns = TALKS[name]
    if kind == "gemma" and name == "empty":
        turns = turns[1:]  # an empty system turn there is none
    # Qwen's writes a block before the last answer that generation does not start with: a remark says so.
    block = "<think>\n\n</think>\n\n" if kind == "qwen" and turns[-1][0] == "assistant" else ""
    check(exported(FAMILY[kind], tmp_path, **keys), Encoder(FAMILY[kind], config(**keys)), turns, block)


def test_a_template_in_a_file_takes_the_place_of_the_models(tokenizer: Any, tmp_path: Path) -> None:
    """Also where the model has several: one for tools would win as soon as tools are given."""
    file = tmp_path / "chat.jinja"
    file.write_text(FAMILIES["marked"][1], encoding="utf-8")
    several = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    several.chat_template = {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}
    keys = {"template": str(file), "system_prompt": "S"}
    found = exported(several, tmp_path / "out", **keys)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "chat_template.jinja", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    check(found, Encoder(tokenizer, config(**keys)), TALKS["several turns"])
    assert several.chat_template == {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}  # the run goes on with it


@pytest.mark.parametrize("policy", ["keep", "drop", "empty"])
@pytest.mark.parametrize(
    "answer",
    [
        {"content": "b"},
        {"content": "b", "reasoning_content": "hm"},
        {"content": "\n<think>\nhm\n</think>\n\n b </think> c"},
        {"content": "b <think>hm</think>"},
        {"content": "<think>never closed"},
    ],
)
def test_reasoning_in_the_reference_template(tokenizer: Any, policy: str, answer: dict[str, str]) -> None:
    keys = {"template": "reference", "system_prompt": "S", "thinking": policy}
    encoder = Encoder(tokenizer, config(**keys))
    extra = {name: text for name, text in answer.items() if name != "content"}
    talk = Dialogue((Message("user", "q"), Message("assistant", answer["content"], extra=extra)))
    pieces = encoder.template.pieces(talk, [False, True])
    text = "".join(tokenizer.decode([p.text]) if isinstance(p.text, int) else p.text for p in pieces)
    rows = [{"role": "user", "content": "q"}, {"role": "assistant", **answer}]
    source = serving(config(**keys), tokenizer).chat_template
    assert tokenizer.apply_chat_template(rows, chat_template=source, tokenize=False) == text


def test_line_ends_and_white_space_at_the_start_of_an_authors_template(tokenizer: Any, tmp_path: Path) -> None:
    """What is put before it must not change what Jinja cuts off there."""
    file = tmp_path / "chat.jinja"
    for start in ("\n\n  ", "  {% set x = 1 %}\n ", "  {%- set x = 1 -%}\n\n"):
        file.write_text(start + FAMILIES["marked"][1], encoding="utf-8")
        for system in ("S", ""):
            keys = {"template": str(file), "system_prompt": system}
            source, own = serving(config(**keys), tokenizer).chat_template, file.read_text(encoding="utf-8")
            rows = messages([("user", "q"), ("assistant", "a")])
            told = [{"role": "system", "content": "S"}, *rows] if system else rows
            render = tokenizer.apply_chat_template
            assert render(rows, chat_template=source, tokenize=False) == render(told, chat_template=own, tokenize=False)
            assert render(told, chat_template=source, tokenize=False) == render(told, chat_template=own, tokenize=False)


BLOCK = (
    "template: an answer without reasoning is learned after an empty <think> block that generation does not start "
    "with, unless a client sends enable_thinking: false and this template knows it; with thinking: empty the model "
    "learns the block, too."
)
EARLIER = (
    "template: the generation prompt ends with '{}', and with mask: all an answer before the last is learned without "
    "it; mask: last learns none of these."
)
NOWHERE = (
    "template: the generation prompt ends with '<think>\\n', and answers are learned without it; serve with a template "
    "that does not write it."
)
SENT = {
    "drop": "template: the exported template knows nothing of thinking: drop, which takes reasoning out of every "
    "answer: a client must send earlier answers so.",
    "empty": "template: the exported template knows nothing of thinking: empty, which puts an empty <think> block "
    "before every answer: a client must send earlier answers so.",
}
SWITCH = "{%- if add_generation_prompt and enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"  # noqa: E501


@pytest.mark.parametrize("system", ["S", ""])
def test_the_empty_block_before_an_answer_without_reasoning(system: str, tmp_path: Path) -> None:
    """Where no reasoning is learned, generation starts after it by default; where some may be, one line says so."""
    qwen = family("qwen")
    remarks = {}
    for end in ("", SWITCH):  # Qwen3's genuine template has the switch
        qwen.chat_template = FAMILIES["qwen"][1] + end
        for policy in ("keep", "drop", "empty"):
            keys = {"template": "tokenizer", "system_prompt": system, "thinking": policy}
            remarks[bool(end), policy] = serving(config(**keys), qwen).remarks
            block = "<think>\n\n</think>\n\n" if remarks[bool(end), policy] == [BLOCK] else ""
            talk, encoder = dialogue(TALKS["one turn"]), Encoder(qwen, config(**keys))
            prompt = exported(qwen, tmp_path / policy, **keys).apply_chat_template(
                messages(TALKS["one turn"])[:1], return_dict=False, add_generation_prompt=True
            )
            assert prompt + qwen(block, add_special_tokens=False).input_ids == encoder.prompt(talk)
    assert remarks == {
        (False, "keep"): [BLOCK], (False, "drop"): [BLOCK], (False, "empty"): [],
        (True, "keep"): [BLOCK], (True, "drop"): [EARLIER.format("<think>\\n\\n</think>\\n\\n")], (True, "empty"): [],
    }  # fmt: skip


@pytest.mark.parametrize("policy", ["keep", "drop", "empty"])
@pytest.mark.parametrize("mask", ["all", "last"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_generation_starts_where_an_answer_is_learned_or_a_remark_says_so(kind: str, mask: str, policy: str) -> None:
    if kind == "deepseek" and policy == "empty":
        return  # refused
    own, keys = FAMILY[kind], {"template": "tokenizer", "system_prompt": "", "mask": mask, "thinking": policy}
    found, template = serving(config(**keys), own), Encoder(own, config(**keys)).template
    remarks = {
        "thinking": [EARLIER.format("<think>\\n")] if mask == "all" else [],
        "deepseek": [NOWHERE],
        "qwen": [BLOCK] if policy != "empty" else [],
        "glm": [BLOCK] if policy == "keep" else [],
        "harmony": [],
    }.get(kind, [SENT[policy]] if policy != "keep" else [])
    assert found.remarks == remarks
    talk = TALKS["several turns"]
    for index in (1, 3) if mask == "all" and kind != "qwen" else (3,):
        pieces = template.pieces(dialogue(talk[: index + 1]), [i == index for i in range(index + 1)])
        before = "".join(str(piece.text) for piece in itertools.takewhile(lambda piece: not piece.learned, pieces))
        prompt = own.apply_chat_template(
            messages(talk[:index]), chat_template=found.chat_template, tokenize=False, add_generation_prompt=True
        )
        missing = {"qwen": "<think>\n\n</think>\n\n", "glm": "\n<think></think>"}.get(kind, "")
        prompt += missing if BLOCK in remarks else ""
        if policy == "empty" and kind not in ("qwen", "thinking", "glm", "harmony") and index == 3:
            continue  # the remark says it: the earlier answer was learned from with a block
        assert prompt.removesuffix("<think>\n" if NOWHERE in remarks else "") == before


def test_an_answer_that_is_learned_after_more_than_the_prompt(tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(FAMILIES["marked"][1].replace("{% generation %}", "{{ '> ' }}{% generation %}"), encoding="utf-8")
    assert serving(config(template=str(file), system_prompt=""), FAMILY["marked"]).remarks == [
        "template: an answer is learned after '> ', which the generation prompt lacks."
    ]


def test_tools_are_refused_as_they_were_in_training(tokenizer: Any) -> None:
    source = serving(config(template="reference"), tokenizer).chat_template
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    with pytest.raises(Exception, match="this model was trained without tools"):
        tokenizer.apply_chat_template(messages(TALKS["one turn"]), tools=[tool], chat_template=source)


# ---- What ends an answer


CALL_ENDS = {"glm": ["<|observation|>"], "harmony": ["<|call|>"]}  # what ends an answer with calls, where it is another


@pytest.mark.parametrize("kind", FAMILIES)
def test_ends(tokenizer: Any, kind: str) -> None:
    own = FAMILY[kind]
    found = serving(config(template="tokenizer", system_prompt=""), own)
    assert own.convert_ids_to_tokens(found.end_ids) == [FAMILIES[kind][0][0], *CALL_ENDS.get(kind, [])]
    assert serving(config(template="reference"), own).end_ids == [own.pad_token_id]
    assert serving(config(template="reference"), tokenizer).remarks == []


def test_what_the_reference_template_means_to_another_tokenizer() -> None:
    gemma = FAMILY["gemma"]
    assert serving(config(template="reference"), gemma).remarks == [
        f"template: reference: <|im_start|> ({len(gemma.tokenize('<|im_start|>'))} tokens) and <|im_end|> "
        f"({len(gemma.tokenize('<|im_end|>'))} tokens) are plain text to this tokenizer, no marks of a turn; "
        "template: tokenizer has the model's own."
    ]


def test_a_row_without_the_token_that_begins_every_text(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    qwen = family("qwen")
    qwen.add_special_tokens({"bos_token": "<s>"})
    begin = qwen.bos_token_id
    qwen.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    assert qwen("x").input_ids[0] == begin
    assert serving(config(template="reference"), qwen).remarks == [
        "template: reference: no <s> stands before a row, though this tokenizer puts it before every text; template: "
        "tokenizer has the model's own."
    ]


def test_an_end_that_is_no_token(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(
        "{% for m in messages %}{{ '### ' + m.role + ': ' + m.content + ' ###END\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### assistant: ' }}{% endif %}",
        encoding="utf-8",
    )
    found = serving(config(template=str(file), system_prompt=""), tokenizer)
    assert found.end_ids == []
    assert found.remarks == [
        "template: an answer ends with the text '###END', which is no token of this tokenizer: no server stops there "
        "unless told to (stop)."
    ]


@pytest.mark.parametrize(
    ("generation", "model", "ends", "expected"),
    [
        ({"eos_token_id": 0}, {"eos_token_id": 0}, [2], [2, 0]),
        ({"eos_token_id": [0, 5]}, {"eos_token_id": 0}, [5], [5, 0]),
        ({"eos_token_id": 2, "top_p": 0.9}, {"eos_token_id": 2}, [2], 2),
        ({}, {"text_config": {"eos_token_id": 1}}, [7], [7, 1]),
        (None, {"eos_token_id": [3]}, [7], [7, 3]),
        (None, {}, [7], 7),
        ({"eos_token_id": 3}, {}, [], 3),
    ],
)
def test_servers_read_what_was_learned_first(
    tmp_path: Path, generation: Any, model: Any, ends: list[int], expected: Any
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(model), encoding="utf-8")
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    end_answers_at(ends, tmp_path)
    found, told = (
        json.loads((tmp_path / name).read_text(encoding="utf-8")) for name in ("generation_config.json", "config.json")
    )
    assert found == (generation or {}) | {"eos_token_id": expected}
    for part in (told, told.get("text_config", {})):
        assert part.get("eos_token_id", expected) == expected


def test_nothing_is_known_to_end_an_answer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    end_answers_at([], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("template", ["reference", "tokenizer"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_converter_to_gguf_reads_what_was_learned_first(kind: str, template: str, tmp_path: Path) -> None:
    """It reads one end, of tokenizer_config.json, and no generation_config.json; of other tokens llama.cpp knows a few
    by their text. The template is the exported one."""
    from gguf.vocab import SpecialVocab

    keys = {"template": template, "system_prompt": ""}
    own, before = FAMILY[kind], FAMILY[kind].eos_token
    served = serving(config(**keys), own)
    exported(own, tmp_path, **keys)
    found = SpecialVocab(tmp_path, load_merges=False)
    assert found.special_token_ids["eos"] == served.end_ids[0]
    assert found.chat_template == served.chat_template
    assert own.eos_token == before  # the run goes on with its own


def test_a_template_that_writes_the_end_of_text_keeps_it(tokenizer: Any, tmp_path: Path) -> None:
    """Another one would change what it renders."""
    file = tmp_path / "chat.jinja"
    file.write_text("{{ eos_token }}" + FAMILIES["marked"][1], encoding="utf-8")
    text = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    text.eos_token = "<|endoftext|>"
    keys = {"template": str(file), "system_prompt": ""}
    assert serving(config(**keys), text).end_ids == [2]
    found = exported(text, tmp_path / "out", **keys)
    assert found.eos_token == "<|endoftext|>"
    check(found, Encoder(text, config(**keys)), TALKS["several turns"])
