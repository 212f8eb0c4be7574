"""Tokenizers and chat templates shaped like those of model families, made on the spot."""

from __future__ import annotations

from typing import Any

from tests.conftest import TEXTS

# As Qwen3's: an empty thinking block before the last answer, reasoning left out of earlier turns, tools in the system
# turn, calls and results as tagged text.
QWEN = """
{%- if tools %}{{ '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}
{{- '# Tools\\n' }}{% for tool in tools %}{{ tool | tojson }}{{ '\\n' }}{% endfor %}{{ '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}{{ '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{% endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
{%- elif m.role == 'assistant' %}
{%- set thought, text = '', m.content %}
{%- if m.reasoning_content %}{% set thought = m.reasoning_content %}
{%- elif '</think>' in text %}
{%- set thought = text.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set text = text.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.last and (loop.last or thought) %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}
{{- text }}
{%- for call in m.tool_calls or [] %}
{{- '\\n<tool_call>\\n' + call.function | tojson + '\\n</tool_call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
""".strip()

# As Llama 3's: headers of special tokens, contents trimmed, no tools.
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' "
    "+ m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)

# As Gemma's: the assistant is called model, the system turn goes into the user's, turns must alternate.
GEMMA = """
{{- bos_token }}{% set ns = namespace(system='') %}
{%- if messages[0].role == 'system' %}{% set ns.system = messages[0].content + '\\n\\n' %}
{%- set messages = messages[1:] %}{% endif %}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}
{{- (ns.system if loop.first else '') + m.content | trim + '<end_of_turn>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
""".strip()

# As Mistral's first: no special tokens before an answer, a space before it, the end-of-sequence token after it.
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)

# ChatML that says itself what is generated.
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# As Qwen3-Thinking's: the prompt opens the block that the last answer closes.
HEADER = "{{ '<|im_start|>assistant\\n"
THINKING = QWEN.replace(HEADER + "' }}{% endif %}", HEADER + "<think>\\n' }}{% endif %}")

# As DeepSeek-R1's: the prompt opens a block and no answer keeps one; calls have no content, and arguments in a text.
DEEPSEEK = """
{{- bos_token }}{% for m in messages %}
{%- if m.role == 'system' %}{{ m.content }}
{%- elif m.role == 'user' %}{{ '<｜User｜>' + m.content }}
{%- elif m.role == 'tool' %}{{ '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}
{%- elif m.content is none %}{{ '<｜Assistant｜>' }}
{%- for call in m.tool_calls %}
{{- '<｜tool▁call▁begin｜>' + call.function.name + '<｜tool▁sep｜>' + call.function.arguments + '<｜tool▁call▁end｜>' }}
{%- endfor %}{{ eos_token }}
{%- else %}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}
""".strip()

# As GLM's: nothing ends a turn but the next one's role; reasoning, if only an empty block, before every answer.
GLM = """
{{- '[gMASK]<sop>' }}
{%- if tools %}{{ '<|system|>\\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- set thought, text = m.reasoning_content or '', m.content %}
{%- if not thought and '</think>' in text %}
{%- set thought = text.split('</think>')[0].split('<think>')[-1] %}
{%- set text = text.split('</think>')[-1] %}{% endif %}
{{- '<|assistant|>\\n<think>' + (thought.strip() if loop.index0 > ns.last else '') + '</think>' }}
{%- if text.strip() %}{{ '\\n' + text.strip() }}{% endif %}
{%- for call in m.tool_calls or [] %}
{{- '\\n<tool_call>' + call.function.name }}
{%- for key, value in call.function.arguments.items() %}
{{- '\\n<arg_key>' + key + '</arg_key>\\n<arg_value>' }}
{{- (value if value is string else value | tojson) + '</arg_value>' }}
{%- endfor %}{{ '\\n</tool_call>' }}{% endfor %}
{%- elif m.role == 'tool' %}{{ '<|observation|>\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- else %}{{ '<|' + m.role + '|>\\n' + m.content }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}
{%- if enable_thinking is false %}{{ '\\n<think></think>' }}{% endif %}{% endif %}
""".strip()

