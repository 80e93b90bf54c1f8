"""LLM without a server: prompts of every form, streams, conversations."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from fd_dsa import LLM, SamplingParams
from fd_dsa.chat.template import ChatTemplate
from fd_dsa.config import EngineConfig
from fd_dsa.engine.tokenizer import Tokenizer
from fd_dsa.errors import BackendUnavailable, ConfigError
from fd_dsa.offline import shared_engine
from tests.engine.fakes import byte_tokenizer, expected_greedy, make_engine
from tests.serve.processes import environment

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture
def llm():
    """An LLM over the fake engine; nothing may be left in it."""
    engine = make_engine()
    with LLM.from_engine(engine) as llm:
        yield llm
    assert not engine.has_unfinished_requests()
    assert engine.stats().num_used_blocks == 0


def tokens(outputs):
    """Tokens of each output."""
    return [output.token_ids for output in outputs]


def test_a_prompt_may_be_text_or_tokens_and_one_or_several(llm):
    ab, c = expected_greedy([2, 3], 6, eos=None), expected_greedy([4], 6, eos=None)
    assert tokens(llm.generate("ab", GREEDY)) == [ab]
    assert tokens(llm.generate(["ab", "c"], GREEDY)) == [ab, c]
    assert tokens(llm.generate([2, 3], GREEDY)) == [ab]
    assert tokens(llm.generate([[2, 3], [4]], GREEDY)) == [ab, c]
    assert llm.generate([], GREEDY) == []


def test_outputs_come_in_the_order_of_the_prompts(llm):
    params = [
        SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in range(12, 0, -1)
    ]
    outputs = llm.generate([[2]] * 12, params)
    assert [len(output.token_ids) for output in outputs] == list(range(12, 0, -1))
    assert all(output.finished for output in outputs)


def test_stream_yields_every_step_of_every_prompt(llm):
    text = {"0": "", "1": ""}
    last = {}
    for output in llm.generate(["ab", "c"], GREEDY, stream=True):
        index = output.request_id.split("-")[-1]
        text[index] += output.new_text
        last[index] = output
    assert last["0"].token_ids == expected_greedy([2, 3], 6, eos=None)
    assert last["1"].token_ids == expected_greedy([4], 6, eos=None)
    assert text == {index: output.text for index, output in last.items()}


def test_outputs_have_the_names_of_vllm(llm):
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, logprobs=0)
    by_text, by_ids = llm.generate(["ab", [4]], params)
    assert (by_text.prompt, by_text.prompt_token_ids) == ("ab", [2, 3])
    assert (by_ids.prompt, by_ids.prompt_token_ids) == (None, [4])
    for answer in (by_text, by_ids):
        (output,) = answer.outputs
        assert answer.finished and answer.request_id
        assert (output.index, output.text, output.token_ids) == (0, answer.text, answer.token_ids)
        assert (output.finish_reason, output.stop_reason) == ("length", None)
        total = sum(entry.score.logprob for entry in output.logprobs)
        assert output.cumulative_logprob == pytest.approx(total)
        assert output.cumulative_logprob < 0
    plain = llm.generate("ab", GREEDY)[0]
    assert (plain.logprobs, plain.cumulative_logprob) == (None, None)
    for streamed in llm.generate("ab", params, stream=True):
        assert streamed.outputs == [streamed]
        assert streamed.prompt == "ab"


def test_two_streams_may_be_read_in_turn_with_calls_between(llm):
    first = llm.generate("ab", GREEDY, stream=True)
    second = llm.generate("c", GREEDY, stream=True)
    next(first)
    next(second)
    assert tokens(llm.generate("d", GREEDY)) == [expected_greedy([5], 6, eos=None)]
    assert [*first][-1].token_ids == expected_greedy([2, 3], 6, eos=None)
    assert [*second][-1].token_ids == expected_greedy([4], 6, eos=None)


def test_calls_of_several_threads_share_the_steps(llm, monkeypatch):
    step, inside, num_inside = llm.engine.step, [], []

    def slow_step():
        inside.append(None)
        num_inside.append(len(inside))
        # other threads run meanwhile
        time.sleep(0.001)
        outputs = step()
        inside.pop()
        return outputs

    monkeypatch.setattr(llm.engine, "step", slow_step)
    long = dataclasses.replace(GREEDY, max_tokens=60)
    prompts = [[2 + i] for i in range(3)]
    with ThreadPoolExecutor(4) as pool:
        slowest = pool.submit(llm.generate, [[2]], long)
        calls = [pool.submit(llm.generate, [prompt], GREEDY) for prompt in prompts]
        found = [tokens(call.result(60)) for call in calls]
        # a thread that steps lets the others go on
        assert not slowest.done()
    assert found == [[expected_greedy(prompt, 6, eos=None)] for prompt in prompts]
    assert tokens(slowest.result()) == [expected_greedy([2], 60, eos=None)]
    assert set(num_inside) == {1}


@pytest.mark.parametrize("num_before", [0, 100], ids=["before", "after"])
def test_an_interrupted_step_ends_the_calls_of_all_threads(llm, monkeypatch, num_before):
    """The interrupt takes the outputs of the step away, also those of the other thread."""
    step = llm.engine.step

    def interrupted():
        # the other thread begins meanwhile
        time.sleep(0.001)
        if llm.stats().num_running + llm.stats().num_waiting < 2:
            return step()
        for _ in range(num_before):
            step()
        raise KeyboardInterrupt

    monkeypatch.setattr(llm.engine, "step", interrupted)
    long = dataclasses.replace(GREEDY, max_tokens=60)
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(llm.generate, [[2 + i]], long) for i in range(2)]
        errors = {type(call.exception(60)) for call in calls}
    assert errors == {KeyboardInterrupt, RuntimeError}
    monkeypatch.undo()
    assert tokens(llm.generate([[3]], GREEDY)) == [expected_greedy([3], 6, eos=None)]


def interrupted_at(llm, number):
    """Interrupt a call at the beginning of a function that shares steps.

    Python runs a signal's handler there. After the last beginning the result is None.
    """
    files = tuple(inspect.getfile(module) for module in (shared_engine, contextlib))
    calls, before = itertools.count(), sys.gettrace()

    def trace(frame, event, argument):
        code = frame.f_code
        # the end of a generator expression is a call too, whose errors are lost
        if code.co_filename in files and code.co_name != "<genexpr>" and next(calls) == number:
            # before 3.11 an error at the resumption of a generator would skip its `finally`
            return interrupt if sys.version_info < (3, 11) else interrupt()

    def interrupt(*_):
        raise KeyboardInterrupt

    sys.settrace(trace)
    try:
        llm.generate("ab", GREEDY)
    except KeyboardInterrupt as error:
        return error
    finally:
        sys.settrace(before)
    return None


def test_an_interrupt_leaves_the_engine_to_other_threads(llm):
    count, found = 0, []
    # a notebook keeps the error, too
    while (error := interrupted_at(llm, count)) is not None:
        assert not llm.engine.has_unfinished_requests(), error
        other = threading.Thread(target=lambda: found.extend(llm.generate([[3]], GREEDY)))
        other.daemon = True
        other.start()
        other.join(30)
        count += 1
        assert tokens(found) == count * [expected_greedy([3], 6, eos=None)], error
    assert count > 20


@pytest.mark.parametrize("place", ["add_request", "step"])
def test_an_interrupt_after_a_request_was_added_ends_it(llm, monkeypatch, place):
    method = getattr(llm.engine, place)

    def interrupted(*arguments):
        method(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(llm.engine, place, interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate("ab", GREEDY)
    assert not llm.engine.has_unfinished_requests()


def test_a_stream_that_is_closed_aborts_its_requests(llm):
    stream = llm.generate(["ab", "c"], GREEDY, stream=True)
    next(stream)
    assert llm.stats().num_running == 2
    stream.close()
    assert llm.stats().num_running == 0


@pytest.mark.parametrize("place", ["schedule", "complete_step", "step"])
def test_a_stream_that_is_closed_in_a_step_leaves_other_calls_alone(llm, monkeypatch, place):
    """The garbage collector may do so at any place of another call's step."""
    stream = llm.generate(["ab", "c"], GREEDY, stream=True)
    next(stream)
    owner = llm.engine if place == "step" else llm.engine.scheduler
    method = getattr(owner, place)

    def closing(*arguments):
        result = method(*arguments)
        stream.close()
        return result

    monkeypatch.setattr(owner, place, closing)
    assert tokens(llm.generate([[3]], GREEDY)) == [expected_greedy([3], 6, eos=None)]


