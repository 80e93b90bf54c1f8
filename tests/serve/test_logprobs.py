"""Log-probabilities, echo, token ids and several choices over HTTP, over a fake model."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import orjson
import pytest

from fd_dsa.engine.draws import derive_seed
from fd_dsa.serve.logprobs import chat_logprobs, completion_logprobs
from tests.engine.fakes import expected_greedy, make_engine
from tests.engine.test_engine import find_eos_prompt, letters
from tests.engine.test_logprobs import ref_logprobs
from tests.engine.threaded import threaded
from tests.serve.conftest import Live, chunks_of, running, stream_data
from tests.serve.test_errors import complete, error_of

PROMPT = [5, 6, 7]
NAMES = ["<bos>", "<eos>", *letters(range(2, 40))]


@pytest.fixture(scope="module")
def letters_live() -> Iterator[Live]:
    """A server over the fake model, whose tokens are single letters."""
    with running(threaded(make_engine(chats=True))) as live:
        yield live


def rows(history: list[int], count: int) -> list[np.ndarray]:
    """Log-probabilities after the first tokens of a history, from `count` on."""
    runner = make_engine().runner
    return [ref_logprobs(runner.logits_after(history[:i])) for i in range(count, len(history))]


def joined(lists: Iterable[list[Any]]) -> list[Any]:
    """The entries of all lists."""
    return list(itertools.chain.from_iterable(lists))


def check_completion(scores: Any, tokens: list[int], num_prompt: int, num_top: int) -> None:
    """The lists of `logprobs` for tokens whose first `num_prompt` are not in them."""
    shown = tokens[num_prompt:]
    assert scores.tokens == [NAMES[token] for token in shown]
    expected = rows(tokens, max(num_prompt, 1))
    logprobs, tops = scores.token_logprobs, scores.top_logprobs
    if num_prompt == 0:
        assert (logprobs[0], tops[0]) == (None, None)
        logprobs, tops, shown = logprobs[1:], tops[1:], shown[1:]
    assert len(logprobs) == len(tops) == len(expected)
    for logprob, top, row, token in zip(logprobs, tops, expected, shown, strict=True):
        assert logprob == pytest.approx(row[token], abs=1e-5)
        best = {int(i) for i in np.argsort(-row)[:num_top]} | {token}
        assert top == pytest.approx({NAMES[i]: row[i] for i in best}, abs=1e-5)


def test_a_completion_has_a_score_for_each_token(letters_live: Live) -> None:
    for num_top in (0, 3):
        answer = letters_live.client.completions.create(
            model="demo", prompt=PROMPT, max_tokens=6, temperature=0, logprobs=num_top
        )
        scores = answer.choices[0].logprobs
        tokens = [*PROMPT, *expected_greedy(PROMPT, 6)]
        check_completion(scores, tokens, 3, num_top)
        assert scores is not None and scores.text_offset == list(range(len(tokens) - 3))


def test_an_echo_has_the_scores_of_the_prompt_too(letters_live: Live) -> None:
    prompt = [0, 5, 6, 7]
    tokens = [*prompt, *expected_greedy(prompt, 3)]
    for text, offsets in ((prompt, [0, 0, 1, 2]), ("<bos>def", [0, 5, 6, 7])):
        answer = letters_live.client.completions.create(
            model="demo", prompt=text, max_tokens=3, temperature=0, logprobs=2, echo=True
        )
        choice = answer.choices[0]
        assert choice.text.endswith("def" + letters(tokens[4:]))
        check_completion(choice.logprobs, tokens, 0, 2)
        assert choice.logprobs is not None and choice.logprobs.text_offset is not None
        # the special token has no text; a prompt that is a text is repeated as it was sent
        assert choice.logprobs.text_offset[:4] == offsets
        assert choice.logprobs.text_offset[4] == len(choice.text) - 3
    plain = complete(letters_live, prompt=prompt, max_tokens=3, temperature=0, echo=True).json()
    assert plain["choices"][0]["logprobs"] is None
    assert plain["choices"][0]["text"] == "def" + letters(tokens[4:])


def test_an_echo_of_no_token_is_the_prompt_alone(letters_live: Live) -> None:
    fields = {"prompt": [PROMPT, [9]], "max_tokens": 0, "echo": True, "logprobs": 1}
    answer = complete(letters_live, **fields, return_token_ids=True).json()
    assert [choice["text"] for choice in answer["choices"]] == ["def", "h"]
    assert [len(choice["logprobs"]["tokens"]) for choice in answer["choices"]] == [3, 1]
    assert [choice["token_ids"] for choice in answer["choices"]] == [[], []]
    assert answer["usage"]["completion_tokens"] == 0
    assert answer["usage"]["total_tokens"] == 4
    chunks = chunks_of(complete(letters_live, **fields, stream=True))
    assert sorted(chunk["choices"][0]["text"] for chunk in chunks) == ["def", "h"]
    error = error_of(complete(letters_live, prompt=PROMPT, max_tokens=0), 400)
    assert error["param"] == "max_tokens"


def test_lm_eval_reads_likelihoods_from_an_echo(letters_live: Live) -> None:
    """The request and the reader of lm-eval's local-completions, which is in the extra accuracy."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    context, likely = PROMPT, expected_greedy(PROMPT, 4, eos=None)
    unlikely = [likely[0], 3 if likely[1] != 3 else 4]
    requests = [[*context, *likely], [*context, *unlikely]]
    answer = complete(
        letters_live,
        prompt=requests,
        temperature=0,
        max_tokens=1,
        logprobs=1,
        seed=1234,
        echo=True,
    ).json()
    parsed = LocalCompletionsAPI.parse_logprobs([answer], requests, [3, 3])
    for (total, is_greedy), tokens, expected in zip(parsed, requests, (True, False), strict=True):
        by_hand = sum(row[token] for row, token in zip(rows(tokens, 3), tokens[3:], strict=True))
        assert total == pytest.approx(by_hand, abs=1e-4)
        assert is_greedy == expected


