"""What a body holds, counted while it arrives, compared with a reader of one byte at a time."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fd_dsa.serve.body_scan import CONTAINER_WEIGHT, MAX_DEPTH, BodyScan
from fd_dsa.serve.errors import ApiError

ANY = 1 << 62
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=30,
)
# bytes that matter, often next to each other
HOSTILE_BYTES = st.lists(
    st.sampled_from([b'"', b"\\", b"\\\\", b'\\"', b"[", b"]", b"{", b"}", b",", b"a", b"\xff"])
).map(b"".join)
CUTS = st.lists(st.integers(0, 400), max_size=12)


def read_slowly(content: bytes) -> tuple[int, int]:
    """Weight and depth of bytes; an escape matters before a quotation mark or a backslash alone."""
    weight = depth = deepest = 0
    in_text = is_escaped = False
    for byte in content:
        char = chr(byte)
        if is_escaped and char in '"\\':
            is_escaped = False
            continue
        is_escaped = char == "\\"
        if char == '"':
            in_text = not in_text
            weight += CONTAINER_WEIGHT * in_text
        elif not in_text:
            weight += CONTAINER_WEIGHT * (char in "[{") + (char == ",")
            depth += (char in "[{") - (char in "]}")
            deepest = max(deepest, depth)
    return weight, deepest


def scanned(content: bytes, cuts: list[int]) -> tuple[int, int]:
    """Weight and depth of bytes that come in parts."""
    scan = BodyScan(ANY)
    ends = [0, *sorted(min(cut, len(content)) for cut in cuts), len(content)]
    for begin, end in itertools.pairwise(ends):
        scan.feed(content[begin:end])
    return scan.weight, scan.deepest


@given(JSON_VALUES, CUTS, st.booleans())
def test_values_count_what_they_are_however_they_are_cut(
    value: Any, cuts: list[int], is_ascii: bool
) -> None:
    content = json.dumps(value, ensure_ascii=is_ascii).encode("utf-8", "replace")
    expected = read_slowly(content)
    assert scanned(content, cuts) == expected
    assert expected == (weight_of(value), depth_of(value))


def weight_of(value: Any) -> int:
    """What a value counts."""
    if isinstance(value, dict):
        names = CONTAINER_WEIGHT * len(value)
        return names + weight_of(list(value.values()))
    if isinstance(value, list):
        return CONTAINER_WEIGHT + max(len(value) - 1, 0) + sum(map(weight_of, value))
    return CONTAINER_WEIGHT * isinstance(value, str)


def depth_of(value: Any) -> int:
    """Lists and objects around its innermost value."""
    inner = list(value.values()) if isinstance(value, dict) else value
    return 1 + max(map(depth_of, inner), default=0) if isinstance(inner, list) else 0


@given(HOSTILE_BYTES, CUTS)
def test_bytes_that_are_no_json_are_counted_by_the_same_rules(
    content: bytes, cuts: list[int]
) -> None:
    # 64 levels are a refusal of their own
    if read_slowly(content)[1] <= MAX_DEPTH:
        assert scanned(content, cuts) == read_slowly(content)


def test_the_limits_are_exact_and_named() -> None:
    content = b'{"a": [1, 2, "b"]}'
    weight = weight_of(json.loads(content))
    BodyScan(weight).feed(content)
    with pytest.raises(
        ApiError, match=f"more than {weight - 1} values, the --max-body-v"
    ) as caught:
        BodyScan(weight - 1).feed(content)
    assert caught.value.status == 413
    BodyScan(ANY).feed(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)
    BodyScan(ANY).feed(b"[]" * 1000 + b'"' + b"[" * 1000 + b'"')
    with pytest.raises(ApiError, match=f"more than {MAX_DEPTH} lists and objects") as caught:
        BodyScan(ANY).feed(b'{"a":' * (MAX_DEPTH + 1))
    assert caught.value.status == 400
