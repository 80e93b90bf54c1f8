"""A reader of the default prompts that makes no mistake, written apart from what makes them."""

from __future__ import annotations

import re


def read(prompt: str) -> str:
    """The right answer to a prompt."""
    body, question = prompt.rsplit("\n\n", 1)
    if question == "What is the pass key?":
        return "The pass key is " + ", ".join(re.findall(r"The pass key is (\d+)\.", body))
    if found := re.fullmatch(r"What is the special number for (\w+)\?", question):
        return ", ".join(re.findall(rf"The special number for {found[1]} is (\d+)\.", body))
    if found := re.fullmatch(r"Which variables have the value (\d+)\?", question):
        return "The variables are " + ", ".join(holders(body, found[1])) + "."
    raise ValueError(question)


def holders(body: str, value: str) -> list[str]:
    """Names of the variables with this value, by running the assignments that are there."""
    known: dict[str, str] = {}
    for name, source, number in re.findall(r"VAR (\w+) = (?:VAR (\w+)|(\d+))\.", body):
        known[name] = number or known.get(source, "")
    return [name for name, held in known.items() if held == value]
