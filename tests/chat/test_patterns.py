"""Regular expressions of JSON schemas, against Python's."""

from __future__ import annotations

import itertools
import re

import pytest

from fd_dsa.chat.patterns import FORMATS, full_regex, matches

TEXTS = ["".join(chars) for n in range(4) for chars in itertools.product("ab1-[^ ", repeat=n)]


@pytest.mark.filterwarnings("ignore:Possible")
@pytest.mark.parametrize(
    "pattern",
    [
        *("", "a", "^a", "a$", "^a$", "^a|b$", "^(a|b)+$", "^$", "a|", r"^\d{2,3}$|b", "(?:a)(b)"),
        *(
            r"^[a-b\d]+$",
            "[^a]",
            r"\w\W",
            r"\s",
            "[[]",
            "[a&&b]",
            "[a^]",
            "[a||b]",
            r"[\]\-]",
            r"\^",
            "a*?b",
        ),
        *("^a{2}$", "a{,2}", "x{y", r"a\x31", r"a\u0031", "(?P<n>a)b", "(?<n>a)b", "^[^ ]*$", "."),
        *("(^a|b$)", "(^a$)|(^b$)", "(^|a)b(-|$)", "(^$|^[ab]+$)", "((^a|b)|1)$"),
    ],
)
def test_full_regexes_match_what_a_search_finds(pattern: str) -> None:
    full = re.compile(full_regex(pattern))
    of_python = re.compile(pattern.replace("(?<n>", "(?P<n>").replace("{,2}", r"\{,2\}"), re.ASCII)
    for text in TEXTS:
        found = of_python.search(text) is not None
        assert (full.fullmatch(text) is not None) == found, text
        if ")" not in pattern and pattern.count("{") + len(re.findall(r"[*+?]", pattern)) < 2:
            assert matches(pattern, text) == found, text


@pytest.mark.parametrize(
    "pattern",
    [
        "(?=a)",
        "(?!a)",
        r"(a)\1",
        "(?i)a",
        r"\bx",
        "(^a)+",
        "a^b",
        "a(^|b)c",
        "[]",
        "[a",
        r"\p{L}",
        "a" * 2000,
    ],
)
def test_patterns_that_no_grammar_has(pattern: str) -> None:
    with pytest.raises(ValueError, match="got "):
        full_regex(pattern)


@pytest.mark.parametrize("pattern", ["(a+)+$", "a*a*$", "(a|a)*$", "^a*a*a*$", "*", "(", "a**"])
def test_patterns_that_names_are_not_compared_with(pattern: str) -> None:
    with pytest.raises(ValueError, match="got "):
        matches(pattern, "a" * 100 + "!")


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("date", "2024-02-28", "2023-02-30"),
        ("time", "23:59:59.5Z", "24:00:00Z"),
        ("date-time", "2024-12-31T00:00:00+01:00", "2024-12-31"),
        ("duration", "P1DT2H3M4S", "P"),
        ("email", "a.b@example.com", "a@b@c"),
        ("hostname", "a-b.example", "-a"),
        ("ipv4", "127.0.0.1", "256.0.0.1"),
        ("ipv6", "2001:db8::", "1:2"),
        ("uuid", "123e4567-e89b-12d3-a456-426614174000", "123e4567"),
        ("uri", "https://example.com/a?b=c#d", "example"),
    ],
)
def test_formats(name: str, good: str, bad: str) -> None:
    assert re.fullmatch(FORMATS[name], good) and not re.fullmatch(FORMATS[name], bad)