# As gpt-oss's: a channel for reasoning, one for the answer, one for calls; what ends the last answer ends no other.
HARMONY = """
{%- if tools %}{{ '<|start|>developer<|message|>' + tools | tojson + '<|end|>' }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'system' %}{{ '<|start|>developer<|message|>' + m.content + '<|end|>' }}
{%- elif m.role == 'user' %}{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}
{%- elif m.role == 'tool' %}
{{- '<|start|>functions to=assistant<|channel|>commentary<|message|>' + m.content | tojson + '<|end|>' }}
{%- elif m.tool_calls %}
{%- if m.content or m.thinking %}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + (m.content or m.thinking) + '<|end|>' }}{% endif %}
{%- set call = m.tool_calls[0].function %}
{{- '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>' }}
{{- call.arguments | tojson + '<|call|>' }}
{%- else %}
{%- if loop.last and 'thinking' in m %}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content }}
{{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}
""".strip()

# What Llama 3 and Qwen take for words: line ends go together.
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

FAMILIES = {  # name -> special tokens (what ends the last answer first), template
    "qwen": (["<|im_end|>", "<|im_start|>", "<|endoftext|>"], QWEN),
    "llama": (["<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"], LLAMA),
    "gemma": (["<end_of_turn>", "<bos>", "<start_of_turn>"], GEMMA),
    "mistral": (["</s>", "<s>"], MISTRAL),
    "marked": (["<|im_end|>", "<|im_start|>", "<|endoftext|>"], MARKED),
    "thinking": (["<|im_end|>", "<|im_start|>", "<|endoftext|>"], THINKING),
    "deepseek": (
        [
            "<｜end▁of▁sentence｜>",
            "<｜begin▁of▁sentence｜>",
            "<｜User｜>",
            "<｜Assistant｜>",
            "<｜tool▁call▁begin｜>",
            "<｜tool▁sep｜>",
            "<｜tool▁call▁end｜>",
            "<｜tool▁output▁begin｜>",
            "<｜tool▁output▁end｜>",
        ],
        DEEPSEEK,
    ),
    "glm": (["<|user|>", "<|observation|>", "<|assistant|>", "<|system|>", "[gMASK]", "<sop>", "<|endoftext|>"], GLM),
    "harmony": (
        ["<|return|>", "<|call|>", "<|end|>", "<|start|>", "<|channel|>", "<|message|>", "<|endoftext|>"],
        HARMONY,
    ),
}


def family(name: str) -> Any:
    """A tokenizer of a family; Mistral's puts a space before every text, as SentencePiece does."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special, template = FAMILIES[name]
    if name == "mistral":
        bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        bpe.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        special = ["<unk>", *special, *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special)
    else:
        bpe = Tokenizer(models.BPE())
        words = pre_tokenizers.Split(Regex(WORDS), "isolated")
        bpe.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
        bpe.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, initial_alphabet=alphabet)
    bpe.train_from_iterator([*TEXTS, "x\n\n\ny", "assistant\n\nmodel\n"], trainer)
    end, *others = FAMILIES[name][0]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=others[-1] if name == "glm" else end,
        pad_token=others[-1] if "<|endoftext|>" in others else end,
        bos_token=others[0] if name in ("llama", "gemma", "mistral", "deepseek") else None,
    )
    tokenizer.chat_template = template
    return tokenizer


def learned_text(name: str, content: str, *, last: bool = True) -> str:
    """What is learned of an answer without reasoning: what follows the prompt as far as the template renders it."""
    end = FAMILIES[name][0][0]
    if name == "harmony":
        return f"<|channel|>final<|message|>{content}{end if last else '<|end|>'}"
    if name == "thinking" and last:
        return f"\n</think>\n\n{content}{end}"
    return f"{chr(10) if name == 'glm' and content else ''}{content}{end}"


def added_end(name: str) -> str:
    """What is added to a rendered dialogue whose last answer the template does not end."""
    return "<|user|>" if name == "glm" else ""
