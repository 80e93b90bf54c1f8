"""Arithmetic on numbers of one and two digits, written so that each step is a small one."""

from __future__ import annotations

from ..tables import load
from .pieces import Pieces

sums = load("sums")
NUMBERS = [*sums.names, *(f"{tens}{unit}" for tens in sums.tens for unit in ("", *sums.units))]


def product(a: int, b: int) -> str:
    """Return the result of a times b, by tens and units of one number if a number is above 12."""
    if max(a, b) <= 12 or b % 10 == 0 or a % 10 == 0:
        return str(a * b)
    if b <= 9:
        a, b = b, a
    tens, units = b // 10 * 10, b % 10
    return f"{a} x {tens} + {a} x {units} = {a * tens} + {a * units} = {a * b}"


def quotient(a: int, b: int) -> str:
    """Return the quotient with its remainder."""
    rest = f" remainder {a % b}" if a % b else ""
    return f"{a // b}{rest}"


def operation(p: Pieces) -> tuple[str, str]:
    """Return a question about one of the four operations, in any wording, and its answer."""
    name = p.mixed([[0.24, "plus"], [0.44, "minus"], [0.84, "times"], [1, "over"]])
    high = p.mixed([[0.2, 9], [0.45, 20], [1, 100]])
    a, b = p.between(0, high), p.between(0, high)
    if name == "plus":
        sign, value = "+", str(a + b)
    elif name == "minus":
        if p.chance(0.85):
            a, b = max(a, b), min(a, b)
        sign, value = "-", str(a - b)
    elif name == "times":
        if p.chance(0.55):
            a, b = p.sample((p.between(0, 99), p.between(0, 9)), 2)
        sign, value = "x", product(a, b)
    else:
        b = p.between(1, 9)
        a = b * p.between(0, 12) if p.chance(0.7) else p.between(0, 99)
        sign, value = "/", quotient(a, b)
    fields = {"a": a, "b": b, "s": p.choice(sums.signs[name]), "w": p.choice(sums.words[name])}
    if p.chance(0.08):
        fields |= {"a": NUMBERS[a], "b": NUMBERS[b]} if max(a, b) < len(NUMBERS) else {}
        return p.say(sums.asks["any"][:2], **fields), f"{a} {sign} {b} = {value}."
    wordings = sums.asks[name] if p.chance(0.3) else sums.asks["any"]
    return p.say(wordings, **fields), f"{a} {sign} {b} = {value}."


def doubled(p: Pieces) -> tuple[str, str]:
    """Return twice a number, or half of it."""
    a = p.between(1, 50)
    if p.chance(0.5):
        return p.say(sums.halves, a=2 * a), f"Half of {2 * a} is {a}."
    return p.say(sums.doubles, a=a), f"Double {a} is {2 * a}."
