"""A tool call: the model asks for a function, the program runs it, the model reads the result.

The answers are recorded from the demo model, which is too small to call the right tool every time:
its card in fd_dsa/demo_model has the share. A large model writes the same format, and a server
parses it into `tool_calls`.

.venv/bin/python examples/tools.py
"""

from __future__ import annotations

import json
from typing import Any

from fd_dsa.chat.parser import TOOL_FORMATS, AnswerFormat, OutputParser

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
MINUTES = {
    "type": "object",
    "properties": {"minutes": {"type": "integer"}},
    "required": ["minutes"],
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }
    for name, description, parameters in (
        ("get_weather", "Get the weather of a city", CITY),
        ("set_timer", "Set a timer", MINUTES),
    )
]
QUESTION = "What is the weather in Paris?"
# what LLM.chat(messages, SamplingParams(temperature=0), tools=TOOLS) returned for the two turns
RECORDED = (
    '<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">\n'
    '<｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜function_calls>",
    "The tool says: It is sunny, 21 degrees.",
)


def get_weather(city: str) -> str:
    """Answer for the program's own weather service."""
    return {"Paris": "It is sunny, 21 degrees."}.get(city, f"No weather of {city} is known.")


FUNCTIONS = {"get_weather": get_weather}


def conversation() -> list[dict[str, Any]]:
    """Return all messages of the exchange, in the form of the OpenAI API."""
    schemas = {"get_weather": CITY, "set_timer": MINUTES}
    answer = AnswerFormat(tool_format=TOOL_FORMATS["deepseek_v32"], schemas=schemas)
    messages: list[dict[str, Any]] = [{"role": "user", "content": QUESTION}]
    for text in RECORDED:
        message = OutputParser(answer).parse(text)
        asked = [{"name": call.name, "arguments": call.arguments} for call in message.tool_calls]
        calls = [{"id": x["name"], "type": "function", "function": x} for x in asked]
        messages.append({"role": "assistant", "content": message.content, "tool_calls": calls})
        for call in message.tool_calls:
            result = FUNCTIONS[call.name](**json.loads(call.arguments))
            messages.append({"role": "tool", "tool_call_id": call.name, "content": result})
    return messages


if __name__ == "__main__":
    for message in conversation():
        print(f"{message['role']}: {message['content']}")
        for call in message.get("tool_calls", ()):
            print("  calls", call["function"]["name"], call["function"]["arguments"])
