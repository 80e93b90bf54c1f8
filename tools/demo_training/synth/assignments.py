"""Long-winded requests with one to three rules that stand anywhere in them."""

from __future__ import annotations

import re

from .checks import CHOICES, check
from .content_rules import CONTENT
from .instructions import Instruction
from .languages import CANNED
from .long_essay import long_essay
from .page import Page, cut
from .pieces import Pieces, upper_first
from .rule_wordings import EMPHASIS, IMPERATIVES, SENTENCES, STARTS, SWAPS
from .tables import items
from .word_rules import CASE_CHANGES
from .wordy import Wish, wish

# those from 700 on only fit into long rows
WORD_COUNTS = (20, 30, 40, 50, 60, 80, 100, 120, 150, 150, 200, 200, 250, 300, 300, 350, 400)
WORD_COUNTS += (450, 500, 600, 600, 700, 800, 900)
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
NUMBERS = items("zero,one,two,three,four,five,six,seven,eight,nine,ten,eleven,twelve")
MARKS = ("Section", "SECTION", "Part", "PARAGRAPH", "Chapter", "Day", "PART", "Paragraph", "Stage")
PS_LINES = (
    "Remember to smile today.",
    "Write to me soon.",
    "Do not forget to bring some bread.",
    "I will see you at the library.",
)
END_PHRASES = (
    "Can I do anything else for you?",
    "That is all you need to know.",
    "Have a nice day.",
    "I hope this helps.",
    "The end.",
    "See you soon.",
    "Any other questions?",
    "Now it is your turn!",
    "What do you think?",
    "Let me know how it goes.",
)
FORMS = ("bullets", "paragraphs", "firstword", "sections", "two", "json")
FORM_WEIGHTS = (6, 6, 3.5, 4, 5, 6)
LENGTHS = ("manysent", "fewsent", "atleast", "fewwords")
LENGTH_WEIGHTS = (3, 3, 5, 2.5)
WHOLE = ("lower", "upper", "nocomma", "quote")
WHOLE_WEIGHTS = (4, 3, 6, 4)
# what cannot stand together: the first would break the second
CLASHES = (
    {"lower", "capwords"},
    {"upper", "fewcaps"},
    {"highlight", "capwords"},
    {"quote", "json"},
    {"fewletter", "letter"},
)
ALONE = {"fewletter"}  # next to nothing else is possible
OF_JSON = {"keywords", "lower", "upper", "json"}
NO_FRAME = {"json", "firstword"}  # a title or a postscript would break them


def number(p: Pieces, n: int) -> str:
    """A count in digits, at times as a word."""
    return NUMBERS[n] if n < len(NUMBERS) and p.chance(0.2) else str(n)


def _sentences(p: Pieces, page_wish: Wish, length: str) -> tuple[list[str], int]:
    """Sentences that keep a rule on length ("" = none), and its number."""
    if length == "manysent":
        n = p.choice([2, 3, 4, 5, 5, 6, 8, 10, 12, 15, 17, 20, 25, 30, 40, 50])
        return page_wish.sentences(p, n + p.between(1, 2)), n
    if length == "fewsent":
        n = p.choice([2, 3, 4, 5, 6, 8, 10, 15, 20, 30])
        return page_wish.sentences(p, p.between(1, min(n - 1, 6))), n
    if length == "atleast":
        n = p.choice(WORD_COUNTS)
        return _until(p, page_wish, round(n * 1.12) + 5), n
    if length == "fewwords":
        n = p.choice([10, 15, 20, 25, 30, 40, 50, 60, 80, 100, 150, 200, 300, 500, 600])
        kept: list[str] = []
        for line in page_wish.sentences(p, p.between(1, 6)):
            if sum(len(s.split()) for s in (*kept, line)) < n * 0.9:
                kept.append(line)
        return kept or ["All right."], n
    return page_wish.sentences(p, p.choice([1, 2, 3, 3, 4, 4, 5, 6, 8])), 0


