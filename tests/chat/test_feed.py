"""Text in pieces: markers that overlap, and what is handed out when."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fd_dsa.chat.feed import Steps, TextFeed

MARKERS = ("ab", "abb", "cab", "ba")


def split(pieces: list[str], markers: tuple[str, ...]) -> list[tuple[str, str | None]]:
    """Texts, each with the marker after it."""
    feed = TextFeed()
    found: list[tuple[str, str | None]] = []

    def run() -> Steps[None]:
        while True:
            text, marker = yield from feed.until(markers)
            found.append((text, marker))
            if marker is None:
                return

    steps = run()
    for piece in pieces:
        feed.push(piece)
        next(steps)
    feed.end()
    with pytest.raises(StopIteration):
        next(steps)
    return found


def naive(text: str, markers: tuple[str, ...]) -> list[tuple[str, str | None]]:
    """The same, one character after the other."""
    found: list[tuple[str, str | None]] = []
    begin = at = 0
    while at < len(text):
        here = [marker for marker in markers if text.startswith(marker, at)]
        if here:
            marker = max(here, key=len)
            found.append((text[begin:at], marker))
            begin = at = at + len(marker)
        else:
            at += 1
    return [*found, (text[begin:], None)]


@settings(max_examples=300)
@given(text=st.text("abcx", max_size=20), data=st.data())
def test_the_first_marker_wins_and_of_those_at_one_place_the_longest(
    text: str, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert split(pieces, MARKERS) == naive(text, MARKERS)


def test_only_what_may_become_a_marker_is_held_back() -> None:
    feed = TextFeed()
    seen: list[str] = []
    steps = feed.stream_until(("<end>",), seen.append)
    for piece, shown in (("a<", "a"), ("e", "a"), ("x<en", "a<ex"), ("<e", "a<ex<en")):
        feed.push(piece)
        next(steps)
        assert "".join(seen) == shown
