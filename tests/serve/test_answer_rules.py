"""Stop strings, min_tokens and bad words of a chat begin with the answer, over a real engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from fd_dsa.chat.template import ChatTemplate
from fd_dsa.engine.engine import LLMEngine
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.engine.structured_outputs import StructuredOutputsParams
from fd_dsa.offline.llm import LLM
from fd_dsa.runner.input_batch import InputBatch
from tests.engine.byte_model import EOS, VOCAB_SIZE, all_bytes_tokenizer
from tests.engine.fakes import FakeRunner
from tests.engine.threaded import threaded
from tests.serve.conftest import Live, running

TEMPLATE = """
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
|{%- if m.reasoning_content -%}<think>{{ m.reasoning_content }}{%- if m.content -%}</think>{%- endif -%}
{%- endif -%}{{ m.content }}
{%- else -%}{{ m.content }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}|{{ '<think>' if thinking }}{%- endif -%}
"""  # noqa: E501
PLAN, REST = "<think>a STOP</think>", "\n\nAn STOP b STOP"
TOKENIZER = all_bytes_tokenizer()
TOKENIZER.chat_renderer = ChatTemplate(TEMPLATE, {})
TILDE, BAR = (TOKENIZER.encode(char, add_special_tokens=False)[0] for char in "~|")


class ScriptRunner(FakeRunner):
    """Writes the rest of a script after the last `|`; `~` is the likeliest other token."""

    script = PLAN + REST

    def logits_after(self, history: list[int]) -> np.ndarray:
        begin = len(history) - history[::-1].index(BAR)
        script = [*TOKENIZER.encode(self.script, add_special_tokens=False), EOS]
        logits = np.zeros(self.vocab_size, np.float32)
        logits[TILDE] = 5
        logits[[*script, EOS][min(len(history) - begin, len(script))]] = 10
        return logits


def make_engine() -> LLMEngine:
    """An engine that follows the script."""
    runner = ScriptRunner(InputBatch(4, 64, 64, 4), 512, VOCAB_SIZE)
    sizes = {"num_blocks": 512, "max_model_len": 256}
    return LLMEngine(runner, TOKENIZER, eos_token_ids=[EOS], **sizes)


@pytest.fixture(scope="module")
def scripted() -> Iterator[Live]:
    """A server whose model reasons, with the stop string in its reasoning."""
    with running(threaded(make_engine())) as live:
        yield live


HI = {"role": "user", "content": "hi"}
BEGUN = {"role": "assistant", "reasoning_content": "a"}
THOUGHT = {"role": "assistant", "reasoning_content": "a STOP", "content": "\n\nAn"}
ON: dict[str, Any] = {"reasoning_effort": "high"}
KEPT = {"include_stop_str_in_output": True}
FIRST = {"constrain_reasoning": True}
ALL = "\n\nAn STOP b STOP"
CASES: list[tuple[dict[str, Any], str | None, str, str | None]] = [
    # fields, reasoning, content, the reason if it is a stop string
    ({"stop": "STOP"}, "a STOP", "\n\nAn ", "STOP"),
    ({"stop": ["STOP"], **ON}, "a STOP", "\n\nAn ", "STOP"),
    ({"stop": ["STOP"], **ON, **KEPT}, "a STOP", "\n\nAn STOP", "STOP"),
    ({"stop": ["STOP"], **ON, **FIRST}, "a ", "", "STOP"),
    ({"stop": ["STOP"], **FIRST}, "a ", "", "STOP"),
    ({"stop": ["</think>"], **ON, **FIRST}, "a STOP", "", "</think>"),
    # the space between reasoning and answer is no part of the answer
    ({"stop": ["\n\n", "\n"], **ON}, "a STOP", ALL, None),
    ({"stop": ["STOP"], "min_tokens": 7, **ON}, "a STOP", "\n\nAn STOP b ", "STOP"),
    ({"min_tokens": len(ALL) + 2, **ON}, "a STOP", ALL + "~~", None),
    ({"min_tokens": 7 + len(ALL) + 3, **ON, **FIRST}, "a STOP", ALL + "~~~", None),
    ({"bad_words": ["O", "An"], **ON}, "a STOP", "\n\nA~ ST~P b ST~P", None),
    ({"bad_words": ["O", "An"]}, "a STOP", "\n\nA~ ST~P b ST~P", None),
    ({"bad_words": ["O"], **ON, **FIRST}, "a ST~P", "\n\nAn ST~P b ST~P", None),
    # with a form, which begins after the reasoning too
    ({"guided_choice": [ALL], "stop": "STOP", **ON}, "a STOP", "\n\nAn ", "STOP"),
    ({"guided_choice": [ALL], "stop": "STOP"}, "a STOP", "\n\nAn ", "STOP"),
    ({"guided_choice": [ALL], **ON, **FIRST}, "a STOP", ALL, None),
    ({"guided_choice": [ALL], **FIRST}, "a STOP", ALL, None),
    ({"guided_choice": [ALL], "stop": "STOP", **FIRST}, "a ", "", "STOP"),
    ({"guided_choice": ["<b>"]}, "a STOP", "<b>", None),
    ({"guided_regex": "[^O]*", "bad_words": ["S"], **ON}, "a STOP", "\n\nAn ~T~P b ~T~P", None),
    ({"messages": [HI, BEGUN], "stop": "STOP"}, " STOP", "\n\nAn ", "STOP"),
    ({"messages": [HI, THOUGHT], "stop": "STOP"}, None, " ", "STOP"),
]


@pytest.mark.parametrize(("fields", "reasoning", "content", "stop"), CASES)
def test_the_rules_of_an_answer(
    scripted: Live, fields: dict[str, Any], reasoning: str | None, content: str, stop: str | None
) -> None:
    body = {"messages": [HI], "temperature": 0, "logprobs": True, **fields}
    if body["messages"][-1]["role"] == "assistant":
        body["continue_final_message"] = True
    answer = scripted.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    message = choice["message"]
    assert (message.get("reasoning_content"), message["content"]) == (reasoning, content)
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    scored = "".join(entry["token"] for entry in choice["logprobs"]["content"])
    assert scored.removesuffix("<eos>").endswith(content or reasoning or "")
    stream = scripted.client.chat.completions.create(
        model="demo", stream=True, messages=body.pop("messages"), extra_body=body
    )
    deltas = [chunk.choices[0].delta for chunk in stream]
    thoughts = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    assert thoughts == (reasoning or "")
    assert "".join(delta.content or "" for delta in deltas) == content


def test_a_completion_has_no_reasoning(scripted: Live) -> None:
    body = {"prompt": "|<think>", "stop": "STOP", "temperature": 0}
    (choice,) = scripted.http.post("/v1/completions", json=body).json()["choices"]
    assert choice["text"] == "a "


def test_conversations_without_a_server() -> None:
    params = SamplingParams(temperature=0, max_tokens=90, stop="STOP")
    with LLM.from_engine(make_engine()) as llm:

        def text(**kwargs: Any) -> str:
            return llm.chat([HI], params, **kwargs)[0].text

        thinking = {"chat_template_kwargs": {"thinking": True}}
        assert text() == PLAN + "\n\nAn "
        assert text(**thinking) == PLAN.removeprefix("<think>") + "\n\nAn "
        assert text(**thinking, constrain_reasoning=True) == "a "
        form = StructuredOutputsParams(choice=["yes", "\n\nno"])
        asked = SamplingParams(temperature=0, max_tokens=90, structured_outputs=form)
        assert llm.chat([HI], asked)[0].text == PLAN + "\n\nno"
        (output,) = llm.chat([HI], asked, **thinking, constrain_reasoning=True)
        assert output.text == PLAN.removeprefix("<think>") + "\n\nno"
        (output,) = llm.chat([HI, BEGUN], params, continue_final_message=True)
        assert output.text == " STOP</think>\n\nAn "
