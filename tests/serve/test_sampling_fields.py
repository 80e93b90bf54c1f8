"""Every parameter that a request may send reaches the engine: none is accepted and dropped."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from pydantic import BaseModel

from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.engine.structured_outputs import StructuredOutputsParams
from fd_dsa.serve.completions import CompletionRequest
from fd_dsa.serve.protocol.chat import ChatCompletionRequest
from fd_dsa.serve.protocol.generation import SAMPLING_FIELDS
from fd_dsa.serve.protocol.structured import STRUCTURED_FIELDS
from tests.serve.conftest import Live
from tests.serve.test_errors import complete

# field of SamplingParams -> a value that is not its default, as a request of that name has it
SENT: dict[str, Any] = {
    "n": 2,
    "temperature": 0.5,
    "top_p": 0.25,
    "top_k": 3,
    "min_p": 0.125,
    "presence_penalty": 0.5,
    "frequency_penalty": -1.5,
    "repetition_penalty": 1.25,
    "logit_bias": {"3": 5},
    "bad_words": ["bad"],
    "bad_words_token_ids": [5],
    "min_tokens": 2,
    "max_tokens": 9,
    "stop": ["never"],
    "stop_token_ids": [6],
    "include_stop_str_in_output": True,
    "ignore_eos": True,
    "skip_special_tokens": False,
    "logprobs": 4,
    "prompt_logprobs": 5,
    "structured_outputs": {"regex": "a"},
    "seed": 7,
    "cache_salt": "salt",
    "return_topk_positions": True,
}
READ_AS = {"logit_bias": {3: 5}, "structured_outputs": StructuredOutputsParams(regex="a")}
# of Python callers and of the server itself
NOT_SENT = {"skip_reading_prefix_cache", "kept_special_token_ids"}
# what the server reads itself; with another name or in another form a parameter of the engine
BY_THE_SERVER = {"model", "stream", "stream_options", "best_of", "return_token_ids"}
OF_COMPLETIONS = {"prompt", "echo", "logprobs"}
OF_CHAT = {
    *("messages", "max_completion_tokens", "logprobs", "top_logprobs", "tools", "tool_choice"),
    *("parallel_tool_calls", "reasoning_effort", "include_reasoning", "chat_template"),
    *("chat_template_kwargs", "add_generation_prompt", "continue_final_message"),
}


@pytest.mark.parametrize(
    "name", [f.name for f in dataclasses.fields(SamplingParams) if f.name not in NOT_SENT]
)
def test_each_parameter_of_the_engine_can_be_sent(live: Live, name: str) -> None:
    live.engine.requests.clear()
    assert complete(live, **{name: SENT[name]}).status_code == 200
    ((_, params),) = live.engine.requests.values()
    assert getattr(params, name) == READ_AS.get(name, SENT[name])
    assert getattr(params, name) != getattr(SamplingParams(), name)


@pytest.mark.parametrize(
    ("model", "own"), [(CompletionRequest, OF_COMPLETIONS), (ChatCompletionRequest, OF_CHAT)]
)
def test_each_field_of_a_request_is_read_by_somebody(model: type[BaseModel], own: set[str]) -> None:
    read = {*SAMPLING_FIELDS, *STRUCTURED_FIELDS, *BY_THE_SERVER, *own}
    assert read == model.model_fields.keys()