def test_one_bad_prompt_refuses_the_call_before_anything_runs(llm):
    llm.tokenizer.chat_renderer = None
    with pytest.raises(ValueError, match="no chat template"):
        llm.chat([{"role": "user", "content": "ab"}])
    with pytest.raises(ValueError, match="max_model_len"):
        llm.generate([[2], [2] * 100], GREEDY)
    with pytest.raises(ValueError, match="2 entries for 1 prompts"):
        llm.generate("ab", [GREEDY, GREEDY])
    assert llm.stats().num_steps == 0


def test_a_failing_step_raises_and_leaves_nothing_behind(llm):
    runner = llm.engine.runner
    runner.fail_at = 0
    with pytest.raises(OSError, match="device is gone"):
        llm.generate(["ab", "c"], GREEDY)
    runner.fail_at = None
    assert tokens(llm.generate("ab", GREEDY)) == [expected_greedy([2, 3], 6, eos=None)]


def test_chat_uses_the_template_and_fills_the_context():
    source = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}L"
    plain = byte_tokenizer()
    engine = make_engine()
    engine.tokenizer = Tokenizer(
        plain.backend, plain.special_tokens, ChatTemplate(source, plain.special_tokens)
    )
    llm = LLM.from_engine(engine)
    messages = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]
    outputs = llm.chat(messages, SamplingParams(temperature=0, max_tokens=None, ignore_eos=True))
    assert outputs[0].prompt_token_ids == plain.encode("<bos>abcL")
    assert outputs[0].prompt == "<bos>abcL"
    assert len(outputs[0].token_ids) == 64 - 5
    several = llm.chat([messages, messages[:1]], GREEDY)
    assert [output.prompt_token_ids for output in several] == [
        plain.encode("<bos>abcL"),
        plain.encode("<bos>abL"),
    ]
    assert [*llm.chat(messages, GREEDY, stream=True)][-1].token_ids == several[0].token_ids


