"""Small chat templates in the formats of the models; the models' own come with their folders."""

from __future__ import annotations

# in the manner of DeepSeek-V3.1 and V3.2-Exp: arguments are put between texts
V31 = """\
{{- bos_token -}}
{%- for m in messages -%}
{%- if m.role == 'system' -%}{{ m.content }}
{%- elif m.role == 'user' -%}<｜User｜>{{ m.content }}
{%- elif m.role == 'tool' -%}<｜tool▁output▁begin｜>{{ m.content }}<｜tool▁output▁end｜>
{%- else -%}
{%- if messages[loop.index0 - 1].role != 'tool' -%}<｜Assistant｜></think>{%- endif -%}
{{ m.content }}
{%- if m.tool_calls -%}<｜tool▁calls▁begin｜>
{%- for call in m.tool_calls -%}
{{ '<｜tool▁call▁begin｜>' + call.function.name + '<｜tool▁sep｜>' + call.function.arguments }}\
<｜tool▁call▁end｜>
{%- endfor -%}<｜tool▁calls▁end｜>
{%- endif -%}<｜end▁of▁sentence｜>
{%- endif -%}
{%- if loop.last and tools -%}[{{ tools | length }} tools]{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and messages[-1].role != 'tool' -%}
<｜Assistant｜>{{ '<think>' if thinking else '</think>' }}
{%- endif -%}"""

# in the manner of GLM-5: arguments are gone through, old reasoning is left out
GLM = """\
[gMASK]<sop>
{%- if tools -%}<|system|>
{% for tool in tools -%}{{ tool | tojson(ensure_ascii=False) }}{%- endfor -%}{%- endif -%}
{%- set ns = namespace(last_user=-1) -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{%- set ns.last_user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}<|user|>{{ m.content }}
{%- elif m.role == 'system' -%}<|system|>{{ m.content }}
{%- elif m.role == 'tool' -%}
{%- if messages[loop.index0 - 1].role != 'tool' -%}<|observation|>{%- endif -%}
<tool_response>{{ m.content }}</tool_response>
{%- else -%}<|assistant|>
{%- if loop.index0 > ns.last_user and m.reasoning_content -%}
<think>{{ m.reasoning_content }}</think>
{%- else -%}</think>
{%- endif -%}
{{- m.content.strip() -}}
{%- for call in m.tool_calls -%}
<tool_call>{{ call.function.name }}
{%- for key, value in call.function.arguments.items() -%}
<arg_key>{{ key }}</arg_key><arg_value>
{{- value if value is string else value | tojson(ensure_ascii=False) -}}
</arg_value>
{%- endfor -%}</tool_call>
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|assistant|>{{ '</think>' if enable_thinking is defined and not enable_thinking else '<think>' }}
{%- endif -%}"""