@pytest.mark.parametrize("echo", [False, True])
def test_streamed_scores_and_ids_are_those_of_the_whole_answer(
    letters_live: Live, echo: bool
) -> None:
    fields = {"prompt": [PROMPT, [9, 9]], "n": 2, "max_tokens": 7, "seed": 3, "logprobs": 2}
    fields |= {"echo": echo, "return_token_ids": True, "ignore_eos": True}
    whole = complete(letters_live, **fields).json()["choices"]
    stream = complete(letters_live, **fields, stream=True)
    chunks = [chunk["choices"][0] for chunk in chunks_of(stream)]
    assert [choice["index"] for choice in whole] == [0, 1, 2, 3]
    for choice in whole:
        own = [chunk for chunk in chunks if chunk["index"] == choice["index"]]
        assert "".join(chunk["text"] for chunk in own) == choice["text"]
        ids = [chunk["prompt_token_ids"] for chunk in own if "prompt_token_ids" in chunk]
        assert ids == [choice["prompt_token_ids"]]
        assert joined(chunk["token_ids"] for chunk in own) == choice["token_ids"]
        for name, values in choice["logprobs"].items():
            assert joined(chunk["logprobs"][name] for chunk in own) == values, name
        assert own[-1]["finish_reason"] == choice["finish_reason"] == "length"


def test_a_stream_has_the_scores_of_a_prompt_without_text(letters_live: Live) -> None:
    held = letters(expected_greedy([0], 1))
    fields = {"prompt": [0], "echo": True, "logprobs": 2, "temperature": 0, "max_tokens": 4}
    # the text of the first token may begin the stop string, so it waits for the second one
    fields |= {"stop": held + "!"}
    whole = complete(letters_live, **fields).json()["choices"][0]
    chunks = [
        chunk["choices"][0] for chunk in chunks_of(complete(letters_live, **fields, stream=True))
    ]
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    assert whole["logprobs"]["tokens"][:2] == ["<bos>", held]
    for name, values in whole["logprobs"].items():
        shown = [chunk["logprobs"] for chunk in chunks if chunk["logprobs"]]
        assert joined(scores[name] for scores in shown) == values, name


