"""Text as it comes: whole characters at every split, the same text in the end."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fd_dsa.config import demo_model_path
from fd_dsa.engine.detokenizer import StopChecker, new_detokenizer
from fd_dsa.engine.tokenizer import Tokenizer
from tests.engine.tokenizer_kinds import KINDS

TEXTS = [
    "plain words, and 12 numbers",
    "emoji 👩‍💻👨‍👩‍👧‍👦🏳️‍🌈 in a row",
    "漢字かな交じり文と한국어",
    "naïve Ünïcödé ß",
    "  spaces   and\n\nlines\t",
    "a\u0301 combining, RTL שלום, \U0001d518\U0001d52b",
    "",
]


TOKENIZERS = {
    "byte-level": Tokenizer.from_folder(demo_model_path()),
    "byte-fallback": Tokenizer(KINDS["llama"]()),
}


def stream(tokenizer, token_ids, **options):
    """Text of every token, then of the flush."""
    detokenizer = new_detokenizer(tokenizer, **options)
    return [*(detokenizer.append(token_id) for token_id in token_ids), detokenizer.flush()]


@settings(max_examples=60)
@given(text=st.text(max_size=30) | st.sampled_from(TEXTS), kind=st.sampled_from(sorted(TOKENIZERS)))
def test_any_text_comes_out_character_by_character(text, kind):
    tokenizer = TOKENIZERS[kind]
    token_ids = tokenizer.encode(text)
    whole = tokenizer.decode(token_ids)
    shown = ""
    for piece in stream(tokenizer, token_ids):
        shown += piece
        assert whole.startswith(shown)
    assert shown == whole


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS[:-1])
def test_a_text_cut_at_any_token_goes_on_where_the_prompt_ended(kind, text):
    tokenizer = TOKENIZERS[kind]
    token_ids = tokenizer.encode(text)
    for cut in range(1, len(token_ids) + 1):
        prompt_text = tokenizer.decode(token_ids[:cut])
        if prompt_text.endswith("\ufffd"):
            continue
        rest = stream(tokenizer, token_ids[cut:], prompt_token_ids=token_ids[:cut])
        assert prompt_text + "".join(rest) == text


@settings(max_examples=80)
@given(token_ids=st.lists(st.integers(0, 4095), max_size=25), skip=st.booleans())
def test_byte_level_text_of_any_tokens_equals_decoding_them_at_once(token_ids, skip):
    tokenizer = TOKENIZERS["byte-level"]
    pieces = stream(tokenizer, token_ids, skip_special_tokens=skip)
    assert "".join(pieces) == tokenizer.decode(token_ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_an_unfinished_character_is_held_and_shown_broken_at_the_end(kind):
    tokenizer = TOKENIZERS[kind]
    token_ids = tokenizer.encode("x😀", add_special_tokens=False)
    *pieces, last = stream(tokenizer, token_ids[:-1])
    assert "".join(pieces).strip() == "x"
    assert set(last) == {"\ufffd"}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_bytes_that_become_no_character_do_not_hold_the_text_back_for_ever(kind):
    tokenizer = TOKENIZERS[kind]
    broken = tokenizer.encode("😀", add_special_tokens=False)[:-1][-1]
    pieces = stream(tokenizer, [*[broken] * 60, *tokenizer.encode("abc")])
    assert "".join(pieces[:60]).count("\ufffd") >= 34
    assert "".join(pieces).endswith("abc")


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_skipped_special_tokens_have_no_text_and_no_cost(kind):
    tokenizer = TOKENIZERS[kind]
    special = 1
    words = tokenizer.encode("a words")
    pieces = stream(tokenizer, [words[0], *[special] * 100, *words[1:]])
    assert "".join(pieces) == "a words"
    assert stream(tokenizer, [special], skip_special_tokens=False)[0] == tokenizer.decode(
        [special], skip_special_tokens=False
    )


def test_ids_without_a_token_have_no_text():
    assert stream(TOKENIZERS["byte-level"], [4096, 100_000]) == ["", "", ""]


def stop_after(pieces, stops):
    """Shown text and matched stop string of a text that comes in pieces."""
    checker = StopChecker(stops)
    shown = ""
    for piece in pieces:
        text, matched = checker.append(piece)
        shown += text
        if matched is not None:
            return shown, matched
    return shown + checker.flush(), None


def first_stop(text, stops):
    """Naive rule: the stop string completed first, the longest of those."""
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


@settings(max_examples=150)
@given(
    pieces=st.lists(st.text("ab!", max_size=5), max_size=12),
    stops=st.lists(st.text("ab!", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_the_first_stop_string_wins_however_the_text_is_cut(pieces, stops):
    assert stop_after(pieces, stops) == first_stop("".join(pieces), stops)


@settings(max_examples=80)
@given(
    text=st.text("ab!", max_size=20),
    stops=st.lists(st.text("ab!", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_no_more_is_held_back_than_may_become_a_stop_string(text, stops):
    checker = StopChecker(stops)
    shown = ""
    for n, char in enumerate(text, start=1):
        piece, matched = checker.append(char)
        shown += piece
        if matched is not None:
            return
        held = text[len(shown) : n]
        assert shown + held == text[:n]
        assert not held or any(len(stop) > len(held) and stop.startswith(held) for stop in stops)
    assert shown + checker.flush() == text


def test_many_long_stop_strings_of_many_choices_take_little_memory():
    stops = [f"{i:02d}" * 256 for i in range(64)]
    tracemalloc.start()
    checkers = [StopChecker(stops) for _ in range(128)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(checkers) == 128 and peak < 1 << 20


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_markers_of_a_parser_stay_in_the_text(kind):
    tokenizer = TOKENIZERS[kind]
    # special in both vocabularies
    first, second = 1, 2
    words = tokenizer.encode("words", add_special_tokens=False)
    ids = [first, *words, second, *words]
    detokenizer = new_detokenizer(tokenizer, kept_token_ids=frozenset([second]))
    text = "".join(detokenizer.append(token) for token in ids) + detokenizer.flush()
    assert text == tokenizer.decode(ids, kept=frozenset([second]))
    assert tokenizer.decode([second], skip_special_tokens=False) in text
    assert tokenizer.decode([first], skip_special_tokens=False) not in text


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("text", ["hello world", "naïve é 🙂 日本"])
def test_the_pieces_of_a_text_are_its_bytes(kind, text):
    tokenizer = TOKENIZERS[kind]
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = b"".join(tokenizer.piece_bytes(token_id) for token_id in token_ids)
    assert pieces.decode().removeprefix(" ") == text
    assert tokenizer.piece_bytes(10**6) == b""
