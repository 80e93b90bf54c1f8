"""Answers in the formats of the models, as token texts, and what they mean.

Written by hand in the formats that the models were trained on, cut where their tokenizers cut:
markers are one token each, the rest comes in words.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fd_dsa.chat.events import Message, ToolCall

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "units": {"type": ["string", "null"]},
        "hours": {"type": "array", "items": {"type": "integer"}},
    },
    "required": ["city"],
}
SCHEMAS: dict[str, Any] = {"get_weather": WEATHER, "now": {"type": "object", "properties": {}}}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "d", "parameters": schema}}
    for name, schema in SCHEMAS.items()
]


@dataclass(frozen=True)
class Recorded:
    """One answer.

    Attributes:
        tool_format: name of its format.
        tokens: texts of its tokens, without the end of sequence.
        message: what it means.
        in_reasoning: the prompt ends with <think>.
    """

    tool_format: str
    tokens: tuple[str, ...]
    message: Message
    in_reasoning: bool = field(default=False)

    @property
    def text(self) -> str:
        """The whole answer."""
        return "".join(self.tokens)


TWO_CALLS = (
    ToolCall("get_weather", '{"city": "杭\\"州\\"\\n</x>", "days": 3, "hours": [1, 2]}'),
    ToolCall("now", "{}"),
)
_CITY = '杭·"·州·"·\n·</·x·>'
_IN_DSML = (
    "Two· calls· <·.·</think>·I· look·.·\n\n·<·｜DSML｜·SECTION·>\n·<·｜DSML｜·"
    'invoke· name·="·get·_weather·">\n·<·｜DSML｜·parameter· name="·city·" string="·true·'
    f'">·{_CITY}·</·｜DSML｜·parameter·>\n·<·｜DSML｜·parameter name="·days·'
    '" string="false">·3·</·｜DSML｜·parameter·>\n·<·｜DSML｜·'
    'parameter name="hours" string="false">·[·1·, ·2·]·</·｜DSML｜·parameter>\n·'
    '</·｜DSML｜·invoke·>\n·<·｜DSML｜·invoke name="now">\n\n·</·｜DSML｜·invoke>\n·'
    "</·｜DSML｜·SECTION·>"
)


def _cut(text: str) -> tuple[str, ...]:
    """Texts of tokens that are written with a dot between two of them."""
    return tuple(text.split("·"))


RECORDED = {
    "v31 calls": Recorded(
        "deepseek_v31",
        _cut(
            "I· look·.·<｜tool▁calls▁begin｜>·<｜tool▁call▁begin｜>·get·_weather·<｜tool▁sep｜>·"
            '{"·city·":· "·杭·\\"·州·\\"\\n</·x>"·, ·"days·": ·3·, "·hours·": [·1·, ·2·]}·'
            "<｜tool▁call▁end｜>·<｜tool▁call▁begin｜>·now·<｜tool▁sep｜>·{·}·<｜tool▁call▁end｜>·"
            "<｜tool▁calls▁end｜>"
        ),
        Message("I look.", "", TWO_CALLS),
    ),
    "v32 thinking, calls": Recorded(
        "deepseek_v32",
        _cut(_IN_DSML.replace("SECTION", "function·_calls")),
        Message("I look.", "Two calls <.", TWO_CALLS),
        in_reasoning=True,
    ),
    "v4 thinking, calls": Recorded(
        "deepseek_v4",
        _cut(_IN_DSML.replace("SECTION", "tool·_calls")),
        Message("I look.", "Two calls <.", TWO_CALLS),
        in_reasoning=True,
    ),
    "v32 chat": Recorded(
        "deepseek_v32",
        _cut("Ordinary· text· with· <·｜·bars·｜· and·\n\n·lines·\n"),
        Message("Ordinary text with <｜bars｜ and\n\nlines\n"),
    ),
    "glm thinking, calls": Recorded(
        "glm47",
        _cut(
            "Two· calls·.·</think>·I· look·.·<tool_call>·get·_weather·<arg_key>·city·</arg_key>·"
            f"<arg_value>·{_CITY}·</arg_value>·<arg_key>·days·</arg_key>·<arg_value>·3·"
            "</arg_value>·<arg_key>·hours·</arg_key>·<arg_value>·[·1·, 2·]·</arg_value>·"
            "</tool_call>·<tool_call>·now·</tool_call>"
        ),
        Message("I look.", "Two calls.", TWO_CALLS),
        in_reasoning=True,
    ),
    "glm of the lines": Recorded(
        "glm45",
        _cut(
            "<think>·\n·hm·</think>·\n·<tool_call>·get_weather·\n·<arg_key>·city·</arg_key>·\n·"
            "<arg_value>·Bonn·</arg_value>·\n·<arg_key>·units·</arg_key>·\n·<arg_value>·null·"
            "</arg_value>·\n·</tool_call>·\n"
        ),
        Message("", "\nhm", (ToolCall("get_weather", '{"city": "Bonn", "units": null}'),)),
    ),
}