def test_choices_have_seeds_of_their_own_and_the_prompt_counts_once(letters_live: Live) -> None:
    fields: dict[str, Any] = {"prompt": [[5] * 9, PROMPT], "max_tokens": 8}
    answer = complete(letters_live, **fields, n=3, best_of=3, seed=11).json()
    texts = [choice["text"] for choice in answer["choices"]]
    for index in range(3):
        seed = derive_seed(11, index) if index else 11
        alone = complete(letters_live, **fields, seed=seed).json()["choices"]
        assert [texts[index], texts[3 + index]] == [choice["text"] for choice in alone]
    assert answer["usage"]["prompt_tokens"] == 12
    assert answer["usage"]["completion_tokens"] >= 6


def chat(live: Live, **fields: Any) -> Any:
    """POST a conversation whose prompt is the three letters."""
    messages = [{"role": "user", "content": "def"}]
    return live.http.post("/v1/chat/completions", json={"messages": messages, **fields})


def test_a_chat_answer_has_scores_in_its_own_shape(letters_live: Live) -> None:
    answer = letters_live.client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "def"}],
        max_tokens=6,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    )
    scores = answer.choices[0].logprobs
    assert scores is not None and scores.content is not None
    tokens = [*PROMPT, *expected_greedy(PROMPT, 6)]
    assert [entry.token for entry in scores.content] == [NAMES[token] for token in tokens[3:]]
    for entry, row, token in zip(scores.content, rows(tokens, 3), tokens[3:], strict=True):
        assert entry.logprob == pytest.approx(row[token], abs=1e-5)
        assert entry.bytes == list(NAMES[token].encode())
        assert [top.token for top in entry.top_logprobs] == [
            NAMES[i] for i in np.argsort(-row, kind="stable")[:3]
        ]
    only = chat(letters_live, max_tokens=2, logprobs=True).json()["choices"][0]["logprobs"]
    assert [entry["top_logprobs"] for entry in only["content"]] == [[], []]
    assert chat(letters_live, max_tokens=2).json()["choices"][0]["logprobs"] is None


def test_a_chat_stream_sends_held_scores_with_their_text(letters_live: Live) -> None:
    text = letters(expected_greedy(PROMPT, 12, eos=None))
    fields = {"temperature": 0, "max_tokens": 12, "ignore_eos": True, "logprobs": True}
    for stop in (text[4:7], text[4:7] + "!"):
        stream = chat(letters_live, **fields, stop=stop, stream=True)
        chunks = [chunk["choices"][0] for chunk in chunks_of(stream)]
        for chunk in chunks:
            content = chunk["delta"].get("content", "")
            scored = (chunk["logprobs"] or {"content": []})["content"]
            assert "".join(entry["token"] for entry in scored) == content
        whole = chat(letters_live, **fields, stop=stop).json()["choices"][0]
        spoken = "".join(chunk["delta"].get("content", "") for chunk in chunks)
        assert spoken == whole["message"]["content"] == text.split(stop)[0]
        assert len(whole["logprobs"]["content"]) == len(spoken)


def test_a_response_has_the_scores_of_a_chat_answer(letters_live: Live) -> None:
    fields = {"temperature": 0, "seed": 1, "top_logprobs": 2}
    same = chat(letters_live, **fields, logprobs=True, max_completion_tokens=6).json()
    expected = same["choices"][0]["logprobs"]["content"]
    body = {"input": "def", "max_output_tokens": 6, **fields}
    post = letters_live.http.post
    (item,) = post("/v1/responses", json=body).json()["output"]
    assert item["content"][0]["logprobs"] == expected
    text = post("/v1/responses", json={**body, "stream": True}).text
    events = [json.loads(data) for data in stream_data(text)]
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert joined(delta["logprobs"] for delta in deltas) == expected
    assert all(
        "".join(entry["token"] for entry in delta["logprobs"]) == delta["delta"] for delta in deltas
    )
    included = {**body, "top_logprobs": None, "include": ["message.output_text.logprobs"]}
    scores = post("/v1/responses", json=included).json()["output"][0]["content"][0]["logprobs"]
    assert [entry["logprob"] for entry in scores] == [entry["logprob"] for entry in expected]


