"""`template: hermes`: ChatML with tools, for models whose own chat template has no form for them.

The tags are those of NousResearch's Hermes and of Qwen: <tools> in the system turn, <tool_call> in an answer,
<tool_response> in a user turn; so servers read the calls (vLLM: `--tool-call-parser hermes`). An answer ends with
<|im_end|>. The sentences around the tags are ours.
"""

HERMES = """
{%- set first = messages[0] %}
{%- set system = first.content if first.role == 'system' else '' %}
{%- if system or tools %}
{{- '<|im_start|>system\\n' + system }}
{%- if tools %}
{{- '\\n\\n' if system else '' }}
{{- 'You can call functions. Their signatures are within <tools></tools>:\\n<tools>\\n' }}
{%- for tool in tools %}
{{- tool | tojson + '\\n' }}
{%- endfor %}
{{- '</tools>\\n\\nWrite each call within <tool_call></tool_call>, as JSON with the name and the arguments:\\n' }}
{{- '<tool_call>\\n{"name": "...", "arguments": {...}}\\n</tool_call>' }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in (messages[1:] if first.role == 'system' else messages) %}
{%- if message.role == 'tool' %}
{{- '\\n' if loop.previtem is defined and loop.previtem.role == 'tool' else '<|im_start|>user\\n' }}
{{- '<tool_response>\\n' + message.content + '\\n</tool_response>' }}
{{- '' if loop.nextitem is defined and loop.nextitem.role == 'tool' else '<|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.reasoning_content %}
{{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
{%- endif %}
{{- message.content or '' }}
{%- for called in message.tool_calls or [] %}
{%- set call = called.function or called %}
{%- set arguments = call.arguments if call.arguments is string else call.arguments | tojson %}
{{- '\\n' if message.content or not loop.first else '' }}
{{- '<tool_call>\\n{"name": ' + call.name | tojson + ', "arguments": ' + arguments + '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
""".strip()
