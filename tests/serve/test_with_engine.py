"""The server over the real engine and its thread; only the model is a fake one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest

import fd_dsa
from fd_dsa.engine.speculation import SpecDecoder
from tests.engine.drafters import KnowingDrafter
from tests.engine.fakes import EOS, byte_tokenizer, expected_greedy, make_engine
from tests.engine.threaded import threaded
from tests.serve.conftest import chunks_of, running
from tests.serve.test_errors import complete, error_of

GREEDY = {"temperature": 0, "max_tokens": 40}


def expected_text(prompt: list[int], num_tokens: int) -> str:
    """Text of the greedy continuation, computed without an engine."""
    return byte_tokenizer().decode(expected_greedy(prompt, num_tokens))


def test_answers_are_those_of_the_model() -> None:
    with running(threaded(make_engine())) as live:
        prompts = [[5, 6, 7], [9], [30, 31]]
        answer = complete(live, prompt=prompts, **GREEDY).json()
        texts = [choice["text"] for choice in answer["choices"]]
        assert texts == [expected_text(prompt, 40) for prompt in prompts]
        again = live.client.completions.create(
            model="demo", prompt=prompts[0], stream=True, temperature=0, max_tokens=40
        )
        assert "".join(chunk.choices[0].text for chunk in again) == texts[0]


def test_drafts_come_several_in_an_event_and_are_in_the_usage() -> None:
    tokens = expected_greedy([5, 6, 7], 40, eos=None)
    drafter = KnowingDrafter({}, 1.0, 40)
    drafter.answer = lambda request: tokens
    with running(threaded(make_engine(spec_decoder=SpecDecoder(drafter, 3)))) as live:
        fields = {"prompt": [5, 6, 7], "logprobs": 1, "ignore_eos": True, **GREEDY}
        fields |= {"return_token_ids": True}
        answer = complete(live, **fields).json()
        assert answer["choices"][0]["text"] == byte_tokenizer().decode(tokens)
        details = answer["usage"]["completion_tokens_details"]
        accepted = details["accepted_prediction_tokens"]
        assert (accepted > 20, details["rejected_prediction_tokens"]) == (True, 0)
        stream = complete(live, **fields, stream=True, stream_options={"include_usage": True})
        chunks = chunks_of(stream)
        assert chunks[-1]["usage"] == answer["usage"]
        pieces = [chunk["choices"][0] for chunk in chunks[:-1]]
        assert max(len(piece["token_ids"]) for piece in pieces if piece.get("token_ids")) == 4
        scores = [one for piece in pieces for one in piece["logprobs"]["token_logprobs"]]
        assert scores == answer["choices"][0]["logprobs"]["token_logprobs"]
        plain = complete(live, **fields, speculative=False).json()
        assert plain["choices"] == answer["choices"]
        assert "completion_tokens_details" not in plain["usage"]
        text = live.http.get("/metrics").text
        assert "fd_dsa:spec_decode_num_accepted_tokens_total{" in text
        assert (
            'spec_decode_num_accepted_tokens_per_pos_total{model_name="demo",position="2"}' in text
        )


def test_refusals_of_the_engine_are_bad_requests() -> None:
    with running(threaded(make_engine(num_blocks=8, max_model_len=64))) as live:
        for prompt in ([5, 10**30], [-1], [40], []):
            assert error_of(complete(live, prompt=prompt), 400)["param"] == "prompt"
        error = error_of(complete(live, prompt=[5] * 20, max_tokens=40), 400)
        assert "8" in error["message"]
        assert complete(live, prompt=[5] * 20, max_tokens=5).status_code == 200


def test_the_reason_to_stop_is_named_as_in_vllm() -> None:
    tokens = expected_greedy([5, 6, 7], 12)
    text = byte_tokenizer().decode(tokens[:3])
    with running(threaded(make_engine())) as live:
        fields = {"prompt": [5, 6, 7], "temperature": 0, "max_tokens": 12}
        for more, reason in (
            ({"stop": [text]}, text),
            ({"stop_token_ids": [tokens[4]]}, tokens[4]),
            ({"ignore_eos": True}, None),
        ):
            (choice,) = complete(live, **fields, **more).json()["choices"]
            assert choice["stop_reason"] == reason
            stream = complete(live, **fields, **more, stream=True)
            parts = [chunk["choices"][0] for chunk in chunks_of(stream)]
            assert "stop_reason" not in parts[0] or len(parts) == 1
            assert parts[-1]["stop_reason"] == reason
        # the end of sequence, which nobody has asked for
        bias = {"logit_bias": {str(EOS): 100}}
        (choice,) = complete(live, **fields, **bias).json()["choices"]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)


def test_parameters_that_exclude_every_token_are_bad_requests() -> None:
    with running(threaded(make_engine())) as live:
        fields = {"prompt": [5], "bad_words_token_ids": list(range(40))}
        assert "bad_words" in error_of(complete(live, **fields), 400)["message"]
        with pytest.raises(openai.APIError, match="bad_words"):
            list(
                live.client.completions.create(
                    model="demo", prompt=[5], stream=True, extra_body=fields
                )
            )
        for name in ("stop_token_ids", "bad_words_token_ids"):
            assert error_of(complete(live, prompt=[5], **{name: [40]}), 400)["param"] == name
        assert error_of(complete(live, logit_bias={"40": 1}), 400)["param"] == "logit_bias"
        assert complete(live, prompt=[5]).status_code == 200


def cached_tokens(answer: dict[str, Any]) -> int:
    """`cached_tokens` of an answer's or a last chunk's usage."""
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_usage_tells_what_was_cached_and_salts_keep_apart() -> None:
    prompt = [5 + i % 30 for i in range(18)]
    engine = make_engine()
    with running(threaded(engine)) as live:
        fields = {"prompt": prompt, "max_tokens": 4}
        found = [
            cached_tokens(complete(live, **fields, cache_salt=salt).json())
            for salt in (None, None, "a", "b", "a", None)
        ]
        assert found == [0, 16, 0, 0, 16, 16]
        both = complete(live, prompt=[prompt, prompt[:9], [2]], max_tokens=4).json()
        assert cached_tokens(both) == 16 + 8
        options = {"stream": True, "stream_options": {"include_usage": True}}
        assert cached_tokens(chunks_of(complete(live, **fields, **options))[-1]) == 16
        assert engine.stats().prefix_cache_hits == 16 * 3 + 24 + 16
        # the prompt counts once, whatever the number of choices
        assert cached_tokens(complete(live, **fields, n=2).json()) == 16
        for salt in ("", 3, ["a"]):
            error = error_of(complete(live, **fields, cache_salt=salt), 400)
            assert error["param"] == "cache_salt"


def test_only_created_follows_the_clock_on_the_wall() -> None:
    """That may be set while a server runs: times are differences of the monotonic clock."""
    root = Path(fd_dsa.__file__).parent
    files = (path for room in ("engine", "runner", "serve") for path in (root / room).rglob("*.py"))
    users = {path.name for path in files if "time.time" in path.read_text("utf-8")}
    # of answers, and of the model
    assert users == {"answer.py", "responses.py", "state.py"}
