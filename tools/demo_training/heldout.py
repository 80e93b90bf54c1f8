"""The held-out prompts of heldout.json, and the judgement of a served model's answers.

The prompts were written before the generators that train the model, and `is_held_out` keeps them
out of every document. The groups of the file have these fields:
  category, language   "en" or "zh"
  check                "pattern", "number" or "refusal"
  least_words, lines   bounds of a text, 0 or missing without a bound
  items                [prompt, expected]

An answer passes "pattern" if it matches the item's regular expression and is no refusal. It passes
"number" if its last number is the item's. It passes "refusal" if it is one refusing sentence of the
group's language. `retrieval` has items in the form of the evaluation file (evalset.prompt_of), with
the number to find. `calls` has [prompt, tool, value], with alternatives of a value after "|".
`tools` has the offered tools: description, argument, type.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from .evalset import prompt_of

# words of a refusal that name the kind of request, by the end of the category's name
REASONS = {"code": "code|代码", "summary": "summari|总结", "translation": "translat|翻译"}
STARTS = {"en": "I am sorry, ", "zh": "对不起，"}
ENDS = {"en": r"[.!?](\s|$)", "zh": "[。！？]"}

_CONCURRENCY = 16
FILE = Path(__file__).resolve().parent / "heldout.json"


def plain(text: str) -> str:
    """Return the letters and digits of a text, in lower case."""
    return re.sub(r"[\W_]+", "", text.lower())


@cache
def read() -> dict[str, Any]:
    """Read the file."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def prompts() -> list[str]:
    """Return all prompts but those of retrieval, whose texts are held out by `sources.HELD_OUT`."""
    groups = (prompt for group in read()["groups"] for prompt, *_ in group["items"])
    return [*groups, *(prompt for prompt, *_ in read()["calls"])]


@cache
def _plain_prompts() -> frozenset[str]:
    return frozenset(map(plain, prompts()))


def is_held_out(text: str) -> bool:
    """Return True for a prompt of the file, whatever its case and punctuation."""
    return plain(text) in _plain_prompts()


def refuses(answer: str, language: str, category: str) -> bool:
    """Return True for a refusal in one sentence of the language, of the right kind."""
    kind = category.rpartition(" ")[2]
    others = [words for name, words in REASONS.items() if name != kind]
    return (
        answer.startswith(STARTS[language])
        and len(re.findall(ENDS[language], answer)) == 1
        and not re.search("|".join(others), answer)
    )


def judge(group: dict[str, Any], expected: str, answer: str) -> bool:
    """Return True if an answer that ended by itself is right."""
    answer = answer.strip()
    is_chinese = re.search("[\u4e00-\u9fff]", answer) is not None
    if group["check"] == "refusal":
        return refuses(answer, group["language"], group["category"])
    if group["check"] == "number":
        return re.findall(r"-?(?<!\d)\d+", answer.replace(" - ", " "))[-1:] == [expected]
    if is_chinese != (group["language"] == "zh") or answer.startswith(tuple(STARTS.values())):
        return False
    lines = group.get("lines", 0)
    return (
        re.search(expected, answer, re.I) is not None
        and len(answer.split()) >= group.get("least_words", 0)
        and (not lines or len(answer.splitlines()) == lines)
    )


def offered(tool: str) -> list[dict[str, Any]]:
    """Return a tool of the file between two others, as a request has them."""
    tools = read()["tools"]
    names = list(tools)
    at = names.index(tool)
    chosen = sorted({tool, names[(at + 7) % len(names)], names[(at + 12) % len(names)]})
    return [
        {
            "type": "function",
            "function": {
                "name": name,
                "description": tools[name][0],
                "parameters": {
                    "type": "object",
                    "properties": {tools[name][1]: {"type": tools[name][2]}},
                    "required": [tools[name][1]],
                },
            },
        }
        for name in chosen
    ]


def judge_call(tool: str, value: str | int, message: dict[str, Any]) -> bool:
    """Return True if a message is the requested call without any text."""
    calls = message.get("tool_calls") or []
    if message.get("content") or len(calls) != 1:
        return False
    function = calls[0]["function"]
    values = value.split("|") if isinstance(value, str) else [value]
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return False
    argument = read()["tools"][tool][1]
    return function["name"] == tool and any(arguments == {argument: x} for x in values)


