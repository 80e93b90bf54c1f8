"""The tokens of the reasoning in usage, token ids and scores, at any place inside a step."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from fd_dsa.chat.deepseek_encoding import DeepseekV32Encoding
from fd_dsa.engine.engine import LLMEngine
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.engine.speculation import SpecDecoder
from fd_dsa.engine.tokenizer import Tokenizer
from fd_dsa.offline.llm import LLM
from fd_dsa.runner.input_batch import InputBatch
from tests.chat.recorded import RECORDED, TOOLS
from tests.engine import published
from tests.engine.drafters import KnowingDrafter
from tests.engine.fakes import FakeRunner
from tests.engine.threaded import threaded
from tests.serve.conftest import Live, chunks_of, running
from tests.serve.test_responses import FUNCTIONS

HI = {"role": "user", "content": "Hi"}
CALLS = RECORDED["v32 thinking, calls"].text
MAX_MODEL_LEN = 512


class ScriptRunner(FakeRunner):
    """Writes `script` after the first `num_prompt` tokens, then ends of sequence."""

    def __init__(self, tokenizer: Tokenizer, eos: int) -> None:
        super().__init__(InputBatch(4, 64, 128, 4), 1024, tokenizer.vocab_size)
        self.eos, self.num_prompt = eos, 0
        self.script: list[int] = []

    def logits_after(self, history: list[int]) -> np.ndarray:
        logits = np.zeros(self.vocab_size, np.float32)
        place = len(history) - self.num_prompt
        logits[self.script[place] if 0 <= place < len(self.script) else self.eos] = 10
        return logits


@dataclass
class Scripted:
    """A server whose model follows a script.

    Attributes:
        live: the server.
        tokenizer, runner: of its engine.
    """

    live: Live
    tokenizer: Tokenizer
    runner: ScriptRunner

    def write(self, text: str, body: dict[str, Any]) -> list[int]:
        """Set the text of the next answer, and return its tokens with the end."""
        names = ("messages", "tools", "chat_template_kwargs", "continue_final_message")
        asked = {name: body[name] for name in names if name in body}
        prompt = self.live.http.post("/tokenize", json=asked)
        assert prompt.status_code == 200, prompt.text
        self.runner.num_prompt = prompt.json()["count"]
        self.runner.script = self.tokenizer.encode(text, add_special_tokens=False)
        return [*self.runner.script, self.runner.eos]

    def chat(self, **body: Any) -> dict[str, Any]:
        """The answer of a chat."""
        answer = self.live.http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def stream(self, **body: Any) -> list[dict[str, Any]]:
        """The chunks of a chat, each with the usage so far."""
        body["stream"] = True
        body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
        return chunks_of(self.live.http.post("/v1/chat/completions", json=body))


def make_engine(tokenizer: Tokenizer, num_drafts: int) -> LLMEngine:
    """An engine that follows a script, with all drafts right."""
    eos = tokenizer.encode(tokenizer.special_tokens["eos_token"], add_special_tokens=False)[0]
    runner = ScriptRunner(tokenizer, eos)
    drafter = KnowingDrafter({}, 1.0, tokenizer.vocab_size)
    drafter.answer = lambda request: [*runner.script, eos]
    spec_decoder = SpecDecoder(drafter, num_drafts) if num_drafts else None
    sizes = {"num_blocks": 1024, "max_model_len": MAX_MODEL_LEN}
    return LLMEngine(runner, tokenizer, eos_token_ids=[eos], spec_decoder=spec_decoder, **sizes)


# with DeepSeek's tokenizer the markers are single tokens, with the other one several
SERVERS = [("deepseek", 0), ("deepseek", 3), ("no markers", 3)]


@pytest.fixture(scope="module", params=SERVERS, ids=str)
def scripted(request: pytest.FixtureRequest) -> Iterator[Scripted]:
    """Servers of the encoding of DeepSeek-V3.2, with and without drafts."""
    kind, num_drafts = request.param
    tokenizer = published.KINDS[kind]()
    tokenizer.chat_renderer = DeepseekV32Encoding("TOOLS\n{tool_schemas}\n")
    engine = make_engine(tokenizer, num_drafts)
    with running(threaded(engine)) as live:
        yield Scripted(live, tokenizer, engine.runner)


def num_thoughts(tokenizer: Tokenizer, tokens: list[int], is_opened: bool) -> int:
    """Tokens up to the end of the reasoning, by decoding every beginning of the output."""
    if not is_opened and not tokenizer.decode(tokens, False).lstrip().startswith("<think>"):
        return 0
    for count in range(len(tokens)):
        if "</think>" in tokenizer.decode(tokens[:count], False):
            return count
    return len(tokens)


ON: dict[str, Any] = {"messages": [HI], "chat_template_kwargs": {"thinking": True}}
OFF: dict[str, Any] = {"messages": [HI], "chat_template_kwargs": {"thinking": False}}
BEGUN = {**ON, "continue_final_message": True}
THOUGHT = {"role": "assistant", "reasoning_content": "I"}
IN_CONTENT = {"role": "assistant", "content": "<think>I"}
SAID = {"role": "assistant", "reasoning_content": "I", "content": "We"}
PLAIN = "a b c</think>\n\nAn answer."
CASES: dict[str, tuple[dict[str, Any], str]] = {
    # the marker is at each place of a step
    **{f"{n} words": (ON, " word" * n + "</think>" + "An answer.") for n in range(6)},
    "space": (ON, PLAIN),
    "two markers": (ON, "a</think>b</think>c"),
    "never ends": (ON, "a b c </thin"),
    "only the marker": (ON, "a b</think>"),
    "cut inside": ({**ON, "max_tokens": 3}, PLAIN),
    "cut in the answer": ({**ON, "max_tokens": 8}, PLAIN),
    "stopped": ({**ON, "stop": ["swer"]}, "swer</think>An answer."),
    "stopped inside": ({**ON, "stop": ["c"], "constrain_reasoning": True}, PLAIN),
    "stopped at the marker": ({**ON, "stop": ["</think>"], "constrain_reasoning": True}, PLAIN),
    "stopped after": ({**ON, "stop": ["answer"], "constrain_reasoning": True}, PLAIN),
    "several": ({**ON, "n": 3}, PLAIN),
    "calls": ({**ON, "tools": TOOLS}, CALLS),
    "one call": ({**ON, "tools": TOOLS, "parallel_tool_calls": False, "n": 2}, CALLS),
    "a call inside": ({**ON, "tools": TOOLS}, CALLS.replace("</think>", " ")),
    "a call inside, then more": ({**ON, "tools": TOOLS}, CALLS.replace("</think>", "") + PLAIN),
    "goes on": ({**BEGUN, "messages": [HI, THOUGHT]}, PLAIN),
    "goes on in the content": ({**BEGUN, "messages": [HI, IN_CONTENT]}, PLAIN),
    "the content goes on": ({**BEGUN, "messages": [HI, SAID]}, PLAIN),
    "off": (OFF, "An answer."),
    "off, with a marker": (OFF, "An </think> answer."),
    "opened by the model": (OFF, " \n<think>a b</think>An answer."),
    "opened, never ends": (OFF, "<think>a b"),
    "may still open": (OFF, " \n<th"),
    "stopped before": ({**OFF, "stop": ["<th"], "constrain_reasoning": True}, " \n<th"),
    "bad words": ({**ON, "bad_words": ["zebra"], "min_tokens": 2}, PLAIN),
}
NOT_OPENED = {name for name in CASES if CASES[name][0] is OFF} | {
    "the content goes on",
    "stopped before",
}


@pytest.mark.parametrize("name", CASES)
def test_usage_token_ids_and_scores(scripted: Scripted, name: str) -> None:
    fields, text = CASES[name]
    script = scripted.write(text, fields)
    body = {**fields, "temperature": 0, "logprobs": True, "return_token_ids": True}
    n = fields.get("n", 1)
    shown = scripted.chat(**body)
    total = 0
    for choice in shown["choices"]:
        tokens = choice["token_ids"]
        assert tokens == script[: len(tokens)]
        total += num_thoughts(scripted.tokenizer, tokens, name not in NOT_OPENED)
    num_shown = sum(len(choice["token_ids"]) for choice in shown["choices"])
    assert counts(shown) == (num_shown, total)
    check_stream(scripted, body, shown)
    hidden = scripted.chat(**body, include_reasoning=False)
    assert counts(hidden) == (num_shown, total)
    start = total // n
    for choice, other in zip(shown["choices"], hidden["choices"], strict=True):
        assert other["token_ids"] == choice["token_ids"][start:]
        assert other["logprobs"]["content"] == choice["logprobs"]["content"][start:]
        assert other["message"].get("content") == choice["message"].get("content")
        assert "reasoning_content" not in other["message"]
    check_stream(scripted, {**body, "include_reasoning": False}, hidden)


def counts(answer: dict[str, Any]) -> tuple[int, int]:
    """Tokens of an answer or of a chunk so far, and those of its reasoning."""
    usage = answer["usage"]
    return usage["completion_tokens"], usage["completion_tokens_details"]["reasoning_tokens"]


def check_stream(scripted: Scripted, body: dict[str, Any], whole: dict[str, Any]) -> None:
    """The chunks add up to the whole answer."""
    *chunks, last = scripted.stream(**body)
    assert (last["choices"], counts(last)) == ([], counts(whole))
    assert counts(chunks[-1]) == counts(last)
    for index, choice in enumerate(whole["choices"]):
        parts = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert [t for part in parts for t in part.get("token_ids", [])] == choice["token_ids"]
        scores = [s for part in parts for s in (part["logprobs"] or {"content": []})["content"]]
        assert scores == choice["logprobs"]["content"]
        thoughts = [part["delta"].get("reasoning_content") or "" for part in parts]
        assert "".join(thoughts) == choice["message"].get("reasoning_content", "")
        content = "".join(part["delta"].get("content") or "" for part in parts)
        assert content == (choice["message"]["content"] or "")


def test_drafts_count_up_to_the_end_of_an_answer_with_one_call(scripted: Scripted) -> None:
    has_drafts = []
    for fields, text in (CASES["calls"], CASES["one call"]):
        scripted.write(text, fields)
        body = {**fields, "temperature": 0}
        for usage in (scripted.chat(**body)["usage"], scripted.stream(**body)[-1]["usage"]):
            accepted = usage["completion_tokens_details"].get("accepted_prediction_tokens", 0)
            # all drafts are right, 3 in a step of 4 tokens
            has_drafts.append(accepted > usage["completion_tokens"] // 2)
    assert has_drafts in ([False] * 4, [True] * 4)


END = "</｜DSML｜invoke>"


@pytest.mark.parametrize("num_words", range(4))
@pytest.mark.parametrize("scores", [False, True])
def test_one_call_ends_at_the_same_token(scripted: Scripted, num_words: int, scores: bool) -> None:
    """Tokens after the call do not count, at any place of its end inside a step."""
    fields = {**CASES["one call"][0], "n": 1}
    script = scripted.write("a " * num_words + CALLS, fields)
    texts = (scripted.tokenizer.decode(script[:count], False) for count in range(len(script)))
    expected = next(count for count, text in enumerate(texts) if END in text)
    body = {**fields, "temperature": 0, "logprobs": scores, "return_token_ids": True}
    whole = scripted.chat(**body)
    (choice,) = whole["choices"]
    assert choice["token_ids"] == script[:expected]
    assert len(choice["message"]["tool_calls"]) == 1
    *chunks, last = scripted.stream(**body)
    streamed = [token for c in chunks for token in c["choices"][0].get("token_ids", [])]
    assert streamed == choice["token_ids"]
    assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"] == expected
    asked: dict[str, Any] = {"input": "Hi", "tools": FUNCTIONS, "parallel_tool_calls": False}
    asked |= {"temperature": 0, "reasoning": {"effort": "high"}}
    if scores:
        asked["include"] = ["message.output_text.logprobs"]
    response = scripted.live.http.post("/v1/responses", json=asked).json()
    assert response["usage"]["output_tokens"] == expected


@pytest.mark.parametrize("name", [n for n in CASES if set(CASES[n][0]) <= {*ON, "tools"}])
def test_responses_and_messages_count_the_same_tokens(scripted: Scripted, name: str) -> None:
    fields, text = CASES[name]
    script = scripted.write(text, fields)
    count = num_thoughts(scripted.tokenizer, script, name not in NOT_OPENED)
    thinks = fields["chat_template_kwargs"]["thinking"]
    body: dict[str, Any] = {
        "input": "Hi",
        "temperature": 0,
        "reasoning": {"effort": "high" if thinks else "none"},
        "top_logprobs": 0,
        "include": ["message.output_text.logprobs"],
    }
    if "tools" in fields:
        body["tools"] = FUNCTIONS
    answer = scripted.live.http.post("/v1/responses", json=body).json()
    assert answer["usage"]["output_tokens_details"]["reasoning_tokens"] == count
    assert answer["usage"]["output_tokens"] == len(script)
    with scripted.live.http.stream("POST", "/v1/responses", json={**body, "stream": True}) as lines:
        data = [line[6:] for line in lines.iter_lines() if line.startswith("data: ")]
    ended = json.loads(data[-1])["response"]
    details = "output_tokens_details"
    assert ended["usage"][details] == answer["usage"][details]
    for one in (answer, ended):
        messages = [item for item in one["output"] if item["type"] == "message"]
        scores = [score for item in messages for score in item["content"][0]["logprobs"]]
        content = "".join(item["content"][0]["text"] for item in messages)
        shown = [score["token"] for score in scores]
        if "tools" in fields:
            # markup after the content has no scores, also in the same step
            assert "".join(shown).rstrip() == content.rstrip()
        elif content:
            texts = [scripted.tokenizer.decode([token], False) for token in script[count:]]
            # the end of sequence has a score only if it releases text
            assert shown == texts[: len(texts) - (name != "may still open")]
    body = {"messages": [HI], "max_tokens": 300, "temperature": 0}
    body["thinking"] = {"type": "enabled" if thinks else "disabled"}
    if "tools" not in fields:
        usage = scripted.live.http.post("/v1/messages", json=body).json()["usage"]
        assert usage["output_tokens_details"]["thinking_tokens"] == count


def test_without_a_parser_of_the_reasoning_it_is_not_counted() -> None:
    tokenizer = published.deepseek()
    tokenizer.chat_renderer = DeepseekV32Encoding("TOOLS\n{tool_schemas}\n")
    engine = make_engine(tokenizer, 0)
    with running(threaded(engine), reasoning_parser="none") as live:
        scripted = Scripted(live, tokenizer, engine.runner)
        scripted.write(PLAIN, ON)
        assert "completion_tokens_details" not in scripted.chat(**ON)["usage"]


@pytest.mark.parametrize("num_drafts", [0, 3])
def test_outputs_without_a_server_know_where_the_answer_starts(num_drafts: int) -> None:
    tokenizer = published.deepseek()
    tokenizer.chat_renderer = DeepseekV32Encoding("TOOLS\n{tool_schemas}\n")
    engine = make_engine(tokenizer, num_drafts)
    runner = engine.runner
    assert isinstance(runner, ScriptRunner)
    runner.script = tokenizer.encode(PLAIN, add_special_tokens=False)
    prompt = tokenizer.render_chat([HI], True, thinking=True).text
    runner.num_prompt = len(tokenizer.encode(prompt, False))
    expected = num_thoughts(tokenizer, [*runner.script, runner.eos], True)
    params = SamplingParams(temperature=0, max_tokens=90)
    with LLM.from_engine(engine) as llm:
        kwargs = {"thinking": True}
        outputs = list(llm.chat([HI], params, stream=True, chat_template_kwargs=kwargs))
        assert max(len(output.new_token_ids) for output in outputs) == 1 + num_drafts
        for output in outputs:
            is_over = output.num_tokens >= expected
            assert output.answer_start == (expected if is_over else None)
            assert output.num_reasoning_tokens == min(expected, output.num_tokens)
        (plain,) = llm.generate([[5, 6]], params)
        assert (plain.answer_start, plain.num_reasoning_tokens) == (0, 0)
