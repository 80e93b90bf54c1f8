"""Operations of templates: those of Jinja, without access to inner names."""

from __future__ import annotations

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fd_dsa.chat.sandbox import bounded_rendering, compile_template
from fd_dsa.chat.template import ChatTemplate

# each is rendered as by Jinja's own sandbox
SAME_AS_JINJA = r"""{{ 1 + 2.5 }} {{ 'a' + 'é' }} {{ [1] + [2] }} {{ (1,) + (2,) }} {{ 7 - 2.5 }}
{{ 'ab' * 2 }}
{{ 'a' + 'b' + ('c' + 'd') }} {{ 1 + 2 + 3.5 }} {{ [1] + [2] + [3] }}
{{ 2 * [1] }} {{ 2 ** 10 }} {{ 2 ** -1 }} {{ 7 % 4 }} {{ -7 // 2 }} {{ 7 / 2 }}
{{ -messages[0].n }}
{{ '%s|%5.1f|%-4d|%%|%r' % ('a', 1.25, 7, 'é') }} {{ '%(a)s' % {'a': [1]} }}
{{ '%s' % messages[0] }}
{{ '%*d' % (5, 1) }} {{ 'a' ~ 1 ~ none ~ [1] ~ missing }} {{ 'abcdef'[1:5:2] }}
{{ [1, 2, 3][::-1] }}
{{ 'abc'[:-1] }} {{ range(9)[2:4] | list }} {{ messages == messages }} {{ [1] in [[1], 2] }}
{{ 1 < messages[0].n <= 9 }} {{ {(1, 'a'): 2}[(1, 'a')] }} {{ messages[0][('a',)] is defined }}
{{ 'aXb'.lower() }} {{ 'ß'.upper() }} {{ 'a'.center(5, '*') }} {{ 'a'.zfill(3) }}
{{ '\t'.expandtabs(2) }}
{{ 'a,b,,c'.split(',', 2) }} {{ ' a  b '.split() }} {{ 'a,b,c'.rsplit(',', 1) }}
{{ 'a\nb'.splitlines(true) }}
{{ 'a-b'.partition('-') }} {{ 'a-b-c'.rpartition('-') }} {{ '-'.join(['a', 'b']) }}
{{ '-'.join('ab') }}
{{ 'aaa'.replace('a', 'b', 2) }} {{ 'abc'.find('c') }} {{ 'abca'.rfind('a') }}
{{ 'aXa'.strip('a') }}
{{ 'abc'.startswith(('x', 'a')) }} {{ 'abc'.removeprefix('a') }} {{ 'ab'.isalpha() }}
{{ 'a b'.title() }}
{{ '{} {0!r:>5} {x[a]:05.1f} {y.z}'.replace('{} ', '').format('a', x={'a': 2.5}, y={'z': 1}) }}
{{ '{:>{w}}'.format('a', w=4) }} {{ '{a}'.format_map({'a': 1}) }} {{ ('{}' | safe).format('<') }}
{{ (5).bit_length() }} {{ (0.5).as_integer_ratio() }} {{ [1, 2].index(2) }} {{ (1, 1).count(1) }}
{{ {'a': 1}.get('b', 2) }} {{ {'a': 1}.items() | list }} {{ {'a': 1}.copy() }}
{{ {}.fromkeys('ab', 1) }}
{{ '<a>' | e }}{{ ('<a>' | e) + '<b>' }}{{ '<' + ('b' | safe) }}
{{ ('%s' | safe) % '<' }}{{ 1 | e | e }}
{{ ('-' | safe).join(['<', 'a']) }} {{ ('a' | safe).replace('a', '<') }} {{ ('a' | safe) * 2 }}
{{ [3, 1] | sort }} {{ messages | sort(attribute='role,n') | map(attribute='n') | list }}
{{ ['b', 'A'] | sort(true) }} {{ ['b', 'A'] | min }} {{ messages | max(attribute='n') }}
{{ messages | groupby('role') }} {{ ['a', 'A', 'b'] | unique | list }}
{{ {'b': 1, 'a': 2} | dictsort }}
{{ [1, 2, 3] | batch(2, 'x') | list }} {{ [1, 2, 3] | slice(2, 'x') | list }} {{ [1, 2] | sum }}
{{ messages | sum('n') }} {{ [[1], [2]] | sum(start=[]) }} {{ [1, [2]] | join('-') }}
{{ messages | join(', ', attribute='role') }} {{ 'a\nb' | indent }}
{{ 'a\n\nb' | indent('> ', true, true) }}
{{ 'a' | center(5) }}| {{ '%s %d' | format('a', 1) }} {{ '%(a)s' | format(a=1) }}
{{ 'abab' | replace('a', 'c', 1) }}
{{ 5 | replace(5, 6) }} {{ ' a ' | trim }} {{ 'xax' | trim('x') }}
{{ 'hello world' | truncate(8) }}
{{ 'a b' | title }} {{ 'a b' | wordcount }} {{ 'abc' | reverse }} {{ [1, 2] | reverse | list }}
{{ 'ab' | list }} {{ (1, 2) | list }} {{ '42' | int }} {{ 'x' | int(7) }}
{{ 'ff' | int(base=16) }}
{{ '1.5' | float }} {{ 2.567 | round(1) }} {{ 2.5 | round(0, 'ceil') }} {{ [1] | string }}
{{ 1 | string }}
{{ 'a b&c' | urlencode }} {{ {'a': '<'} | xmlattr }} {{ 'a.com' | urlize }}
{{ '<b>a</b>' | striptags }}
{{ 'a b c' | wordwrap(3) }} {{ {'a': 1} | pprint }} {{ 1000 | filesizeformat }} {{ -1 | abs }}
{{ 'ab' | first }}{{ 'ab' | last }}{{ 'ab' | length }}{{ missing | d('x') }}
{{ messages[0] | attr('role') }}
{{ [1, 2, 3] | select('odd') | list }} {{ [1, 2] | reject('eq', 1) | list }}
{{ [0, 1] | select | list }} {{ none | map('upper') | list }}
{{ messages | selectattr('role', 'in', ['user']) | list | length }}
{{ ['a'] | map('upper') | list }}
{{ 4 is even }}{{ 3 is odd }}{{ 9 is divisibleby(3) }}{{ 'a' is lower }}
{{ 'A' is upper }}{{ 1 is eq(1) }}
{{ 1 is in([1]) }}{{ 'upper' is filter }}{{ 'odd' is test }}{{ 2 is ge(1) }}{{ none is none }}
{{ dict(a=1) }}{{ dict({'a': 1}, b=2) }}{{ namespace(a=[1]) }}{{ cycler('a', 'b').next() }}
{% for x in [1, 2, 2] %}{{ loop.changed(x) }}{{ loop.length }}{{ loop.cycle('a', 'b') }}{% endfor %}
{% for x in messages if x.n > 1 %}{{ loop.index }}{{ loop.last }}{{ x.n }}{% else %}none{% endfor %}
{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}
{% macro f(x, y=2) %}{{ x }}{{ y }}{{ varargs }}{% endmacro %}{{ f(1, 2, 3) }}
{% macro f(x) %}{{ x }}{{ caller() }}{% endmacro %}{% call f(1) %}in{% endcall %}
{% filter upper %}a{{ 1 }}{% endfilter %} {% set t %}b{{ 2 }}{% endset %}{{ t }}
{% block b %}in {{ messages[0].role }}{% endblock %}{{ self.b() }} 
{% with a = 1 %}{{ a }}{% endwith %}
{% set a, b = (1, 2) %}{{ b }}
{% set ns = namespace(x=1) %}{% set ns.x = ns.x + 1 %}{{ ns.x }}{{ ns.y }}
{{ messages[0].missing }}|{{ messages[0].content.strip() }}
{{ messages[9] is defined }}|{{ messages.f is defined }}
{% for x in messages %}{{ loop.first }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.previtem.role if loop.previtem else '-' }}{% endfor %}
{% for x in messages if x.n > 9 %}x{% else %}none{% endfor %} a   {%- if 1 %} b {% endif -%}  c{# 1 #}
{% raw %}{{ not rendered }}{% endraw %}{% set x = 1 %}{% for m in messages %}{% set x = 2 %}{% endfor %}{{ x }}
{% macro f(x, y=2) %}{{ x }}{{ y }}{% endmacro %}{{ f(y=3, x=1) }} {{ namespace(self='me').self }}
{% macro box() %}[{{ caller('x') }}]{% endmacro %}{% call(v) box() %}{{ v }}{{ v }}{% endcall %}
{{ dict([('x', 1)], y=2) }}{{ dict.fromkeys('ab', 0) }}{{ {'b': 1} | items | list }}{{ 'wOrd' | capitalize }}
{{ messages | rejectattr('n') | list | length }}{% set j = joiner('; ') %}{{ j() }}x{{ j() }}y
{{ 1 if false }}{{ not 1 }}{{ range(1, 10, 3) | list }}{{ messages[::-1][0].role }}{{ 'a' is in 'abc' }}
{{ 'a' is string }}{{ 1 is number }}{{ {} is mapping }}{{ [1] is sequence }}{{ true is boolean }}{{ 2.0 is float }}"""  # noqa: E501


def test_operations_are_those_of_jinja() -> None:
    messages = [{"role": "user", "content": " Hi ", "n": 2}, {"role": "assistant", "n": 1}]
    messages[1]["content"] = "<b>"
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    for line in SAME_AS_JINJA.splitlines():
        expected = environment.from_string(line).render(messages=messages)
        with bounded_rendering():
            assert compile_template(line)({"messages": messages}) == expected, line


@pytest.mark.parametrize("name", ["__class__", "_Namespace__attrs", "__init__", "__dict__"])
@pytest.mark.parametrize("value", ["ns", "{}", "''", "messages", "loop", "dict", "ns.f"])
def test_no_template_reads_an_inner_name(name: str, value: str) -> None:
    begin = "{% set ns = namespace(f='a'.format) %}{% for x in [1] %}"
    for shown in (f"{value}.{name}.x", f"{value}['{name}'].x", f"({value} | attr('{name}')).x"):
        with pytest.raises(ValueError, match=r"unsafe|no attribute|no element"):
            ChatTemplate(f"{begin}{{{{ {shown} }}}}{{% endfor %}}", {}).render([])
