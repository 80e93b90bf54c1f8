"""Wrong arguments of LLM, SamplingParams and StructuredOutputsParams: what their errors say."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from fd_dsa import LLM, SamplingParams, StructuredOutputsParams
from fd_dsa.engine.argument_hints import CALL_HINTS, FORM_HINTS, LLM_HINTS, SAMPLING_HINTS
from fd_dsa.engine.arguments import explain_calls
from fd_dsa.errors import ArgumentError, ConfigError
from tests.engine.fakes import make_engine

HI = {"role": "user", "content": "ab"}
GREEDY = SamplingParams(temperature=0, max_tokens=2)
LONGEST = SamplingParams(temperature=0, max_tokens=None, min_tokens=61)
UNCLOSED = StructuredOutputsParams(regex="(")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def llm():
    """An LLM over the fake engine."""
    with LLM.from_engine(make_engine(chats=True)) as made:
        yield made


def refusal(call, *args, **kwargs) -> str:
    """The message of an ArgumentError, which is a TypeError and a ValueError too."""
    with pytest.raises(ArgumentError) as caught:
        call(*args, **kwargs)
    assert isinstance(caught.value, TypeError) and isinstance(caught.value, ValueError)
    return str(caught.value)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"max_tokenz": 5}, "max_tokenz: got 5; must be an argument of SamplingParams; write max_"),
        ({"temp": 0}, "temp: got 0; must be an argument of SamplingParams; write temperature"),
        ({"Top_K": 1}, "Top_K: got 1; must be an argument of SamplingParams; write top_k"),
        ({"best_of": 2}, "write n, all sampled outputs are returned"),
        ({"guided_decoding": {}}, "write structured_outputs=StructuredOutputsParams(json=SCHEMA)"),
        ({"max_new_tokens": 5}, "write max_tokens"),
        ({"use_beam_search": True}, "there is no beam search"),
        ({"zzz": 5}, "the names are n, temperature, top_p"),
        ({"max_tokens": "5"}, "max_tokens: got '5'; must be an integer >= 1"),
        ({"n": [1]}, "n: got [1]; must be an integer in [1, 128]"),
        ({"temperature": None}, "temperature: got None; must be a finite number >= 0"),
        ({"ignore_eos": 1}, "ignore_eos: got 1; must be True or False"),
        ({"kept_special_token_ids": 5}, "kept_special_token_ids: got 5; must be a frozenset"),
        ({"logit_bias": {5: 200}}, "got 200; must be a number in [-100, 100] for token 5"),
        ({"structured_outputs": {"json": {}}}, "must be a StructuredOutputsParams; write"),
        ({"stop": "x" * 10**6}, "stop: got an entry of 1000000 characters; must be at most 512"),
    ],
)
def test_sampling_params_name_the_argument(given, expected):
    message = refusal(SamplingParams, **given)
    assert expected in message
    assert len(message) < 700


def test_a_method_of_the_class_asks_for_an_instance():
    assert "self: got 'Hi'; must be an instance of LLM; call" in refusal(LLM.chat, "Hi")


def test_numbers_of_numpy_are_told_apart():
    assert "write VALUE.item()" in refusal(SamplingParams, seed=np.int64(1))
    assert "write VALUE.item()" in refusal(SamplingParams, stop_token_ids=[np.int64(1)])
    assert SamplingParams(temperature=np.float64(0.5)).temperature == 0.5


def test_min_tokens_may_fill_the_context():
    with LLM.from_engine(make_engine()) as llm:
        assert len(llm.generate([2] * 3, LONGEST)[0].token_ids) == 61


def test_a_set_of_kept_tokens_serves_as_a_frozenset():
    with LLM.from_engine(make_engine()) as llm:
        texts = [
            llm.generate("ab", replace(GREEDY, kept_special_token_ids=kept))[0].text
            for kept in (set(), {7}, frozenset({7}))
        ]
    assert len(set(texts)) == 1


def test_replace_and_positions_are_checked_too():
    assert "write max_tokens" in refusal(replace, GREEDY, max_tokenz=5)
    assert refusal(SamplingParams, {"temperature": 0}).startswith("n: got {'temperature': 0};")
    assert "n: got two values" in refusal(SamplingParams, 1, n=2)
    assert SamplingParams(2, 0.5) == SamplingParams(n=2, temperature=0.5)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"schema": {}}, "schema: got {}; must be an argument of StructuredOutputsParams; write j"),
        ({"jsn": {}}, "write json"),
        ({"json_object": 1}, "json_object: got 1; must be True or False"),
        ({"regex": "a", "alternative": "b"}, "alternative: got 'b'; must be a StructuredOutputsP"),
    ],
)
def test_structured_outputs_name_the_argument(given, expected):
    assert expected in refusal(StructuredOutputsParams, **given)


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        ((5,), {}, "prompts: got 5; must be a text, token ids, or a list of either"),
        ((None,), {}, "prompts: got None;"),
        ((b"ab",), {}, "prompts: got b'ab';"),
        ((np.array(5),), {}, "prompts: got array(5); must be a text, token ids, or a list"),
        (({"prompt": "ab"},), {}, "prompts: got {'prompt': 'ab'};"),
        (({"ab"},), {}, "prompts: got {'ab'};"),
        (([{"prompt": "ab"}],), {}, "prompts[0]: got {'prompt': 'ab'}; must be a text or a list"),
        (([HI],), {}, "chat takes messages"),
        ((["ab", 5],), {}, "prompts[1]: got 5; must be a text or a list of token ids"),
        (([2, "ab"],), {}, "prompts[1]: got 'ab'; must be a token id, an integer"),
        (([[2, 2.5]],), {}, "prompts[0][1]: got 2.5; must be a token id"),
        (([[[2]]],), {}, "prompts[0][0]: got [2]; must be a token id"),
        (([True],), {}, "prompts[0]: got True; must be a text or a list of token ids"),
        ((["ab", []],), {}, "prompts[1]: the prompt has no tokens"),
        ((["ab", [2] * 100],), {}, "prompts[1]: the prompt has 100 tokens, max_model_len is 64"),
        (([2, 99],), {}, "prompts: token 1 of the prompt is 99"),
        (([2] * 4, LONGEST), {}, "min_tokens is 61; the prompt has 4 tokens and max_model_len is"),
        (("ab", 5), {}, "sampling_params: got 5; must be a SamplingParams, or a list with one"),
        (("ab", {"n": 2}), {}, "must be a SamplingParams, or a list with one for each prompt; wri"),
        (("ab", [5]), {}, "sampling_params[0]: got 5; must be a SamplingParams"),
        (("ab", [GREEDY] * 2), {}, "sampling_params: got 2 entries for 1 prompts;"),
        (("ab", SamplingParams(logit_bias={99: 1})), {}, "logit_bias has the token id 99; token"),
        (("ab", SamplingParams(stop_token_ids=[99])), {}, "stop_token_ids has the token id 99;"),
        (("ab", SamplingParams(structured_outputs=UNCLOSED)), {}, "structured_outputs cannot be"),
        (("ab", GREEDY, 1), {}, "stream: got 1; must be True or False"),
        (("ab", GREEDY, False, 4), {}, "argument 4: got 4; must be given by its name, since LLM."),
        ((), {}, "prompts: got nothing; must be an argument of LLM.generate; write prompts=VALUE"),
        (("ab",), {"prompts": "c"}, "prompts: got two values, one without a name"),
        (("ab",), {"temperature": 0}, "write sampling_params=SamplingParams(temperature=...)"),
        (("ab",), {"temperature_": 0}, "write sampling_params=SamplingParams(temperature=...)"),
        (("ab",), {"sampling_param": GREEDY}, "write sampling_params"),
        (("ab",), {"use_tqdm": False}, "must be an argument of LLM.generate; leave it out"),
        ((), {"prompt_token_ids": [[2]]}, "give the token ids as prompts"),
    ],
)
def test_generate_names_the_argument(llm, args, kwargs, expected):
    message = refusal(llm.generate, *args, **kwargs)
    assert expected in message
    assert llm.stats().num_steps == 0


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ("Hi", "messages: got 'Hi'; must be a list of messages, or a list of such lists; write [{"),
        (HI, "must be a list of messages, or a list of such lists; write [MESSAGE]"),
        (5, "messages: got 5; must be a list of messages"),
        (["Hi"], 'messages[0]: got \'Hi\'; must be a message; write {"role": "user"'),
        ([HI, "Hi"], "messages[1]: got 'Hi'; must be a message"),
        ([HI, [HI]], "messages[1]: got [{'content': 'ab', 'role': 'user'}]; must be a message"),
        ([[HI], HI], "messages[0]: got [{'content': 'ab', 'role': 'user'}]; must be a message"),
        ([[HI], [[HI]]], "messages[1][0]: got [{'content': 'ab', 'role': 'user'}]; must be a mes"),
        ([[HI], 5], "messages[1]: got 5; must be a list of messages"),
        ([[HI], []], "messages[1]: got []; must be a list with a message"),
        ([{"content": "ab"}], "messages[0]: got {'content': 'ab'}; must be a message with the ke"),
        ([{"rol": "user", "content": "ab"}], "must be a message with the key role; write role for"),
        ([{"role": "user"}], "messages[0]: got {'role': 'user'}; must be a message with the key c"),
        ([{"role": 5, "content": "ab"}], "messages[0].role: got 5; must be one of system, dev"),
        ([{"role": "usr", "content": "ab"}], "user, assistant, tool; write user"),
        ([{"role": "user", "content": 5}], "messages[0].content: got 5; must be a text or a list"),
        ([{"role": "user", "content": None}], "messages[0].content: got None;"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}],
            "messages[0].content[0]: got {",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"name": "f"}]}],
            "messages[0].tool_calls[0]: got {'name': 'f'}; must be a call of a function",
        ),
    ],
)
def test_chat_names_the_message(llm, messages, expected):
    assert expected in refusal(llm.chat, messages, GREEDY)


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"tools": {"type": "function"}}, "tools: got {'type': 'function'}; must be a list of too"),
        ({"tools": [{"name": "f"}]}, "tools[0]: got {'name': 'f'}; must be a function with a name"),
        ({"tools": "f"}, "tools: got 'f'; must be a list of tools"),
        ({"chat_template_kwargs": ["a"]}, "chat_template_kwargs: got ['a']; must be a dict"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs: got 'tools'; must be a v"),
        ({"constrain_reasoning": None}, "constrain_reasoning: got None; must be True or False"),
        ({"add_generation_prompt": True}, "write continue_final_message"),
        ({"enable_thinking": True}, 'write chat_template_kwargs={"thinking": True}'),
        ({"chat_template": "x"}, "write LLM(chat_template=FILE)"),
        ({"max_tokens": 5}, "write sampling_params=SamplingParams(max_tokens=...)"),
        ({"tool": []}, "tool: got []; must be an argument of LLM.chat; write tools"),
    ],
)
def test_chat_names_the_argument(llm, kwargs, expected):
    assert expected in refusal(llm.chat, [HI], **kwargs)


def test_every_form_of_prompts_and_messages_still_runs(llm):
    expected = llm.generate([[2, 3]], GREEDY)[0].token_ids
    for prompts in ("ab", [2, 3], (2, 3), np.array([2, 3]), np.array([[2, 3]]), iter(["ab"])):
        assert llm.generate(prompts, GREEDY)[0].token_ids == expected
    assert llm.generate(["ab", [2, 3]], (GREEDY, GREEDY))[1].token_ids == expected
    assert llm.generate([], GREEDY) == llm.chat([], GREEDY) == []
    assert llm.chat(([HI], (HI,)), GREEDY)[1].token_ids == expected


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        (
            {"max_model_length": 5},
            "max_model_length: got 5; must be an argument of LLM; write max",
        ),
        ({"temperature": 0}, "give SamplingParams(temperature=...) to generate or chat"),
        ({"trust_remote_code": True}, "leave it out, no Python file of a folder is run"),
        ({"tp": 2}, "write tensor_parallel_size"),
        ({"quantization": "fp8"}, "leave it out, the model folder says it"),
    ],
)
def test_llm_names_the_argument(kwargs, expected):
    assert expected in refusal(LLM, **kwargs)
    assert "argument 2: got 'b'; must be given by its name" in refusal(LLM, "a", "b")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("model", value) for value in (5, b"a", ["a"], "~nobody-has-this-name/a")),
        *(("tokenizer", value) for value in (5, {})),
        *(("chat_template", value) for value in (0, ["a"], b"a")),
        *(("served_model_name", value) for value in (5, [5], {"a": 1})),
        *(("kv_cache_dtype", value) for value in ([], 5, "fp4")),
        *(("cudagraph_capture_sizes", value) for value in (5, 2.5, "4", ["4"])),
        *(("kv_cache_memory_bytes", value) for value in (2.5, [1], "many")),
        *(("speculative_config", value) for value in (5, [5], {"method": "x"}, "x")),
        *(("dtype", value) for value in ("float16", [], 5)),
        *(("max_model_len", value) for value in ("4096", True, 0, 1.5)),
        *(("gpu_memory_utilization", value) for value in (0, 90, "0.9", None)),
        *(("tensor_parallel_size", value) for value in (0, "2", 9, None)),
        *(("device", value) for value in (5, "cuda", None)),
        *(("enforce_eager", value) for value in (1, None)),
    ],
)
def test_values_of_llm_are_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=name) as caught:
        LLM(**{name: value})
    assert not str(caught.value).startswith("--")


def test_hints_name_what_exists():
    """No hint hides an argument, and the arguments that hints name exist."""
    for call, hints in (
        (LLM, LLM_HINTS),
        (LLM.generate, CALL_HINTS),
        (LLM.chat, CALL_HINTS),
        (SamplingParams, SAMPLING_HINTS),
        (StructuredOutputsParams, FORM_HINTS),
    ):
        names = set(inspect.signature(call).parameters)
        assert not names & hints.keys()
    calls = set(inspect.signature(LLM.chat).parameters)
    for hints, names in (
        (LLM_HINTS, set(inspect.signature(LLM).parameters) | {"SamplingParams"}),
        (SAMPLING_HINTS, {one.name for one in fields(SamplingParams)} | {"stream"}),
        (FORM_HINTS, {one.name for one in fields(StructuredOutputsParams)} | {'"additional'}),
        (CALL_HINTS, calls | {"structured_outputs", "LLM", "a"}),
    ):
        for hint in hints.values():
            if hint.startswith("write "):
                word = hint.removeprefix("write ").replace("=", " ").replace("(", " ").split()[0]
                word = word.rstrip(",;")
                assert any(word == name or word.startswith('"addit') for name in names), hint


def test_an_error_inside_of_a_call_stays_as_it_is():
    @explain_calls({})
    def fails(number):
        return "a" + number

    with pytest.raises(TypeError) as caught:
        fails(1)
    assert not isinstance(caught.value, ArgumentError)


@pytest.mark.slow
def test_type_checkers_see_the_signatures(tmp_path):
    """mypy refuses wrong names and finds the types of results through the decorators."""
    (tmp_path / "use.py").write_text(
        "from fd_dsa.offline.llm import LLM\n"
        "from fd_dsa.engine.sampling_params import SamplingParams\n"
        "llm = LLM(max_num_seqs=4)\n"
        "reveal_type(llm.generate('a')[0].outputs[0].text)\n"
        "reveal_type(llm.chat([{'role': 'user', 'content': 'a'}])[0].text)\n"
        "reveal_type(next(llm.chat([{'role': 'user', 'content': 'a'}], stream=True)).text)\n"
        "LLM(max_model_length=4)\n"
        "llm.generate(5)\n"
        "SamplingParams(max_tokenz=5)\n"
    )
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
    done = subprocess.run(
        [*command, str(tmp_path / "use.py")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.count('"builtins.str"') + done.stdout.count('is "str"') == 3, done.stdout
    for line, error in ((7, "call-arg"), (8, "call-overload"), (9, "call-arg")):
        assert any(f"use.py:{line}:" in one and error in one for one in done.stdout.splitlines())