def _until(p: Pieces, page_wish: Wish, words: int) -> list[str]:
    """Sentences of at least this many words together."""
    count = max(2, words // 11)
    while True:
        found = page_wish.sentences(p, count)
        if sum(len(s.split()) for s in found) >= words or count > 84:
            return found
        count += max(1, count // 10)


def _form(p: Pieces, page: Page, form: str, sentences: list[str], own_length: bool) -> None:
    """Cuts the sentences into the blocks of a form and says its rule."""
    n = p.choice([2, 2, 3, 3, 4, 5, 6])
    if form == "bullets":
        n = p.choice([1, 2, 3, 3, 4, 5, 5, 6, 7, 8, 10])
    n = 2 if form == "two" else n
    if len(sentences) < n or not own_length:
        per = 1 if form in ("bullets", "json") else p.choice([1, 1, 2, 2, 3])
        wanted = max(n * per, len(sentences) if own_length else 0)
        sentences = long_essay(p, page.topic, wanted) if wanted > 1 else sentences[:1]
    page.form, page.blocks = form, cut(sentences, n)
    if form == "two":
        page.blocks[1].insert(0, f"Here is another view of {page.topic.text}.")
        page.keep("two")
    elif form == "json":
        page.blocks = cut(sentences[:3], min(3, len(sentences)))
        page.keep("json")
    elif form == "firstword":
        i = p.between(1, n)
        word = p.choice(["First", "Now", "Still", "Today", "However", p.word(), p.word(), p.word()])
        word = word.capitalize() if p.chance(0.5) else word
        page.blocks[i - 1][0] = f"{word}, {page.blocks[i - 1][0]}"
        page.keep(form, (n, i, word), n=number(p, n), i=ORDINALS[i - 1], x=i, w=word)
    elif form == "sections":
        page.mark = p.choice(MARKS) if p.chance(0.85) else p.word().capitalize()
        page.keep(form, (page.mark, n), n=number(p, n), mark=page.mark)
    else:
        page.keep(form, n, n=number(p, n))


def _frame(p: Pieces, page: Page) -> None:
    """A title, a postscript or a last phrase."""
    r = p.random.random()
    if r < 0.4:
        page.title = upper_first(page.topic.text) if p.chance(0.8) else p.phrase().title()
        page.keep("title")
    elif r < 0.65:
        mark = p.choice(["P.S.", "P.P.S"])
        page.last = f"\n\n{mark} {p.choice(PS_LINES)}"
        page.keep("ps", mark, mark=mark)
    else:
        phrase = p.choice(END_PHRASES) if p.chance(0.4) else _end_phrase(p)
        page.last = " " + phrase
        page.keep("end", phrase, phrase=phrase)


def _end_phrase(p: Pieces) -> str:
    r = p.random.random()
    if r < 0.4:
        return upper_first(p.phrase()) + p.choice([".", "!", "?"])
    if r < 0.7:
        return f"{upper_first(p.word())} {p.word()} {p.word()}{p.choice(['.', '!', '?', ''])}"
    return p.choice(p.sources.sentences)[:90].strip()


def _kinds(p: Pieces) -> set[str]:
    """Which groups of rules a request has; one to three of them, single ones most often."""
    groups = ("form", "length", "content", "frame", "whole")
    count = p.choice([1, 1, 1, 2, 2, 3])
    found: set[str] = set()
    while len(found) < count:
        found.add(p.random.choices(groups, weights=(26, 16, 34, 14, 24))[0])
    return found


def _draw(p: Pieces) -> tuple[Wish, Page]:
    """A wish and a page that is meant to keep its rules."""
    asked, groups = wish(p), _kinds(p)
    length = p.random.choices(LENGTHS, LENGTH_WEIGHTS)[0] if "length" in groups else ""
    sentences, n = _sentences(p, asked, length)
    page = Page(asked.topic, [list(sentences)])
    if length:
        page.keep(length, n, n=number(p, n), m=n - 1)
    if "form" in groups:
        form = p.random.choices(FORMS, FORM_WEIGHTS)[0]
        _form(p, page, form, sentences, bool(length))
    if "content" in groups:
        weights = [w for w, _ in CONTENT]
        p.random.choices([f for _, f in CONTENT], weights)[0](p, page)
        if len(groups) == 1 and p.chance(0.3):
            p.random.choices([f for _, f in CONTENT], weights)[0](p, page)
    if "frame" in groups and page.form not in NO_FRAME:
        _frame(p, page)
    if "whole" in groups:
        kind = p.random.choices(WHOLE, WHOLE_WEIGHTS)[0]
        page.letters.append(CASE_CHANGES[kind])
        page.keep(kind)
    return asked, page


def _possible(page: Page, answer: str) -> bool:
    """Whether the rules fit together and the answer keeps them all."""
    kinds = [kind for kind, _ in page.checks]
    together = set(kinds)
    if not kinds or len(together) < len(kinds):
        return False
    if any(clash <= together for clash in CLASHES) or (together & ALONE and len(kinds) > 1):
        return False
    if "json" in together and not together <= OF_JSON:
        return False
    return all(check(kind, arg, answer) for kind, arg in page.checks)


def vary(p: Pieces, wording: str) -> str:
    """A wording of a rule with some of its words exchanged for words of one meaning."""
    for pattern, words in SWAPS:
        if p.chance(0.4):
            wording = re.sub(pattern, p.choice(words), wording, count=1)
    if p.chance(0.08):
        wording = EMPHASIS.sub(lambda m: m[0].upper(), wording, count=1)
    return wording


def say(p: Pieces, kind: str, fields: dict[str, str]) -> str:
    """One wording of a rule as a sentence."""
    if p.chance(0.5):
        return vary(p, p.choice(SENTENCES[kind])).format(**fields)
    text = vary(p, p.choice(IMPERATIVES[kind])).format(**fields)
    said = upper_first(p.choice(STARTS).format(r=text))
    return said[:-1] if said.endswith(("..", "?.", "!.")) else said


def request_text(p: Pieces, request: str, rules: list[str]) -> str:
    """The request and its rules: after it, before it, around it, or as a list."""
    r = p.random.random()
    if r < 0.08:
        head = p.choice(["Rules:", "Follow these rules:", "Please note:", "Requirements:"])
        mark = p.choice(["- ", "* ", ""])
        lines = [(mark or f"{i + 1}. ") + x for i, x in enumerate(rules)]
        return f"{request}\n\n{head}\n" + "\n".join(lines)
    if r < 0.2:
        return " ".join(rules) + p.choice([" ", "\n", "\n\n"]) + request
    if r < 0.3 and len(rules) > 1:
        return " ".join([rules[0], request, *rules[1:]])
    if r < 0.4 and ". " in request:
        first, rest = request.split(". ", 1)
        return f"{first}. {' '.join(rules)} {rest}"
    return request + p.choice([" ", " ", " ", "\n", "\n\n"]) + " ".join(rules)


def assignment(p: Pieces) -> Instruction:
    """One wordy request with rules; the answer passes `check` for every one of them."""
    while True:
        asked, page = _draw(p)
        answer = page.text()
        if _possible(page, answer):
            break
    rules = [say(p, kind, fields) for kind, fields in page.said]
    p.random.shuffle(rules)
    return Instruction(request_text(p, asked.request, rules), answer, page.checks)


def repeat_wish(p: Pieces) -> Instruction:
    """A wordy request that is to be repeated word for word before the answer."""
    inner = wish(p)
    text, sentences = inner.request, inner.sentences(p, p.choice([1, 2, 3, 4]))
    if p.chance(0.25):
        text, sentences = p.choice(p.sources.instructions)
        text, sentences = text[:700], [sentences[:300]]
    elif p.chance(0.2):
        text, sentences = p.choice(p.sources.problems)
        sentences = ["The answer is " + sentences.split("#### ")[-1].strip() + "."]
    text = text.strip()
    request = p.choice(REPEAT_FORMS).format(q=text)
    return Instruction(request, f"{text}\n\n{' '.join(sentences)}", [("repeat", text)])


REPEAT_FORMS = (
    "{q}\n\nStart with the request above, repeated word for word, and answer it after that.",
    "{q}\n\nBefore you answer, repeat the request above without any change.",
    "{q} Repeat this request exactly as it is, and give your answer below it. Nothing should "
    "come before the repeated request.",
    "{q}\n\nCopy the whole request above without changing a word, and only then reply. This last "
    "sentence is not a part of what you should copy.",
    "{q}\nYour answer has two parts: 1. the request above, repeated word by word 2. what you want "
    "to say. Nothing may stand before the first part, and these instructions do not belong to it.",
    "Repeat the following request exactly as it is, and then answer it: {q}",
    "First say the request below again, word for word, and after that give your answer.\n\n{q}",
    "Say the request again before you reply to it, without a change. Do not repeat this "
    "sentence.\n\n{q}",
    "Start by repeating the text of my request. Then answer.\nRequest: {q}",
)


def language_wish(p: Pieces) -> Instruction:
    """A request to be answered in another language: one short text for each."""
    name, text = p.item(CANNED)
    inner = wish(p)
    rules = [say(p, "language", {"l": name})]
    return Instruction(request_text(p, inner.request, rules), text, [("equals", text)])


CHOICE_QUESTIONS = (
    "Is {t} a good topic for {w}?",
    "Do you think that {n} will like {t}?",
    "Will {n} go to {w} {d}?",
    "Can {t} be better than {w}?",
    "Should I tell {n} about {t}?",
    "Are you sure about {t} and {w}?",
    "I want to know if {t} is worth my time. Is it?",
    "{n} says that {t} is fun. Is {n} right?",
    "Have you ever seen {t} in a {w}?",
)
CHOICE_OPTIONS = (
    "Answer with one of these three sentences: '{n}', '{y}', '{m}'",
    "Choose one of: '{n}', '{y}', '{m}'",
    'Pick one out of ("{y}", "{m}", "{n}").',
    "There are three possible answers, which are '{m}', '{n}' and '{y}' Give one of them.",
    "Reply only with '{y}', with '{n}', or with '{m}'",
    "Only three phrases are allowed: '{y}', '{m}' and '{n}'",
)


def choice_wish(p: Pieces) -> Instruction:
    """A question for which three answers are allowed; with nothing known it is the third."""
    topic = p.topic()
    fields = {"t": topic.text, "w": p.word(), "n": p.name(), "d": p.choice(["soon", "today"])}
    question = p.choice(CHOICE_QUESTIONS).format(**fields)
    if p.chance(0.5):
        question = wish(p).request
    names = dict(zip("ynm", CHOICES, strict=True))
    options = p.choice(CHOICE_OPTIONS).format(**names)
    answer = CHOICES[2]
    return Instruction(f"{question} {options}", answer, [("choice", None), ("equals", answer)])


def open_wish(p: Pieces) -> Instruction:
    """A wordy request without a rule."""
    asked = wish(p)
    sentences = asked.sentences(p, p.between(2, 8))
    groups = cut(sentences, 2) if len(sentences) > 5 and p.chance(0.3) else [sentences]
    return Instruction(asked.request, "\n\n".join(" ".join(g) for g in groups), [])


def assigned(p: Pieces) -> Instruction:
    """Any wordy request."""
    r = p.random.random()
    if r < 0.70:
        return assignment(p)
    if r < 0.80:
        return repeat_wish(p)
    if r < 0.86:
        return language_wish(p)
    if r < 0.89:
        return choice_wish(p)
    return open_wish(p)
