"""Long texts: the tokens of the whole text, whatever the windows are, and other threads run."""

from __future__ import annotations

import random
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fd_dsa.cancellation import Cancelled, cancelled_by
from fd_dsa.engine import encoding
from fd_dsa.engine.encoding import WINDOW_CHARS, TooManyTokens, encode_text
from fd_dsa.engine.tokenizer import Tokenizer
from tests.engine.tokenizer_kinds import CORPUS, KINDS

BACKENDS = {kind: make() for kind, make in KINDS.items()}
LONGEST = {
    kind: max((len(token.content) for token in one.get_added_tokens_decoder().values()), default=0)
    for kind, one in BACKENDS.items()
}
# what rules of words, normalizers and added tokens disagree about when it is cut
FRAGMENTS = [
    *("the ", "fox", "don't", "'s", "'", "x=1;", "w7 ", "(x)", "-", "_", ".", ",", "!?", "<", "｜"),
    *(" ", "  ", "    ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028", "\ufeff", "\x00"),
    *("9", "123", "1234567890" * 30, "0" * 100, "1,234", "a" * 200, " " * 150, "\n" * 90),
    *("漢字", "かな", "한국어", "é", "e\u0301", "\u0301", "Å", "A\u030a", "ﬁ", "…", "ß", "İ", "Σ"),
    *("กำ", "🙂" * 40, "👩\u200d💻", "\u200d", "▁", "<mask>", "<r>", "<think>", "</think", "<s>"),
    *("</s>", "<｜User｜>", "<｜place▁holder▁no▁100｜>"),
]


def encode(kind, text, special, **options):
    """Ids by windows."""
    return encode_text(BACKENDS[kind], text, special, longest_added_token=LONGEST[kind], **options)


def long_text(pool, seed, length):
    """Fragments of a few kinds in random order, some of them many times."""
    draw = random.Random(seed)
    parts, left = [], length
    while left > 0:
        part = draw.choice(pool) or " "
        # no longer: some rules of digits take time and memory of the square of a run
        part *= draw.randint(1, max(1, 1_500 // len(part))) if draw.random() < 0.03 else 1
        parts.append(part)
        left -= len(part)
    return "".join(parts)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None)
@given(
    pool=st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=4), min_size=2, max_size=20),
    seed=st.integers(0, 2**32),
    length=st.integers(2_000, 12_000),
    window_chars=st.sampled_from([1, 2_000, 3_000]),
    special=st.booleans(),
)
def test_windows_give_the_tokens_of_the_whole_text(kind, pool, seed, length, window_chars, special):
    text = long_text(pool, seed, length)
    whole = BACKENDS[kind].encode(text, add_special_tokens=special).ids
    assert encode(kind, text, special, window_chars=window_chars) == whole


@pytest.mark.parametrize("kind", KINDS)
def test_windows_are_used_where_there_are_words(kind, monkeypatch):
    """The test above is one of windows then, and a long text needs little memory."""
    sizes = []
    window = encoding.Window
    monkeypatch.setattr(
        encoding,
        "Window",
        lambda *args: sizes.append(args[3] - args[2]) or window(*args),
    )
    text = "".join(CORPUS[:6]) * 20
    whole = BACKENDS[kind].encode(text, add_special_tokens=True).ids
    assert encode(kind, text, True, window_chars=4_000) == whole
    if kind == "llama":
        assert len(sizes) == 2
    else:
        assert max(sizes) == 4_000 and len(sizes) > len(text) / 4_000


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "text", ["7" * 3_000, " " * 9_000, "漢" * 9_000, "a" * 9_000, "\n " * 5_000]
)
def test_a_text_that_is_one_run_has_no_seam_that_is_wrong(kind, text):
    whole = BACKENDS[kind].encode(text).ids
    assert encode(kind, text, True, window_chars=2_000) == whole


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_is_given_up_when_it_has_too_many_tokens(kind):
    text = "".join(CORPUS[:4])
    num_tokens = len(BACKENDS[kind].encode(text).ids)
    for window_chars in (WINDOW_CHARS, 2_000):
        options = {"window_chars": window_chars}
        assert len(encode(kind, text, True, max_tokens=num_tokens, **options)) == num_tokens
        with pytest.raises(TooManyTokens) as caught:
            encode(kind, text, True, max_tokens=num_tokens - 1, **options)
        assert caught.value.num_tokens <= num_tokens


def test_a_text_is_not_read_further_when_its_client_leaves(monkeypatch):
    stop, windows = threading.Event(), []
    window = encoding.Window

    def read(*args):
        windows.append(window(*args))
        stop.set()
        return windows[-1]

    monkeypatch.setattr(encoding, "Window", read)
    with cancelled_by(stop), pytest.raises(Cancelled):
        encode("deepseek", "fox " * 9_000, True, window_chars=2_000)
    assert len(windows) == 1


def test_what_is_left_of_a_text_is_not_read(monkeypatch):
    ends = []
    window = encoding.Window
    monkeypatch.setattr(encoding, "Window", lambda *args: ends.append(args[3]) or window(*args))
    tokenizer = Tokenizer(BACKENDS["deepseek"])
    text = "".join(CORPUS) * 400
    with pytest.raises(TooManyTokens, match="or more tokens"):
        tokenizer.encode(text, max_tokens=1_000)
    assert max(ends) < len(text) / 20


@pytest.mark.parametrize("place", [5, 100_000])
def test_a_lone_surrogate_is_a_value_error_wherever_it_is(place):
    text = "word " * 30_000
    with pytest.raises(ValueError, match="no valid Unicode"):
        Tokenizer(BACKENDS["demo"]).encode(text[:place] + "\ud800" + text[place:])


@pytest.mark.parametrize("kind", ["demo", "llama"])
def test_other_threads_run_while_a_text_is_tokenized_and_decoded(kind):
    """`tokenizers` gives up the GIL in some calls alone; in the others a thread is of no use."""
    tokenizer = Tokenizer(BACKENDS[kind])
    text = "the weather there " * 10_000
    num_turns = 0
    is_done = threading.Event()

    def take_turns():
        nonlocal num_turns
        while not is_done.is_set():
            num_turns += 1
            time.sleep(0.001)

    def turns_during(work):
        before = num_turns
        result = work()
        assert num_turns - before >= 5
        return result

    thread = threading.Thread(target=take_turns)
    thread.start()
    try:
        ids = turns_during(lambda: tokenizer.encode(text))
        assert turns_during(lambda: tokenizer.decode(ids * 5)).count("weather") == 50_000
    finally:
        is_done.set()
        thread.join()
