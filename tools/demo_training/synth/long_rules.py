"""Rules on what the answer to a long request holds: words, letters, blanks, marks.

Each function changes a Page.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from .checks import count_capitals, letter_count
from .page import Page
from .pieces import Pieces
from .prose import long_essay
from .short_rules import blank_lines, content

MARKED_WORDS = 3


def word_list(p: Pieces, words: list[str]) -> str:
    """Return words as people list them: with commas, "and", or in quotation marks."""
    mark = p.choice(["", "", "", "", "'", '"'])
    quoted = [mark + w + mark for w in words]
    if len(words) > 1 and p.chance(0.45):
        return ", ".join(quoted[:-1]) + p.choice([" and ", ", and "]) + quoted[-1]
    return p.choice([", ", ", ", " and ", "; "]).join(quoted)


def quoted(p: Pieces, word: str) -> str:
    """Return a word as it is, or in quotation marks."""
    mark = p.choice(["", "", "'", '"'])
    return mark + word + mark


def any_word(p: Pieces) -> str:
    """Return a word to ask for: at times two words, a name, or a made-up word."""
    r = p.random.random()
    if r < 0.75:
        return p.word()
    if r < 0.85:
        return p.word() + " " + p.word()
    return p.name() if r < 0.92 else p.word() + p.choice(["ing", "er", "ness", "ful", "ish"])


def keywords(p: Pieces, page: Page) -> None:
    """Require one to six words, in the given order."""
    words = list(dict.fromkeys(any_word(p) for _ in range(p.choice([1, 2, 2, 2, 3, 3, 4, 5, 6]))))
    lines = content.keyword_lines
    page.blocks[0][1:1] = [lines[i % len(lines)].format(k=k) for i, k in enumerate(words)]
    page.keep("keywords", words, k=word_list(p, words))


def frequency(p: Pieces, page: Page) -> None:
    """Require a word at least n times."""
    word, n = any_word(p), p.choice([1, 2, 2, 2, 3, 3, 4, 5, 6, 7, 8, 10])
    page.blocks[-1] += [line.format(k=word) for line in content.again_lines[: n + 1]]
    page.keep("frequency", (word, n), w=quoted(p, word), n=n)


def rarely(p: Pieces, page: Page) -> None:
    """Require a word fewer than n times: once if it was asked for, else not at all."""
    word, n = p.word(), p.between(2, 6)
    if p.chance(0.6):
        page.blocks[-1].append(content.keyword_lines[0].format(k=word))
    page.keep("rarely", (word, n), w=quoted(p, word), n=n)


def forbidden(p: Pieces, page: Page) -> None:
    """Forbid one to five words, half of the time words that the answer would have used."""
    used = re.findall(r"[a-z]{4,}", " ".join(" ".join(b) for b in page.blocks).lower())
    count = p.choice([1, 2, 2, 3, 3, 4, 5])
    words = [p.choice(used) if used and p.chance(0.5) else p.word() for _ in range(count)]
    words = list(dict.fromkeys(words))
    _leave_out(page, "|".join(rf"\b{re.escape(w)}\b" for w in words), re.I)
    page.keep("forbidden", words, k=word_list(p, words))


def _leave_out(page: Page, pattern: str, flags: int = 0) -> None:
    """Drop the sentences with a pattern. Every block keeps a sentence."""
    for block in page.blocks:
        kept = [s for s in block if not re.search(pattern, s, flags)]
        block[:] = kept or ["All right."]


def letter(p: Pieces, page: Page) -> None:
    """Require a letter at least n times. Missing ones come from words that have it."""
    sign = p.choice("abcdefghijklmnopqrstuvwxyz")
    n = p.choice([1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 30])
    has = sorted(w for w in p.sources.common if sign in w)
    has = sorted(has, key=lambda w: (-w.count(sign), w))[:24] or [sign * 4]
    missing = n + 2 - letter_count(page.text(), sign)
    if missing > 0:
        words: list[str] = []
        while sum(w.count(sign) for w in words) < missing:
            words.append(has[len(words) % len(has)])
        page.blocks[-1].append(f"Words with {sign} are " + " and ".join(words) + ".")
    page.keep("letter", (sign, n), l=quoted(p, p.choice([sign, sign.upper()])), n=n)


def few_letters(p: Pieces, page: Page) -> None:
    """Require a letter fewer than n times. Sentences are dropped until it is so."""
    sign, n = p.choice("abcdefghijklmnopqrstuvwxyz"), p.between(2, 12)
    kept: list[str] = []
    for sentence in page.blocks[0]:
        if letter_count(" ".join([*kept, sentence]), sign) < n:
            kept.append(sentence)
    page.blocks = [kept or ["All right." if sign not in "alright" else "Hm."]]
    page.keep("fewletter", (sign, n), l=quoted(p, sign), n=n)


def placeholders(p: Pieces, page: Page) -> None:
    """Require at least n blanks in square brackets."""
    n = p.choice([1, 1, 2, 2, 3, 3, 3, 4, 5, 6, 7, 8, 10, 12])
    page.blocks[-1] += blank_lines(content.blanks[:n])
    page.keep("placeholders", n, n=n)


def highlight(p: Pieces, page: Page) -> None:
    """Require at least n parts between asterisks: the first words of the first n sentences."""
    n = p.choice([1, 2, 2, 3, 3, 3, 4, 5, 6, 8, 10, 15])
    if sum(map(len, page.blocks)) < n and page.form == "plain":
        page.blocks = [long_essay(p, page.topic, n + 1)]
    left = n
    for block in page.blocks:
        for i, sentence in enumerate(block[:left]):
            words = sentence.split(" ")
            end = min(MARKED_WORDS, len(words))
            block[i] = "*" + " ".join(words[:end]) + "*" + " ".join(["", *words[end:]])
            left -= 1
    page.keep("highlight", n, n=n)


def capital_words(p: Pieces, page: Page) -> None:
    """Require at least n words in capitals: whole sentences from the first on."""
    n, done = p.choice([1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20]), 0
    for block in page.blocks:
        for i, sentence in enumerate(block):
            if done < n + 1:
                block[i] = sentence.upper()
                done += count_capitals(block[i])
    page.keep("capwords", n, n=n)


def few_capital_words(p: Pieces, page: Page) -> None:
    """Require fewer than n words in capitals: only "I" and "A", in few sentences."""
    n = p.between(2, 10)
    if p.chance(0.4):
        words = page.blocks[0][0].split(" ")
        words[1:2] = [w.upper() for w in words[1:2]]
        page.blocks[0][0] = " ".join(words)
    _leave_out(page, r"\b[IA]\b")
    page.keep("fewcaps", n, n=n)


# with how often each is drawn
CONTENT: dict[Callable[[Pieces, Page], None], float] = {
    keywords: 8.0,
    frequency: 5.0,
    rarely: 1.5,
    forbidden: 6.0,
    letter: 4.0,
    few_letters: 5.0,
    placeholders: 4.0,
    highlight: 6.0,
    capital_words: 2.5,
    few_capital_words: 1.5,
}
