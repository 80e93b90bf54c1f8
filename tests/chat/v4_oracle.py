"""Compares DeepSeek-V4's encoding with the one that was released in Python, byte for byte.

The released file stays outside of this repository. The wheel of vLLM has it, with additions to the
file of the model's folder: it reads lists of text parts, and opens an answer after a system
message.

    pip download --no-deps --dest /tmp vllm==0.33.0
    unzip -d /tmp /tmp/vllm-0.33.0-*.whl vllm/tokenizers/deepseek_v4_encoding.py
    python -m tests.chat.v4_oracle /tmp/vllm/tokenizers/deepseek_v4_encoding.py --conversations 4000

With `--write-goldens` 200 conversations and the prompts that the file makes of them are written to
`tests/data/deepseek_v4_prompts.jsonl`. Those prompts have placeholders instead of the file's texts.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from fd_dsa.chat.deepseek_encoding import V4_FILE, DeepseekV4Encoding, V4Words, read_v4_words

GOLDENS = Path(__file__).parents[1] / "data" / "deepseek_v4_prompts.jsonl"
NUM_GOLDENS = 200
PLACEHOLDERS = V4Words(
    tools="TOOLS\n{tool_schemas}\nEND\n",
    response_format="FORM {schema}",
    efforts={"low": "", "high": "EFFORT high\n\n", "max": "EFFORT max\n\n"},
)
_TEXTS = (
    *(
        "Hi",
        "",
        "天气",
        "a\nb\n",
        " ",
        "🙂 {x} {{y}}",
        "{tool_schemas} {schema}",
        '"q" \\n',
    ),
    *("<think>", "</think>", "<｜User｜>", "<｜DSML｜tool_calls>", "<tool_result>", "{% raw %}"),
)
_VALUES = (0, -1.5, 1e30, True, None, [], {"k": ["v", 1]}, [1, "é"])
_TASKS = ("action", "query", "authority", "domain", "title", "read_url")


class _Conversations:
    """Random conversations, with every feature that the encoding knows."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def make(self) -> dict[str, Any]:
        """A conversation and the arguments of its prompt, as JSON."""
        messages: list[dict[str, Any]] = []
        if self._happens(0.6):
            messages.append(self._system())
        for _ in range(self._random.randint(not messages, 6)):
            messages += self._some()
        made = {
            "messages": messages,
            "thinking": self._happens(0.6),
            "drop_thinking": self._happens(0.7),
            "reasoning_effort": self._random.choice((None, "low", "high", "max")),
        }
        return {**made, "tools": self._tools()} if self._happens(0.4) else made

    def _some(self) -> list[dict[str, Any]]:
        """One message, or an answer that calls tools with the results."""
        kinds = ("user", "answer", "calls", "developer", "system", "latest_reminder", "tool")
        kind = self._random.choices(kinds, (40, 25, 20, 5, 4, 4, 2))[0]
        if kind == "answer":
            return [self._answer()]
        if kind == "calls":
            calls = [self._call(index) for index in range(self._random.randint(1, 3))]
            results = [self._result(call.get("id")) for call in calls if self._happens(0.9)]
            self._random.shuffle(results)
            return [{**self._answer(), "tool_calls": calls}, *results]
        if kind == "system":
            return [self._system()]
        if kind == "tool":
            return [self._result("unknown")]
        message = {"role": kind, "content": self._text() or "x"}
        if kind == "user" and self._happens(0.2):
            texts = [self._text() for _ in range(self._random.randint(1, 3))]
            message["content"] = [{"type": "text", "text": text} for text in texts]
        if kind == "user" and self._happens(0.1):
            message["task"] = self._random.choice(_TASKS)
        if kind == "developer":
            self._extend(message)
        return [message]

    def _system(self) -> dict[str, Any]:
        message = {"role": "system", "content": self._text()}
        self._extend(message)
        return message

    def _extend(self, message: dict[str, Any]) -> None:
        if self._happens(0.15):
            message["tools"] = self._tools()
        if self._happens(0.15):
            message["response_format"] = {"type": "object", "description": self._text()}

    def _answer(self) -> dict[str, Any]:
        message = {"role": "assistant", "content": self._text()}
        if self._happens(0.6):
            message["reasoning_content"] = self._text()
        if self._happens(0.05):
            message["task"] = "title"
        if self._happens(0.05):
            message["wo_eos"] = True
        return message

    def _call(self, index: int) -> dict[str, Any]:
        names = self._random.sample(("city", "日", "a b", "n"), self._random.randint(0, 3))
        arguments = {
            name: self._text() if self._happens(0.5) else self._random.choice(_VALUES)
            for name in names
        }
        function = {
            "name": self._random.choice(("get_weather", "f")),
            "arguments": json.dumps(arguments, ensure_ascii=self._happens(0.5)),
        }
        call: dict[str, Any] = {"type": "function", "function": function}
        return {"id": f"call_{index}", **call} if self._happens(0.9) else call

    def _result(self, call: str | None) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "tool", "content": self._text()}
        if self._happens(0.1):
            message["content"] = [{"type": "text", "text": self._text()} for _ in range(2)]
        return message if call is None else {**message, "tool_call_id": call}

    def _tools(self) -> list[dict[str, Any]]:
        tools = [
            {"name": "get_weather", "parameters": {"properties": {"city": {"type": "string"}}}},
            {"name": "f", "description": self._text(), "parameters": {}},
        ]
        chosen = tools[: self._random.randint(1, 2)]
        return [{"type": "function", "function": tool} for tool in chosen]

    def _text(self) -> str:
        return " ".join(self._random.choices(_TEXTS, k=self._random.randint(1, 3)))

    def _happens(self, share: float) -> bool:
        return self._random.random() < share


