"""Templates that would make large values or take a long time, by name."""

from __future__ import annotations

BIG = "{% set ns = namespace(x='ab', y=[1], t=()) %}"
DOUBLE = BIG + "{% for i in range(99) %}{% set ns.x = "
# a list of few objects whose text has no end
NESTED = BIG + "{% for i in range(60) %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}"
DEEP = BIG + "{% for i in range(20000) %}{% set ns.t = (ns.t,) %}{% endfor %}"
WIDE = BIG + "{% for i in range(60) %}{% set ns.t = (ns.t, ns.t) %}{% endfor %}"
SAME = "{% set a = 'a' * 1000000 %}{% set b = 'b' * 500000 %}"


ATTACKS = {
    # one operation that makes a large text
    "mul": "{{ 'a' * 10**9 }}",
    "mul_left": "{{ 10**9 * 'a' }}",
    "mul_list": "{{ messages * 10**9 }}",
    "mul_tuple": "{{ (1, 2) * 10**9 }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "rjust": "{{ 'a'.rjust(10**9, 'é') }}",
    "center": "{{ 'a'.center(10**9) }}",
    "zfill": "{{ 'a'.zfill(10**9) }}",
    "expandtabs": "{{ '\t'.expandtabs(10**9) }}",
    "expandtabs_name": "{{ '\t'.expandtabs(tabsize=10**9) }}",
    "percent": "{{ '%2000000000d' % 1 }}",
    "percent_flags": "{{ '%-+ #02000000000d' % 1 }}",
    "percent_precision": "{{ '%.2000000000d' % 1 }}",
    "percent_star": "{{ '%*d' % (10**9, 1) }}",
    "percent_star_precision": "{{ '%.*f' % (10**9, 1.5) }}",
    "percent_name": "{{ '%(a(b)c)2000000000d' % {'a(b)c': 1} }}",
    "percent_mapping": "{{ ('%(a)s' * 10000) % {'a': 'x' * 100000} }}",
    "percent_many": "{{ ('%s' * 100000) % ('x' * 10000,) }}",
    "percent_text": NESTED + "{{ '%s' % [ns.y] }}",
    "odd": "{{ '%2000000000d' is odd }}",
    "even": "{{ '%2000000000d' is even }}",
    "divisibleby": "{{ '%2000000000d' is divisibleby(1) }}",
    "select_odd": "{{ ['%2000000000d'] | select('odd') | list }}",
    "format": "{{ '{:>2000000000}'.format(1) }}",
    "format_nested": "{{ '{:>{w}}'.format(1, w=10**9) }}",
    "format_precision": "{{ '{:.1000000000f}'.format(1.5) }}",
    "format_map": "{{ '{a:>2000000000}'.format_map({'a': 1}) }}",
    "format_markup": "{{ ('{:>2000000000}' | safe).format(1) }}",
    "format_attr": "{{ ('{:>2000000000}' | attr('format'))(1) }}",
    "format_text": NESTED + "{{ '{0}'.format(ns.y) }}",
    "format_repr": NESTED + "{{ '{0!r:.3}'.format(ns.y) }}",
    "format_many": "{{ ('{0}' * 10000).format('a' * 100000) }}",
    "filter_format": "{{ '%2000000000d' | format(1) }}",
    "filter_format_name": "{{ '%(a)2000000000d' | format(a=1) }}",
    "filter_center": "{{ 'a' | center(10**9) }}",
    "filter_indent": "{{ 'a\nb' | indent(10**9) }}",
    "filter_indent_text": "{{ ('a\n' * 10000) | indent('b' * 100000) }}",
    "filter_indent_blank": "{{ ('\n' * 100000) | indent(100000, blank=true) }}",
    "tojson_indent": "{{ [1] | tojson(indent=10**9) }}",
    "tojson_indent_deep": "{{ ([[[[[1]]]]] * 100000) | tojson(indent=100000) }}",
    "tojson_separators": "{{ ([1] * 100000) | tojson(separators=('a' * 100000, ':')) }}",
    "tojson_ascii": "{{ ('é' * 10000000) | tojson(ensure_ascii=true) }}",
    "tojson_nested": NESTED + "{{ ns.y | tojson }}",
    "tojson_nested_indent": NESTED + "{{ ns.y | tojson(indent=1) }}",
    "join": "{{ ('a' * 10000).join(['b'] * 100000) }}",
    "join_text": "{{ ('a' * 10000).join('b' * 100000) }}",
    "join_generator": "{{ ('a' * 10000).join((['b'] * 100000) | map('upper')) }}",
    "filter_join": "{{ (['b'] * 100000) | join('a' * 10000) }}",
    "filter_join_items": "{{ (['b' * 10000] * 100000) | join }}",
    "filter_join_attribute": "{{ ([{'a': 'b' * 10000}] * 100000) | join(attribute='a') }}",
    "filter_join_nested": NESTED + "{{ [ns.y] | join }}",
    "replace": "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "replace_empty": "{{ ('a' * 100000).replace('', 'b' * 100000) }}",
    "replace_markup": "{{ (('a' * 1000000) | safe).replace('a', '<' * 20) }}",
    "filter_replace": "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}",
    "filter_replace_nested": NESTED + "{{ 'a' | replace('a', ns.y) }}",
    "escape": "{{ ('<' * 9000000) | escape }}",
    "forceescape": "{{ ('<' * 9000000) | forceescape }}",
    "markup_sum": "{{ ('a' | safe) + '<' * 9000000 }}",
    "markup_percent": "{{ ('%s' | safe) % ('<' * 9000000) }}",
    "markup_join": "{{ ('' | safe).join(['<' * 10000] * 1000) }}",
    "wordwrap": "{{ ('a ' * 100000) | wordwrap(1, wrapstring='b' * 10000) }}",
    "urlize": "{{ ('a.com ' * 100000) | urlize(target='b' * 10000) }}",
    "urlencode": "{{ ('é' * 9000000) | urlencode }}",
    "xmlattr": "{{ {'a': '<' * 9000000} | xmlattr }}",
    "striptags": "{{ ('<!---->' * 1000000) | striptags }}",
    "pprint": NESTED + "{{ ns.y | pprint }}",
    "batch": "{{ [1] | batch(10**9, 0) | list }}",
    "slice": "{{ [1] | slice(10**9, 0) | list }}",
    "slice_unread": "{% for x in [1] | slice(10**9) %}{% endfor %}",
    "list_of_text": "{{ ('é' * 9000000) | list }}",
    "split": "{{ ('ab,' * 1000000).split(',') }}",
    "split_blanks": "{{ ('ab ' * 1000000).split() }}",
    "splitlines": "{{ ('ab\n' * 1000000).splitlines() }}",
    "title": "{{ ('ab ' * 1000000) | title }}",
    "wordcount": "{{ ('ab ' * 1000000) | wordcount }}",
    "sum": "{{ ([[1] * 1000] * 10000) | sum(start=[]) }}",
    "sum_attribute": "{{ ([{'a': [1] * 1000}] * 10000) | sum('a', []) }}",
    "translate": "{{ ('a' * 100000).translate({97: 'b' * 100000}) }}",
    "encode": "{{ ('a' * 100000).encode('punycode') }}",
    "to_bytes": "{{ (5).to_bytes(10**9) }}",
    "strftime": "{{ strftime_now('%c' * 1000000) }}",
    "arguments": "{{ cycler(*('é' * 9000000)) }}",
    # numbers
    "power": "{{ 9 ** (9 ** 9) }}",
    "power_twice": "{% set n = 10 ** 600 %}{{ n * n * n }}",
    "sum_of_numbers": BIG + "{% set ns.n = 3 %}{% for i in range(99999) %}"
    "{% set ns.n = ns.n + ns.n %}{% set ns.y = [ns.y, ns.n] %}{% endfor %}",
    "kept_numbers": BIG + "{% set n = 10 ** 600 %}{% for i in range(99999) %}"
    "{% set ns.y = [ns.y, [n + i, -n, n // 1, n - i, n % (n + 1), n | abs]] %}{% endfor %}",
    "int_base": "{{ ('f' * 1000000) | int(base=16) }}",
    "round": "{{ 5 | round(-(10 ** 9)) }}",
    "round_floor": "{{ 5 | round(10 ** 9, 'floor') }}",
    # many small ones
    "tilde": DOUBLE + "ns.x ~ ns.x %}{% endfor %}",
    "plus": DOUBLE + "ns.x + ns.x %}{% endfor %}",
    "plus_list": BIG + "{% for i in range(99) %}{% set ns.y = ns.y + ns.y %}{% endfor %}",
    "set_block": BIG + "{% for i in range(99) %}{% set b %}{{ ns.x }}{{ ns.x }}{% endset %}"
    "{% set ns.x = b %}{% endfor %}",
    "macro": "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}" + DOUBLE + "f(ns.x) %}{% endfor %}",
    "call_block": BIG + "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    "{% for i in range(99) %}{% set b %}{% call f() %}{{ ns.x }}{% endcall %}{% endset %}"
    "{% set ns.x = b %}{% endfor %}",
    "filter_block": BIG
    + "{% for i in range(99) %}{% set b %}{% filter upper %}{{ ns.x }}{{ ns.x }}"
    "{% endfilter %}{% endset %}{% set ns.x = b %}{% endfor %}",
    "recursive": "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "recursive_macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    "{% endmacro %}{{ f(200) }}",
    "block": "{% block b %}{% for i in range(9) %}{{ self.b() }}{% endfor %}{% endblock %}",
    "slices": BIG + SAME + "{% for i in range(99999) %}{% set ns.y = [ns.y, a[1:]] %}{% endfor %}",
    "kept": BIG + "{% for i in range(99999) %}{% set ns.y = [ns.y, 'a' * 10000] %}{% endfor %}",
    "kept_dict": BIG + "{% set d = dict.fromkeys(range(9999)) %}{% for i in range(99999) %}"
    "{% set ns.y = [ns.y, dict(d)] %}{% endfor %}",
    "kept_literal": BIG
    + "{% for i in range(99999) %}{% set ns.y = [ns.y, ["
    + "1, " * 2000
    + "]] %}"
    "{% endfor %}",
    "constants": "{% macro f() %}{% for i in range(99999) %}"
    + "a{% if 1 %}b{% endif %}" * 200
    + "{% endfor %}{% endmacro %}{{ f() }}",
    "output": "{% for i in range(99999) %}{{ i }}{% endfor %}",
    "output_data": "{% for i in range(9999) %}" + "a" * 1000 + "{% endfor %}",
    # only time
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops_test": "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}"
    "{% endfor %}",
    "lists": "{% for a in range(99999) %}{% set x = range(99999) | list %}{% endfor %}",
    "map": "{% for a in range(99999) %}{% set x = range(99999) | map('abs') | list %}{% endfor %}",
    "select_nothing": "{% for a in range(99999) %}"
    "{% set x = range(99999) | select('string') | list %}{% endfor %}",
    "strip": "{{ ('z' * 1000000).strip('a' * 1000000 + 'z') }}",
    "trim": "{{ ('z' * 1000000) | trim('a' * 1000000 + 'z') }}",
    "rfind": "{{ ('a' * 1000000).rfind('ab' + 'a' * 500000) }}",
    "rsplit": "{{ ('a' * 1000000).rsplit('ab' + 'a' * 500000) }}",
    "rpartition": "{{ ('a' * 1000000).rpartition('ab' + 'a' * 500000) }}",
    "startswith": SAME + "{{ a.startswith((a + 'b',) * 100000) }}",
    "equal": SAME + "{{ ([a] * 100000) == ([a + ''] * 100000) }}",
    "less": SAME + "{{ ([a] * 100000) < ([a + ''] * 100000) }}",
    "sort": SAME + "{{ ([a, a + 'b'] * 10000) | sort(case_sensitive=true) }}",
    "sort_attribute": SAME + "{{ ([namespace(x=a)] * 10000) | sort(attribute='x') }}",
    "groupby": SAME + "{{ ([{'x': a}] * 10000) | groupby('x') }}",
    "unique": SAME + "{{ ([a] * 10000) | unique | list }}",
    "max": SAME + "{{ ([a] * 10000) | max }}",
    "dictsort": SAME + "{{ dict.fromkeys(range(9999), a) | dictsort(by='value') }}",
    "hashes": "{% set p = 2 ** 61 - 1 %}{{ dict.fromkeys(range(0, 99999 * p, p)) }}",
    "hashes_of_a_dict": "{% set p = 2 ** 61 - 1 %}{{ {}.fromkeys(range(0, 99999 * p, p)) }}",
    "hashes_pairs": "{% set p = 2 ** 61 - 1 %}{{ dict(range(0, 99999 * p, p) | batch(2)) }}",
    "sets": "{% set d = dict.fromkeys(range(999)) %}{{ d.keys() - d.keys() }}",
    # values with few objects and no end
    "text_nested": NESTED + "{{ ns.y }}",
    "string_nested": NESTED + "{{ ns.y | string }}",
    "upper_nested": NESTED + "{{ ns.y | upper }}",
    "tilde_nested": NESTED + "{{ 'a' ~ ns.y }}",
    "equal_nested": NESTED + "{% set z = ns.y %}" + NESTED + "{{ ns.y == z }}",
    "test_nested": NESTED + "{% set z = ns.y %}" + NESTED + "{{ ns.y is eq(z) }}",
    "in_nested": NESTED + "{% set z = ns.y %}" + NESTED + "{{ ns.y in [z] }}",
    "changed_nested": "{% for i in [1, 2] %}" + NESTED + "{% if loop.changed(ns.y) %}{% endif %}"
    "{% endfor %}",
    "index_nested": NESTED + "{{ [1].index(ns.y) }}",
    "raise_nested": NESTED + "{{ raise_exception(ns.y) }}",
    "test_lower_nested": NESTED + "{{ ns.y is lower }}",
    "namespace_nested": NESTED + "{{ namespace(a=ns.y) }}",
    "namespace_many": BIG + "{% set ns.x = 'a' * 1000000 %}{{ [ns] * 100000 }}",
    "hash_wide": WIDE + "{{ {ns.t: 1} }}",
    "hash_deep": DEEP + "{{ {ns.t: 1} }}",
    "hash_item": DEEP + "{{ messages[0][ns.t] }}",
    "hash_get": DEEP + "{{ messages[0].get(ns.t) }}",
    "hash_fromkeys": DEEP + "{{ dict.fromkeys([ns.t]) }}",
    "hash_map": DEEP + "{{ [{}] | map(attribute=ns.t) | list }}",
    "hash_map_name": DEEP + "{{ [1] | map(ns.t) | list }}",
    "hash_test": DEEP + "{{ ns.t is filter }}",
    "missing_item": WIDE + "{{ messages[ns.t].x }}",
    # names of the compiled template
    "step_back": "{{ [-(10 ** 12)] | map('(tick)') | list }}{{ 'a' * 10**9 }}",
    "map_join": "{{ [['b'] * 100000] | map('join', 'a' * 10000) | list }}",
    "select_in": SAME + "{{ [a + 'b'] | select('in', [a + 'c'] * 100000) | list }}",
    "constant_list": "{{ (['b'] * 1000000) | length }}" * 20,
}