@dataclass(frozen=True)
class Case:
    """A request of the file and how its answer is judged."""

    category: str
    language: str
    body: dict[str, Any]
    is_right: Callable[[dict[str, Any]], bool]


def cases(evaluation: Path) -> list[Case]:
    """Return all prompts. Those of retrieval take their texts from the evaluation file."""
    found = []
    for group in read()["groups"]:
        for prompt, *expected in group["items"]:
            right = partial(_is_right, group, expected[0] if expected else "")
            found.append(Case(group["category"], group["language"], body_of(prompt), right))
    records = map(json.loads, evaluation.read_text(encoding="utf-8").splitlines())
    haystacks = {r["id"]: r["text"] for r in records if r["kind"] == "haystack"}
    for item in read()["retrieval"]:
        group = {"check": "number", "language": "en", "category": "retrieval"}
        right = partial(_is_right, group, item["answer"])
        found.append(Case("retrieval", "en", body_of(prompt_of(item, haystacks)), right))
    for prompt, tool, value in read()["calls"]:
        body = body_of(prompt) | {"tools": offered(tool)}
        found.append(Case("tool call", "", body, partial(judge_call, tool, value)))
    return found


def body_of(prompt: str) -> dict[str, Any]:
    """Return the body of a request that asks a prompt greedily."""
    return {"messages": [{"role": "user", "content": prompt}], "temperature": 0}


def _is_right(group: dict[str, Any], expected: str, message: dict[str, Any]) -> bool:
    return judge(group, expected, message.get("content") or "")


def ask_all(url: str, evaluation: Path) -> dict[str, Any]:
    """Ask a server all prompts.

    Args:
        url: of the server's API, with "/v1" at its end.

    Returns:
        categories, languages: counts [right, all] by name; `endless`: answers that reached the
        server's limit of tokens, which are wrong; `answers`: of every prompt.
    """
    todo = cases(evaluation)
    choices = ask(url, [case.body for case in todo])
    result: dict[str, Any] = {"categories": {}, "languages": {}, "endless": 0, "answers": []}
    for case, choice in zip(todo, choices, strict=True):
        is_endless = choice["finish_reason"] == "length"
        is_right = not is_endless and case.is_right(choice["message"])
        result["endless"] += is_endless
        names = [("categories", f"{case.category} {case.language}".strip())]
        names += [("languages", case.language)] * bool(case.language)
        for kind, name in names:
            right, total = result[kind].get(name, (0, 0))
            result[kind][name] = (right + is_right, total + 1)
        text = choice["message"].get("content") or ""
        calls = [call["function"] for call in choice["message"].get("tool_calls") or []]
        prompt = case.body["messages"][0]["content"]
        row = {"prompt": prompt[-200:], "answer": text[:400], "right": is_right}
        result["answers"].append(row | ({"calls": calls} if calls else {}))
    return result


def ask(url: str, bodies: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the first choice of a chat completion for each body, an empty one if it is refused.

    Args:
        url: of the server's API, with "/v1" at its end.
    """

    def choice(body: dict[str, Any]) -> dict[str, Any]:
        request = Request(
            f"{url}/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urlopen(request, timeout=3600) as response:
                return json.load(response)["choices"][0]
        except HTTPError as error:
            if error.code != 400:
                raise
            return {"finish_reason": "refused", "message": {"content": ""}}

    with ThreadPoolExecutor(_CONCURRENCY) as pool:
        return list(pool.map(choice, bodies))


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return a Markdown table of counts, one column for each of the named results."""
    columns = [_column(result) for result in results.values()]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [["held-out prompts", *results], ["---"] * (1 + len(results))]
    rows += [[name, *(column.get(name, "-") for column in columns)] for name in names]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _column(result: dict[str, Any]) -> dict[str, str]:
    totals = {"en": "English, all", "zh": "Chinese, all"}
    counts = result["categories"] | {totals[k]: v for k, v in result["languages"].items()}
    found = {name: f"{right}/{total}" for name, (right, total) in counts.items()}
    return found | {"answers without an end": str(result["endless"])}
