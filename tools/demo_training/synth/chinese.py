"""Conversations in Chinese: greetings, the model, its field, small sums, capitals, refusals."""

from __future__ import annotations

from ..tables import load
from .pieces import Document, Pieces
from .sums import product, quotient

chinese = load("chinese")
SHARES = [kind["share"] for kind in chinese.refused]
KNOWN = {k: [x for x in chinese.known if x["kind"] == k] for k in ("greet", "me", "can", "about")}
KINDS = [
    [0.1, "greet"],
    [0.24, "me"],
    [0.31, "can"],
    [0.44, "about"],
    [0.55, "sum"],
    [0.66, "capital"],
    [1, "refused"],
]
ENDS = ("。", "！", "？")


def _known(p: Pieces, kind: str) -> tuple[str, str]:
    row = p.choice(KNOWN[kind])
    return p.say(row["ask"]), row["answer"]


def _capital(p: Pieces) -> tuple[str, str]:
    country, capital = p.item(load("countries").chinese)
    return p.say(chinese.capital, a=country), f"{country}的首都是{capital}。"


def _sum(p: Pieces) -> tuple[str, str]:
    """Return a question and answer about an operation on numbers below 100."""
    name = p.choice(("plus", "plus", "minus", "times", "over"))
    high = p.choice((9, 20, 99))
    a, b = p.between(0, high), p.between(0, high)
    if name == "plus":
        answer = f"{a} + {b} = {a + b}"
    elif name == "minus":
        a, b = max(a, b), min(a, b)
        answer = f"{a} - {b} = {a - b}"
    elif name == "times":
        b = p.between(1, 9)
        answer = f"{a} x {b} = {product(a, b)}"
    else:
        b = p.between(1, 9)
        a = b * p.between(1, 11)
        answer = f"{a} / {b} = {quotient(a, b)}"
    return p.say(chinese.arithmetic[name], a=a, b=b), answer + "。"


def _refused(p: Pieces) -> tuple[str, str]:
    kind = p.random.choices(chinese.refused, SHARES)[0]
    return p.say(kind["ask"]), kind["answer"]


def _decorated(p: Pieces, request: str, plainly: bool) -> str:
    """Return the request as typed: a polite word around it, an end mark or none."""
    if not plainly and len(request) < 40:
        if p.chance(0.15):
            request = p.choice(chinese.decorations["before"]) + request
        if p.chance(0.12) and not request.endswith(ENDS):
            request += p.choice(chinese.decorations["after"])
    if not request.endswith(ENDS) and p.chance(0.55):
        asks = "吗什怎哪谁几多何为"
        request += "？" if any(x in request for x in asks) else p.choice("。。！？")
    return request


def exchange_in_chinese(p: Pieces) -> Document:
    """Return a request and its answer."""
    kind = p.mixed(KINDS)
    makers = {"sum": _sum, "capital": _capital, "refused": _refused}
    request, answer = makers[kind](p) if kind in makers else _known(p, kind)
    plainly = kind == "refused" and p.chance(0.6)
    return [("user", _decorated(p, request, plainly)), ("assistant", answer)]


def chinese_chat(p: Pieces) -> Document:
    """Return one exchange, or two to four. A tenth has a system prompt."""
    count = p.between(2, 4) if p.chance(0.2) else 1
    turns = [turn for _ in range(count) for turn in exchange_in_chinese(p)]
    return [("system", p.choice(chinese.systems)), *turns] if p.chance(0.1) else turns