def test_chat_with_several_choices(letters_live: Live) -> None:
    fields: dict[str, Any] = {"n": 3, "seed": 5, "max_tokens": 6, "return_token_ids": True}
    answer = chat(letters_live, **fields).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["prompt_token_ids"] == PROMPT
    assert answer["usage"]["prompt_tokens"] == 3
    body = {**fields, "stream": True, "stream_options": {"include_usage": True}}
    chunks = chunks_of(chat(letters_live, **body))
    assert chunks[-1]["usage"]["completion_tokens"] == answer["usage"]["completion_tokens"]
    for choice in answer["choices"]:
        own = [c["choices"][0] for c in chunks[:-1] if c["choices"][0]["index"] == choice["index"]]
        assert own[0]["delta"]["role"] == "assistant"
        text = "".join(chunk["delta"].get("content", "") for chunk in own)
        assert text == choice["message"]["content"]
        assert joined(chunk.get("token_ids", []) for chunk in own) == choice["token_ids"]
        assert own[-1]["finish_reason"] == choice["finish_reason"]


def test_scores_of_a_prompt_have_the_shape_of_vllm(letters_live: Live) -> None:
    answer = chat(letters_live, max_tokens=1, prompt_logprobs=2).json()
    completion = complete(letters_live, prompt=PROMPT, max_tokens=1, prompt_logprobs=2).json()
    assert completion["choices"][0]["prompt_logprobs"] == answer["prompt_logprobs"]
    first, *scores = answer["prompt_logprobs"]
    assert first is None
    for by_id, row, token in zip(scores, rows(PROMPT, 1), PROMPT[1:], strict=True):
        rank = 1 + int((row > row[token]).sum())
        assert next(iter(by_id)) == str(token)
        assert by_id[str(token)]["rank"] == rank
        assert len(by_id) == (3 if rank > 2 else 2)
        for name, score in by_id.items():
            assert score["decoded_token"] == NAMES[int(name)]
            assert score["logprob"] == pytest.approx(row[int(name)], abs=1e-5)


def test_chat_refuses_likeliest_tokens_without_scores(letters_live: Live) -> None:
    for fields in ({"top_logprobs": 2}, {"top_logprobs": 21, "logprobs": True}):
        assert error_of(chat(letters_live, **fields), 400)["param"] == "top_logprobs"
    error = error_of(chat(letters_live, logprobs=3), 400)
    assert error["param"] == "logprobs"


def test_the_end_of_sequence_is_scored_and_named(letters_live: Live) -> None:
    prompt, tokens = find_eos_prompt()
    fields = {"prompt": prompt, "max_tokens": 12, "temperature": 0, "logprobs": 0}
    scores = complete(letters_live, **fields).json()["choices"][0]["logprobs"]
    assert scores["tokens"] == [NAMES[token] for token in tokens]


def test_what_json_lacks() -> None:
    """An excluded token has a number, and half a character a name."""
    from fd_dsa.engine.logprobs import TokenLogprobs, TokenScore

    class Halves:
        def piece_bytes(self, token_id: int) -> bytes:
            return "é".encode()[token_id : token_id + 1]

    entry = TokenLogprobs(0, TokenScore(-math.inf, 2, ((1, 0.0),)), 0)
    chat = chat_logprobs(Halves(), [entry])  # type: ignore[arg-type]
    (content,) = json.loads(orjson.dumps(chat))["content"]
    assert (content["token"], content["bytes"]) == ("bytes:\\xc3", [0xC3])
    assert content["logprob"] == -9999.0
    made = completion_logprobs(Halves(), [entry])  # type: ignore[arg-type]
    scores = json.loads(orjson.dumps(made))
    assert scores["top_logprobs"] == [{"bytes:\\xa9": 0.0, "bytes:\\xc3": -9999.0}]
