"""Templates that use one feature each that Jinja alone does not have, with their prompts.

The prompts are those of `transformers`, which `test_template_features` checks.
"""

from __future__ import annotations

from typing import Any

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Say <what> it's like",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Köln", "days": 3}},
}
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": 'Grüße <b> & "you"'},
    {
        "role": "assistant",
        "content": "I look.",
        "reasoning_content": "Where?",
        "tool_calls": [CALL],
    },
    {"role": "tool", "content": "sun", "tool_call_id": "c1"},
]
PARTS = {
    "role": "user",
    "content": [{"type": "text", "text": "foo"}, {"type": "text", "text": "bar"}],
}
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>", "extra": "more"}

# name -> template, prompt
FEATURES = {
    "loop_break": (
        (
            "{% for m in messages %}{% if m.role == 'assistant' %}{% break %}{% endif %}"
            "{{ m.role }} {% endfor %}"
        ),
        "system user ",
    ),
    "loop_continue": (
        (
            "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}"
            "{{ m.role }} {% endfor %}"
        ),
        "system assistant tool ",
    ),
    "trim_blocks": (
        "{% if true %}\nline\n{% endif %}\nlast\n",
        "line\nlast",
    ),
    "lstrip_blocks": (
        "a\n    {% if true %}\n  b\n    {% endif %}\n    {# note #}\nc\n",
        "a\n  b\nc",
    ),
    "generation": (
        (
            "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
            "{{ m.content }}<end>{% endgeneration %}{% else %}{{ m.content }}|{% endif %}"
            "{% endfor %}"
        ),
        'Be brief.|Grüße <b> & "you"|I look.<end>sun|',
    ),
    "generation_whitespace": (
        "a \n  {%- generation -%} \n b \n {%- endgeneration %}\n  c",
        "ab  c",
    ),
    "generation_scope": (
        ("{% set x = 1 %}{% generation %}{{ x }}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}"),
        "121",
    ),
    "generation_nested": (
        (
            "{% for m in messages[:2] %}{% generation %}{% for c in m.content[:2] %}{{ c }}"
            "{{ loop.index }}{% endfor %}{% endgeneration %}{{ loop.index }}{% endfor %}"
        ),
        "B1e21G1r22",
    ),
    "tojson": (
        "{{ {'b': '<é&\"\\'>', 'a': [1, 2.5, true, none]} | tojson }}",
        '{"b": "<é&\\"\'>", "a": [1, 2.5, true, null]}',
    ),
    "tojson_ascii": (
        (
            "{{ 'é<' | tojson(true) }}{{ 'é<' | tojson(ensure_ascii=True) }}"
            "{{ 'é' | tojson(ensure_ascii=False) }}"
        ),
        '"\\u00e9<""\\u00e9<""é"',
    ),
    "tojson_indent": (
        "{{ {'a': [1, {'b': 2}]} | tojson(indent=2) }}{{ [1] | tojson(false, 1) }}",
        '{\n  "a": [\n    1,\n    {\n      "b": 2\n    }\n  ]\n}[\n 1\n]',
    ),
    "tojson_separators": (
        (
            "{{ {'a': [1, 2]} | tojson(separators=(',', ':')) }}"
            "{{ {'a': [1, 2]} | tojson(false, none, (' , ', ' : ')) }}"
        ),
        '{"a":[1,2]}{"a" : [1 , 2]}',
    ),
    "tojson_sort_keys": (
        (
            "{{ {'b': 1, 'a': 2} | tojson(sort_keys=True) }}"
            "{{ {'b': 1, 'a': 2} | tojson(false, none, none, true) }}"
        ),
        '{"a": 2, "b": 1}{"a": 2, "b": 1}',
    ),
    "tojson_tools": (
        (
            "{% for t in tools %}{{ t | tojson }}\n{% endfor %}"
            "{{ tools | map(attribute='function') | map('tojson') | join(',') }}"
        ),
        (
            '{"type": "function", "function": {"name": "weather", "description": "Say '
            '<what> it\'s like", "parameters": {"type": "object", "properties": {"city": '
            '{"type": "string"}}}}}\n'
            '{"name": "weather", "description": "Say <what> it\'s like", "parameters": '
            '{"type": "object", "properties": {"city": {"type": "string"}}}}'
        ),
    ),
    "strftime_now": (
        "{{ strftime_now('%Y') | length }}{{ strftime_now(format='%%d %%') }}",
        "4%d %",
    ),
    "special_tokens": (
        "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ pad_token is defined }}",
        "<s>Be brief.</s>False",
    ),
    "variables": (
        (
            "{{ add_generation_prompt }}{{ tools is none }}{{ documents is none }}"
            "{{ extra }}{{ enable is defined }}"
        ),
        "TrueTrueTruemoreFalse",
    ),
    "arguments": (
        (
            "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
            "{% for k, v in c.function.arguments.items() %} {{ k }}={{ v if v is string "
            "else v | tojson }}"
            "{% endfor %} {{ c.function.arguments | tojson }}"
            "{{ c.function.arguments is mapping }}{% endfor %}{% endfor %}"
        ),
        'weather city=Köln days=3 {"city": "Köln", "days": 3}True',
    ),
    "parts": (
        (
            "{% macro text(c) %}{% if c is string %}{{ c }}{% else %}"
            "{% for p in c if p.type == 'text' %}{{ p.text }}{% endfor %}{% endif %}"
            "{% endmacro %}{% for m in messages %}{{ m.role }}:{{ text(m.content) }}\n"
            "{% endfor %}"
        ),
        ('system:Be brief.\nuser:Grüße <b> & "you"\nassistant:I look.\ntool:sun\nuser:foobar\n'),
    ),
}

# templates that end with an error, and words of it
REFUSED = {
    "raise_exception": ("{{ raise_exception('not today') }}", "not today"),
    "underscore": ("{% set ns = namespace(_x=1) %}", "underscore"),
    "underscore_set": ("{% set ns = namespace() %}{% set ns._x = 1 %}", "underscore"),
    "immutable": ("{{ messages.append(1) }}", "unsafe"),
    "type_of_dict": ("{{ dict.update(messages[0], role='robot') }}", "no attribute 'update'"),
    "no_loader": ("{% include 'other' %}", "no loader"),
    "tojson_default": ("{{ 1 | tojson(default=range) }}", "default"),
}
SINCE_5_23 = ("underscore", "underscore_set", "type_of_dict")
"""Templates that older versions of transformers render."""
