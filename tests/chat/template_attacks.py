"""Templates that would make large values or take a long time, by name."""

from __future__ import annotations

BIG = "{% set ns = namespace(x='ab', y=[1], t=()) %}"
# a list of few objects whose text has no end
NESTED = BIG + "{% for i in range(60) %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}"
DEEP = BIG + "{% for i in range(20000) %}{% set ns.t = (ns.t,) %}{% endfor %}"
SAME = "{% set a = 'a' * 1000000 %}{% set b = 'b' * 500000 %}"

ATTACKS = {
    # one operation that makes a large value
    "constant": "{{ 'a' * 10**9 }}",
    "text": "{{ messages[0].content * 10**9 }}",
    "list": "{{ messages * 10**9 }}",
    "width": "{{ messages[0].content.ljust(10**9) }}",
    "percent": "{{ '%2000000000d' % messages | length }}",
    "format": "{{ '{:>2000000000}'.format(1) }}",
    "replace": "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "join": "{{ ('a' * 10000).join(['b'] * 100000) }}",
    "indent": "{{ ('a\n' * 10000) | indent('b' * 100000) }}",
    "json": NESTED + "{{ ns.y | tojson }}",
    "nested": NESTED + "{{ ns.y }}",
    "deep": DEEP + "{{ {ns.t: 1} }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    # many small ones
    # a constant would be one object for all
    "kept": BIG + "{% for i in range(99999) %}{% set ns.y = [ns.y, 'a' * (10000 + i)] %}"
    "{% endfor %}",
    "doubled": BIG + "{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "block": "{% block b %}{% for i in range(9) %}{{ self.b() }}{% endfor %}{% endblock %}",
    "output": "{% for i in range(99999) %}{{ i }}{% endfor %}",
    # only time
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops_test": "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}"
    "{% endfor %}",
    "lists": "{% for a in range(99999) %}{% set x = range(99999) | list %}{% endfor %}",
    "recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(200) }}",
    "rfind": "{{ ('a' * 1000000).rfind('ab' + 'a' * 500000) }}",
    "sort": SAME + "{{ ([a, a + 'b'] * 10000) | sort(case_sensitive=true) }}",
    "hashes": "{% set p = 2 ** 61 - 1 %}{{ dict.fromkeys(range(0, 99999 * p, p)) }}",
}