def test_markers_in_messages_of_a_chat_are_text_unless_allowed():
    plain = byte_tokenizer()
    engine = make_engine()
    source = "<bos>{{ messages[0].content }}"
    engine.tokenizer = Tokenizer(plain.backend, plain.special_tokens, ChatTemplate(source, {}))
    llm = LLM.from_engine(engine)
    (bos,) = plain.encode("<bos>", add_special_tokens=False)
    for allows in (False, True):
        (output,) = llm.chat(
            [{"role": "user", "content": "a<bos>b"}], GREEDY, allow_special_tokens_in_text=allows
        )
        assert output.prompt_token_ids.count(bos) == 1 + allows


def test_chat_hands_tools_and_variables_to_the_template():
    source = "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}{{ letters }}"
    source += "{% for m in messages %}{{ m.content }}{% endfor %}{{ 'L' * add_generation_prompt }}"
    plain = byte_tokenizer()
    engine = make_engine()
    engine.tokenizer = Tokenizer(plain.backend, plain.special_tokens, ChatTemplate(source, {}))
    llm = LLM.from_engine(engine)
    messages = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]

    def prompt(**kwargs):
        return llm.chat(messages, GREEDY, **kwargs)[0].prompt_token_ids

    tools = [{"type": "function", "function": {"name": "d"}}]
    assert prompt(tools=tools) == plain.encode("dabcL")
    assert prompt(chat_template_kwargs={"letters": "ee"}) == plain.encode("eeabcL")
    assert prompt(continue_final_message=True) == plain.encode("abc")
    with pytest.raises(ValueError, match="chat_template_kwargs: got 'tools'"):
        prompt(chat_template_kwargs={"tools": []})


