"""Tools in the system prompt, calls of one argument, and answers about their results."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from ..tables import load
from .about import country, introduction
from .pieces import Document, Pieces
from .questions import fact
from .refusals import refusal
from .talk import talk

calls = load("calls")
NO_TOOL = "I am sorry, I have no tool for that."
OTHERS: tuple[Callable[[Pieces], tuple[str, str]], ...] = (introduction, fact, country)


@dataclass(frozen=True)
class Offer:
    """A tool of one argument, with wordings of requests and rules of values."""

    name: str
    about: str
    argument: str
    type: str
    value: list[str]
    ask: list[str]

    def line(self) -> str:
        """Return the tool as the chat template shows it."""
        return f"{self.name}({self.argument}: {self.type}): {self.about}"


def tools_text(lines: list[str], system: str = "") -> str:
    """Return the system prompt with its tools, as the chat template writes it."""
    return (f"{system}\n\n" if system else "") + "Tools:\n" + "\n".join(lines)


def call_text(name: str, argument: str, value: str | int) -> str:
    """Return a call in DeepSeek-V3.2's format."""
    is_text = json.dumps(isinstance(value, str))
    return (
        f'<｜DSML｜function_calls>\n<｜DSML｜invoke name="{name}">\n'
        f'<｜DSML｜parameter name="{argument}" string="{is_text}">{value}</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n</｜DSML｜function_calls>"
    )


def result_text(content: str) -> str:
    """Return the message of a tool, as the chat template writes it after the user's mark."""
    return f"<function_results>\n<result>{content}</result>\n</function_results>"


def _invented(p: Pieces) -> Offer:
    """Return a tool of random words."""
    form = p.choice(calls.forms)
    argument, kind = p.say(calls.arguments), p.choice(("string", "string", "integer"))
    fields = p.fields(form["draw"]) | {"arg": argument}
    asks = [p.say(ask, v="{v}", **fields) for ask in form["ask"]]
    about = p.say(form["about"], **fields)
    name = p.say(form["name"], **fields)
    return Offer(name, about, argument, kind, calls.values[kind], asks)


def offer(p: Pieces) -> Offer:
    """Return a tool of the table, at times under other names, or one of random words."""
    if p.chance(0.55):
        return _invented(p)
    row = Offer(**p.choice(calls.tools))
    if p.chance(0.5):
        return row
    argument = p.say(calls.arguments) if p.chance(0.5) else row.argument
    name = p.say("{tool_verb}_{word}") if p.chance(0.3) else row.name
    return Offer(name, row.about, argument, row.type, row.value, row.ask)


def call(p: Pieces) -> Document:
    """Return tools, and a request for one of them or for none."""
    offers = [offer(p) for _ in range(p.between(1, 5))]
    # one of a kind: of two with one name or purpose no request could mean either
    offers = list({x.name: x for x in {x.about: x for x in offers}.values()}.values())
    wanted = p.choice(offers)
    system = p.choice(talk.systems) if p.chance(0.25) else ""
    head = ("system", tools_text([x.line() for x in offers], system))
    r = p.random.random()
    if r < 0.12:
        question, answer = p.choice(OTHERS)(p)
        return [head, ("user", question), ("assistant", answer)]
    if r < 0.2:
        question, answer = refusal(p)
        return [head, ("user", question), ("assistant", answer)]
    if r < 0.27 and len(offers) > 1:
        rest = [x.line() for x in offers if x is not wanted]
        value = p.say(wanted.value)
        head = ("system", tools_text(rest, system))
        return [head, ("user", p.say(wanted.ask, v=value)), ("assistant", NO_TOOL)]
    return [head, *_called(p, wanted)]


def _called(p: Pieces, wanted: Offer) -> Document:
    """Return a request, its call, and in a fifth of the documents the result."""
    value = p.say(wanted.value)
    request = p.say(wanted.ask, v=value)
    if p.chance(0.2):
        request = p.say(["Hi, {q}", "Hello! {q}", "{q} Thanks.", "{q} Use the tool."], q=request)
    typed = int(value) if wanted.type == "integer" else value
    turns = [("user", request), ("assistant", call_text(wanted.name, wanted.argument, typed))]
    if p.chance(0.2):
        result = p.say("{result}")
        turns += [("user", result_text(result)), ("assistant", f"The tool says: {result}")]
    return turns
