"""Templates that use one feature of the template environment each, with their prompts.

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
    "expression": (
        "{{ messages[0].content }}",
        "Be brief.",
    ),
    "item": (
        "{{ messages[0]['role'] ~ ':' ~ messages[1]['role'] }}",
        "system:user",
    ),
    "loop": (
        ("{% for m in messages %}{{ loop.index }}/{{ loop.length }}:{{ m.role }}\n{% endfor %}"),
        "1/4:system\n2/4:user\n3/4:assistant\n4/4:tool\n",
    ),
    "loop_position": (
        (
            "{% for m in messages %}{{ loop.first }}{{ loop.last }}{{ loop.index0 }}"
            "{{ loop.revindex }}"
            "{{ loop.previtem.role if loop.previtem else '-' }};{% endfor %}"
        ),
        "TrueFalse04-;FalseFalse13system;FalseFalse22user;FalseTrue31assistant;",
    ),
    "loop_filter": (
        ("{% for m in messages if m.role == 'user' %}[{{ m.content }}]{% else %}none{% endfor %}"),
        '[Grüße <b> & "you"]',
    ),
    "loop_else": (
        "{% for m in messages if m.role == 'robot' %}x{% else %}none{% endfor %}",
        "none",
    ),
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
    "loop_recursive": (
        (
            "{% for i in [[1, [2]], [3]] recursive %}"
            "{% if i is iterable %}({{ loop(i) }}){% else %}{{ i }}{% endif %}{% endfor %}"
        ),
        "(1(2))(3)",
    ),
    "trim_blocks": (
        "{% if true %}\nline\n{% endif %}\nlast\n",
        "line\nlast",
    ),
    "lstrip_blocks": (
        "a\n    {% if true %}\n  b\n    {% endif %}\n    {# note #}\nc\n",
        "a\n  b\nc",
    ),
    "whitespace_control": (
        "a   {%- if true %}  b {% endif -%}   c  {{- ' d' -}}  e",
        "a  b c de",
    ),
    "comment": (
        "a{# {{ messages }} #}b",
        "ab",
    ),
    "raw": (
        "{% raw %}{{ not rendered }}{% endraw %}",
        "{{ not rendered }}",
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
    "namespace": (
        (
            "{% set ns = namespace(n=0, self='me') %}{% for m in messages %}"
            "{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ ns.self }}"
        ),
        "4me",
    ),
    "set_block": (
        "{% set text %}<{{ messages[1].role }}>{% endset %}{{ text }}{{ text | length }}",
        "<user>6",
    ),
    "set_scope": (
        "{% set x = 1 %}{% for m in messages %}{% set x = 2 %}{% endfor %}{{ x }}",
        "1",
    ),
    "macro": (
        (
            "{% macro turn(m, mark='#') %}{{ mark }}{{ m.role }}{% endmacro %}"
            "{{ turn(messages[0]) }}{{ turn(messages[1], mark='@') }}"
        ),
        "#system@user",
    ),
    "call_block": (
        (
            "{% macro box() %}[{{ caller('x') }}]{% endmacro %}{% call(v) box() %}{{ v }}"
            "{{ v }}{% endcall %}"
        ),
        "[xx]",
    ),
    "with": (
        "{% with role = messages[0].role %}{{ role }}{% endwith %}{{ role is defined }}",
        "systemFalse",
    ),
    "filter_block": (
        "{% filter upper | trim %}  {{ messages[0].role }}  {% endfilter %}",
        "SYSTEM",
    ),
    "undefined": (
        (
            "[{{ missing }}{{ messages[0].missing }}{{ missing is defined }}"
            "{{ missing | default('d') }}]"
        ),
        "[Falsed]",
    ),
    "no_autoescape": (
        "{{ '<&\"\\'>' }}{{ '<b>' | e }}",
        "<&\"'>&lt;b&gt;",
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
    "dict": (
        ("{{ dict(a=1, b=2) }}{{ dict([('x', 1)], y=2) | tojson }}{{ dict.fromkeys('ab', 0) }}"),
        "{'a': 1, 'b': 2}{\"x\": 1, \"y\": 2}{'a': 0, 'b': 0}",
    ),
    "string_methods": (
        (
            "{{ ' a,b '.strip().split(',') }}{{ 'Ab'.lower() ~ 'Ab'.upper() }}"
            "{{ 'abc'.startswith('a') }}{{ 'a-b'.replace('-', '+') }}"
            "{{ '{}:{}'.format(1, 'x') }}{{ '%s %d' % ('n', 3) }}"
        ),
        "['a', 'b']abABTruea+b1:xn 3",
    ),
    "string_filters": (
        (
            "{{ '  x y ' | trim }}|{{ 'a\n"
            "b' | indent(2, true) }}|{{ 'aXbX' | replace('X', '-') }}|{{ 'word' | "
            "capitalize }}|{{ 'a b' | title }}|{{ 'abc' | first }}"
            "{{ 'abc' | last }}"
        ),
        "x y|  a\n  b|a-b-|Word|A B|ac",
    ),
    "list_filters": (
        (
            "{{ [3, 1, 2] | sort }}{{ [1, 2, 2] | unique | list }}"
            "{{ [1, 2, 3] | reverse | list }}"
            "{{ messages | map(attribute='role') | join(' ') }}"
            "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
            "{{ messages | rejectattr('content') | list | length }}"
            "{{ [[1, 2], [3]] | sum(start=[]) }}"
        ),
        "[1, 2, 3][1, 2][3, 2, 1]system user assistant tool10[1, 2, 3]",
    ),
    "mapping_filters": (
        (
            "{{ {'b': 1, 'a': 2} | dictsort }}{{ {'b': 1, 'a': 2} | items | list }}"
            "{% for k, v in {'b': 1}.items() %}{{ k }}={{ v }}{% endfor %}"
            "{{ {'a': 1}.get('b', 'no') }}"
        ),
        "[('a', 2), ('b', 1)][('b', 1), ('a', 2)]b=1no",
    ),
    "groupby": (
        (
            "{% for role, group in messages | groupby('role') %}"
            "{{ role }}:{{ group | length }};{% endfor %}"
        ),
        "assistant:1;system:1;tool:1;user:1;",
    ),
    "tests": (
        (
            "{{ 'a' is string }}{{ 1 is number }}{{ [] is iterable }}{{ {} is mapping }}"
            "{{ none is none }}{{ 3 is odd }}{{ [1] is sequence }}{{ true is boolean }}"
            "{{ 2.0 is float }}{{ 'a' is in 'abc' }}{{ 'a' is not none }}"
        ),
        "TrueTrueTrueTrueTrueTrueTrueTrueTrueTrueTrue",
    ),
    "slices": (
        (
            "{{ messages[1:][0].role }}{{ messages[::-1][0].role }}"
            "{{ messages[-1]['content'][:3] }}{{ 'abc'[-1] }}"
        ),
        "usertoolsunc",
    ),
    "operators": (
        (
            "{{ 7 // 2 }}{{ 7 % 3 }}{{ 2 ** 5 }}{{ 'ab' * 3 }}{{ 1 / 2 }}{{ 'a' ~ 1 }}"
            "{{ [1] + [2] }}{{ 1 if true else 2 }}{{ 1 if false }}{{ not 1 }}"
            "{{ 1 < 2 <= 2 }}"
        ),
        "3132ababab0.5a1[1, 2]1FalseTrue",
    ),
    "range": (
        "{% for i in range(3) %}{{ i }}{% endfor %}{{ range(1, 10, 3) | list }}",
        "012[1, 4, 7]",
    ),
    "cycler": (
        (
            "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.next() }}"
            "{% set j = joiner('; ') %}{{ j() }}x{{ j() }}y"
        ),
        "abax; y",
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
    "reasoning": (
        (
            "{% for m in messages if m.reasoning_content %}<think>{{ m.reasoning_content "
            "}}</think>{% endfor %}"
        ),
        "<think>Where?</think>",
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