def our_prompt(encoding: DeepseekV4Encoding, conversation: dict[str, Any]) -> str:
    """Our prompt; it opens an answer unless the conversation ends with one."""
    last = conversation["messages"][-1]
    begins = last["role"] != "assistant" or "task" in last
    variables = {name: value for name, value in conversation.items() if name != "messages"}
    return encoding.render(conversation["messages"], begins, **variables)


def _released_prompt(released: ModuleType, conversation: dict[str, Any]) -> str:
    """The prompt of the released file, to which a server gives the tools in a system message."""
    messages = [{**m, "reasoning": m.get("reasoning_content")} for m in conversation["messages"]]
    if "tools" in conversation:
        if all(message["role"] != "system" for message in messages):
            messages.insert(0, {"role": "system"})
        system = next(message for message in messages if message["role"] == "system")
        system["tools"] = conversation["tools"]
    prompt: str = released.encode_messages(
        messages,
        thinking_mode="thinking" if conversation["thinking"] else "chat",
        drop_thinking=conversation["drop_thinking"],
        reasoning_effort=conversation["reasoning_effort"],
    )
    return prompt


def _load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("released_encoding", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _num_different(file: Path, num_conversations: int, seed: int) -> int:
    """Compare prompts, print the first that differs; returns how many differ."""
    released, num_different = _load(file), 0
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / V4_FILE
        place.parent.mkdir()
        place.write_bytes(file.read_bytes())
        encoding = DeepseekV4Encoding(read_v4_words(Path(folder)))
    conversations = _Conversations(seed)
    for _ in range(num_conversations):
        conversation = conversations.make()
        expected = _released_prompt(released, conversation)
        found = our_prompt(encoding, conversation)
        if found != expected and not num_different:
            print(f"{json.dumps(conversation)}\nreleased: {expected!r}\nours:     {found!r}")
        num_different += found != expected
    return num_different


def _write_goldens(file: Path) -> None:
    """Write conversations and the prompts of the released file, with placeholders as texts."""
    released, conversations = _load(file), _Conversations(0)
    for name, value in {
        "TOOLS_TEMPLATE": PLACEHOLDERS.tools,
        "response_format_template": PLACEHOLDERS.response_format,
        "REASONING_EFFORT_PROMPTS": PLACEHOLDERS.efforts,
    }.items():
        setattr(released, name, value)
    with GOLDENS.open("w", encoding="utf-8") as lines:
        for _ in range(NUM_GOLDENS):
            conversation = conversations.make()
            prompt = _released_prompt(released, conversation)
            line = json.dumps({**conversation, "prompt": prompt}, ensure_ascii=False)
            lines.write(f"{line}\n")


def main() -> None:
    """Run the comparison, and write goldens if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path, help="the released encoding; it is run")
    parser.add_argument("--conversations", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write-goldens", action="store_true")
    args = parser.parse_args()
    num_different = _num_different(args.file, args.conversations, args.seed)
    print(f"{args.conversations} conversations, {num_different} prompts differ")
    if args.write_goldens and not num_different:
        _write_goldens(args.file)
        print(f"wrote {NUM_GOLDENS} to {GOLDENS}")
    raise SystemExit(bool(num_different))


if __name__ == "__main__":
    main()