def test_special_marks_of_the_parts_of_an_answer_stay_in_its_text(monkeypatch):
    backend = byte_tokenizer().backend
    call, end = "<｜tool▁calls▁begin｜>", "</think>"
    backend.add_special_tokens([call, end, "<other>"])
    ids = {text: backend.token_to_id(text) for text in (call, end)}
    source = f"{{{{ messages[0].content }}}}{{# {call} {end} #}}"
    engine = make_engine()
    engine.tokenizer = Tokenizer(backend, {}, ChatTemplate(source, {}))
    asked = []
    monkeypatch.setattr(engine, "validate", lambda _, params: asked.append(params))
    llm = LLM.from_engine(engine)
    messages = [{"role": "user", "content": "ab"}]
    given = SamplingParams(max_tokens=1, kept_special_token_ids=frozenset({7}))
    llm.chat(messages, given)
    llm.chat(messages, given, tools=[{"type": "function", "function": {"name": "d"}}])
    kept = [params.kept_special_token_ids for params in asked]
    assert kept == [{7, ids[end]}, {7, ids[end], ids[call]}]


def test_a_closed_llm_cannot_be_used():
    engine = make_engine()
    llm = LLM.from_engine(engine)
    stream = llm.generate("ab", GREEDY, stream=True)
    next(stream)
    llm.close()
    assert not engine.has_unfinished_requests()
    with pytest.raises(RuntimeError, match="closed"):
        llm.generate("ab")
    with pytest.raises(RuntimeError, match="closed"):
        next(stream)
    llm.close()


def test_signals_stay_the_callers():
    """With the real model: nothing of ours handles signals outside of the server."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with LLM(max_model_len=64, max_num_seqs=1) as llm:
        llm.generate([5, 6], GREEDY)
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_every_field_of_the_configuration_is_a_keyword():
    keywords = {name: one.default for name, one in inspect.signature(LLM).parameters.items()}
    assert keywords == {one.name: one.default for one in dataclasses.fields(EngineConfig)}


def test_errors_have_the_names_of_python(tmp_path):
    cases = {
        "max_model_len: got 9999, allowed: at most 8192": {"max_model_len": 9999},
        "max_num_seqs: got 0, allowed: an integer from 1 to 1048576": {"max_num_seqs": 0},
        "num_gpu_blocks_override: got 4 together with kv_cache_memory_bytes 64;": {
            "num_gpu_blocks_override": 4,
            "kv_cache_memory_bytes": 64,
        },
        f"model: got '{tmp_path}/none', allowed: a local folder": {"model": f"{tmp_path}/none"},
        # an ImportError, too
        "device: got 'gpu:9', allowed is 'gpu'; choose": {"device": "gpu:9"},
    }
    for text, keywords in cases.items():
        with pytest.raises((ConfigError, BackendUnavailable)) as caught:
            LLM(**keywords)
        assert str(caught.value).startswith(text)
    with pytest.raises(TypeError, match="max_model_length"):
        LLM(max_model_length=5)


def test_the_library_is_quiet_and_keeps_a_handler_of_sigterm(tmp_path):
    """With the real model: no line of a log, and Paddle's handler prints no C++ stack."""
    code = (
        "import os, signal, sys\n"
        "def handle(*_):\n    print('mine')\n    sys.exit(7)\n"
        "signal.signal(signal.SIGTERM, handle)\n"
        "from fd_dsa import LLM\n"
        "with LLM(max_model_len=64, max_num_seqs=1):\n    os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (7, "mine\n", "")
