"""Grammars whose workers are slow, late, or end: others go on, and no result changes."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from fd_dsa.engine.grammar import GrammarCompiler
from fd_dsa.engine.grammar_matcher import GrammarMatcher
from fd_dsa.engine.grammar_process import WORKERS, GrammarProcess, Pending
from fd_dsa.engine.output import ConstraintError, RequestOutput
from fd_dsa.engine.prompt_lookup import PromptLookup
from fd_dsa.engine.reasoning import Reasoning
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.engine.speculation import SpecDecoder
from fd_dsa.engine.structured_outputs import StructuredOutputsParams
from fd_dsa.grammars.messages import Done
from tests.engine.byte_model import EOS, TOKENIZER, VOCAB_SIZE, all_bytes_tokenizer, make_engine
from tests.engine.drafters import KnowingDrafter
from tests.engine.fakes import run_all
from tests.engine.test_async_scheduling import new_engine
from tests.engine.test_grammar import FORMS
from tests.proc import is_alive

FORM = StructuredOutputsParams(regex="[a-d]{3,10}(Z|[a-c]{5})")
# each row of the second one has 2,000 items for each x before; the mask says so after the y
AMBIGUOUS = "start: s\ns: s s | s s s | /[a-z ]/ |"
CASCADE = f'start: s\ns: t{" n" * 2000}\nt: "x" s | "y" u\nu: "!"\nn: | "z"'


@pytest.fixture
def lateness(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, float], list[int]]:
    """Function that makes a share of the answers late; returns a list that grows with each."""
    answer = GrammarProcess.answer

    def begin(seed: int, share: float) -> list[int]:
        rng, late = random.Random(seed), list[int]()

        def late_at_times(
            self: GrammarProcess, pending: Pending, needs_mask: bool, timeout_s: float | None
        ) -> Done | None:
            if rng.random() < share:
                late.append(1)
                return None
            return answer(self, pending, needs_mask, timeout_s)

        monkeypatch.setattr(GrammarProcess, "answer", late_at_times)
        return late

    return begin


THINK_END = TOKENIZER.encode("</think>", add_special_tokens=False)[0]
KINDS: list[dict[str, Any]] = [
    {"structured_outputs": FORMS["schema"], "logprobs": 1, "n": 2},
    {"structured_outputs": FORMS["lark"], "temperature": 0.0, "max_tokens": 7},
    {"structured_outputs": FORMS["lark"], "max_tokens": 2, "n": 3},
    {"structured_outputs": FORM, "stop": "cd", "min_tokens": 2, "n": 2},
    {"structured_outputs": FORM, "max_tokens": 8, "logprobs": 0, "n": 3},
    {"structured_outputs": FORM, "reasoning": Reasoning("", "</think>"),
     "logit_bias": {THINK_END: 5.0}},
    {"structured_outputs": FORM, "reasoning": Reasoning("<think>", "</think>"),
     "logit_bias": {THINK_END: 5.0}, "n": 3},
    {"structured_outputs": StructuredOutputsParams(regex="(ab[ab]){12}"), "temperature": 0.0},
    {"ignore_eos": True},
]  # fmt: skip


def outputs_of(spec_decoder: SpecDecoder | None = None) -> tuple[dict[Any, RequestOutput], Any]:
    """Last state of every output, in an engine so small that requests are preempted."""
    engine = make_engine(num_blocks=22, max_num_seqs=5, budget=13, spec_decoder=spec_decoder)
    for number, kind in enumerate(KINDS):
        params = SamplingParams(**{"max_tokens": 50, "seed": number, **kind})
        engine.add_request(str(number), [5, 6, 7, 8, 20 + number, 5, 6], params)
    texts: dict[Any, str] = {}
    found = {}
    for name, outputs in run_all(engine).items():
        for output in outputs:
            key = name, output.index
            texts[key] = texts.get(key, "") + output.new_text
            found[key] = output
    assert texts == {key: output.text for key, output in found.items()}
    assert engine.stats().num_used_blocks == 0
    return found, engine.stats()


@pytest.fixture(scope="module")
def in_time() -> dict[Any, RequestOutput]:
    """Outputs whose masks come in time."""
    found, stats = outputs_of()
    assert stats.num_preemptions
    assert {output.finish_reason for output in found.values()} == {"stop", "length"}
    return found


@pytest.mark.parametrize("drafts", ["none", "lookup", "layer"])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_late_masks_change_no_output(
    in_time: dict[Any, RequestOutput], lateness: Any, share: float, drafts: str
) -> None:
    late = lateness(0, share)
    answers = {key: output.token_ids for key, output in in_time.items()}
    drafter = {
        "none": None,
        "lookup": PromptLookup(3, 1),
        "layer": KnowingDrafter(answers, 0.8, VOCAB_SIZE, is_layer=True),
    }[drafts]
    found, _ = outputs_of(drafter and SpecDecoder(drafter, 2))
    assert len(late) > 20 and found.keys() == in_time.keys()
    for key, output in found.items():
        for field in ("token_ids", "text", "finish_reason", "stop_reason", "logprobs"):
            assert getattr(output, field) == getattr(in_time[key], field), (key, field)


@pytest.mark.parametrize("share", [0.1, 0.7])
def test_late_masks_change_nothing_in_an_engine_without_room(lateness: Any, share: float) -> None:
    """An output of 50 tokens needs all blocks, and a step has fewer tokens than rows."""
    found = []
    for is_late in (False, True):
        late = lateness(2, share if is_late else 0.0)
        engine = make_engine(num_blocks=13, max_num_seqs=3, budget=2)
        for number, name in enumerate(("schema", "lark", "object")):
            params = SamplingParams(
                max_tokens=50, n=2, seed=20 + number, structured_outputs=FORMS[name]
            )
            engine.add_request(name, [5, 6, 7], params)
        ends = [
            one for outputs in run_all(engine, 20_000).values() for one in outputs if one.finished
        ]
        found.append({(e.request_id, e.index): (e.token_ids, e.finish_reason) for e in ends})
    assert late and found[0] == found[1]
    assert max(len(token_ids) for token_ids, _ in found[0].values()) == 50


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_late_masks_change_no_output_of_a_device(lateness: Any, share: float) -> None:
    """Steps are queued before the tokens of the one before; a late row is computed again."""
    form = StructuredOutputsParams(regex="[a-d]{8}")
    params = SamplingParams(temperature=0, structured_outputs=form)
    plain = SamplingParams(temperature=0, ignore_eos=True, max_tokens=30)
    # one output ends with the last token that it may have
    requests = {
        "plain": plain,
        **{str(i): replace(params, max_tokens=6 + i) for i in range(5)},
    }
    found = []
    for is_late in (False, True):
        late = lateness(1, share if is_late else 0.0)
        engine, _ = new_engine(rows=4)
        for name, one in requests.items():
            engine.add_request(name, [5, 6, ord(name[0]) % 40], one)
        results = run_all(engine)
        found.append({name: (r[-1].token_ids, r[-1].finish_reason) for name, r in results.items()})
        assert engine.stats().num_used_blocks == 0
    assert late and found[0] == found[1]
    assert {reason for _, reason in found[0].values()} == {"stop", "length"}


def x_first(grammar: str, seed: int, num_tokens: int = 300) -> SamplingParams:
    """Two outputs with a grammar, of a model that loves x."""
    x = TOKENIZER.encode("x", add_special_tokens=False)[0]
    return SamplingParams(
        max_tokens=num_tokens,
        n=2,
        seed=seed,
        logit_bias={x: 5.0},
        structured_outputs=StructuredOutputsParams(grammar=grammar),
    )


def test_an_ambiguous_grammar_delays_no_other_request() -> None:
    """Alone, masks of these grammars take from seconds to hours."""
    engine = make_engine(num_blocks=2048, max_num_seqs=12, budget=64)
    stream = SamplingParams(max_tokens=500, min_tokens=500, ignore_eos=True)
    engine.add_request("stream", [5], stream)
    engine.step()
    begin = time.monotonic()
    for number in range(2):
        engine.add_request(f"a{number}", [5, 6], x_first(AMBIGUOUS + " " * number, number))
        engine.add_request(f"c{number}", [5, 6], x_first(CASCADE + " " * number, number))
    ends: dict[str, list[Any]] = {}
    while engine.has_unfinished_requests():
        outputs = engine.step()
        names = {output.request_id for output in outputs}
        # the stream takes part in each step
        assert not names or "stream" in names or "stream" in ends
        for output in outputs:
            if output.finished:
                ends.setdefault(output.request_id, []).append(output)
        if "stream" in ends:
            break
    assert len(ends["stream"][0].token_ids) == 500
    # far from the time that a single mask takes
    assert time.monotonic() - begin < 20
    engine.abort_all()


def test_a_grammar_that_takes_too_long_fails_its_outputs_only() -> None:
    engine = make_engine(max_num_seqs=4, budget=64)
    good = SamplingParams(max_tokens=60, structured_outputs=StructuredOutputsParams(regex="x{60}"))
    engine.add_request("good", [5], good)
    engine.add_request("bad", [5, 6], x_first(CASCADE, 1))
    results = run_all(engine)
    assert results["good"][-1].text == "x" * 60
    ends = [output for output in results["bad"] if output.finished]
    assert len(ends) == 2
    for output in ends:
        assert output.finish_reason == "error" and isinstance(output.error, ConstraintError)
    error = str(ends[0].error)
    # a fast core reaches the parser's limit of items before the limit of time
    limits = "its next token takes more than 0.5 s of processor time", "Too many items (limit 50000"
    assert any(limit in error for limit in limits)
    assert error.endswith("; so structured_outputs cannot be followed")


def test_a_worker_that_is_killed_ends_its_outputs_and_is_replaced() -> None:
    engine = make_engine()
    params = SamplingParams(max_tokens=80, structured_outputs=FORM, seed=1)
    long = replace(params, structured_outputs=StructuredOutputsParams(regex="[a-z]{80}"))
    engine.add_request("killed", [5], long)
    engine.add_request("other", [5], params)
    for _ in range(3):
        engine.step()
    os.kill(engine.grammars.find(long).process.pid, signal.SIGKILL)
    results = run_all(engine)
    assert isinstance(results["killed"][-1].error, ConstraintError)
    assert results["other"][-1].finish_reason == "stop"
    engine.add_request("again", [5], long)
    assert len(run_all(engine)["again"][-1].text) == 80


def test_the_worker_of_a_late_output_ends_with_its_grammar(
    lateness: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fd_dsa.engine.grammar.KEPT_FOR_S", 0.2)
    late = lateness(0, 0.3)
    engine = make_engine()
    engine.add_request("stream", [5], SamplingParams(max_tokens=200, ignore_eos=True))
    params = SamplingParams(max_tokens=30, structured_outputs=FORM, seed=1)
    engine.add_request("r", [5], params)
    engine.step()
    pid = engine.grammars.find(params).process.pid
    run_all(engine)
    end = time.monotonic() + 30
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < end:
        time.sleep(0.02)
    assert late and not os.path.exists(f"/proc/{pid}")


def test_a_grammar_that_takes_long_to_compile_is_refused() -> None:
    """Its automaton has a million states; llguidance would take 20 s and 400 MB."""
    form = StructuredOutputsParams(json={"type": "integer", "multipleOf": 999_983})
    begin = time.process_time()
    with pytest.raises(ValueError, match=r"too complex: it takes more than 0\.5 s of processor"):
        make_engine().validate([5], SamplingParams(structured_outputs=form))
    # another process has worked
    assert time.process_time() - begin < 0.4


def test_many_grammars_together_delay_others_by_one_budget() -> None:
    """Their workers are stopped, as if each took forever; each has 0.05 s, all have 0.1 s."""
    engine = make_engine(num_blocks=2048, max_num_seqs=31, budget=64)
    engine.add_request("stream", [5], SamplingParams(max_tokens=60, ignore_eos=True))
    for number in range(30):
        form = StructuredOutputsParams(regex=f"[a-z]{{{60 + number}}}")
        params = SamplingParams(max_tokens=50, seed=number, structured_outputs=form)
        engine.validate([5, 6], params)
        os.kill(engine.grammars.find(params).process.pid, signal.SIGSTOP)
        engine.add_request(str(number), [5, 6], params)
    times = [time.monotonic()]
    is_running = True
    while is_running:
        for output in engine.step():
            if output.request_id == "stream":
                times.append(time.monotonic())
                is_running = not output.finished
    # 1.5 s if the budgets of the grammars added up
    assert max(end - begin for begin, end in pairwise(times)) < 0.5
    engine.abort_all()


def test_a_grammar_is_compiled_after_the_forking_process_was_killed() -> None:
    engine = make_engine()
    params = SamplingParams(max_tokens=80, structured_outputs=FORM, seed=1)
    engine.add_request("before", [5], params)
    engine.step()
    process = WORKERS.process
    assert process is not None
    process.join(0.0)
    other = StructuredOutputsParams(regex="[k-m]{20}")
    engine.add_request("after", [5], replace(params, structured_outputs=other))
    results = run_all(engine)
    assert results["before"][-1].finish_reason == "stop"
    assert len(results["after"][-1].text) == 20


def test_a_grammar_without_descriptors_left_is_refused() -> None:
    engine, limits = make_engine(), resource.getrlimit(resource.RLIMIT_NOFILE)
    params = SamplingParams(structured_outputs=StructuredOutputsParams(regex="[p-q]{7}"))
    engine.grammars.prepare()
    engine.add_request("r", [5], params)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        outputs = run_all(engine)["r"]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert "no process can be started for it" in str(outputs[-1].error)


def test_the_kernel_ends_workers_with_the_engine() -> None:
    """A stopped worker cannot end itself, nor can one that computes."""
    code = (
        "from tests.engine.test_late_grammars import *\n"
        "compiled = make_engine().grammars.find(SamplingParams(structured_outputs=FORM))\n"
        "os.kill(compiled.process.pid, signal.SIGSTOP)\n"
        "print(compiled.process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as engine:
        assert engine.stdout is not None
        pid = int(engine.stdout.readline())
        engine.kill()
    end = time.monotonic() + 10
    while is_alive(pid) and time.monotonic() < end:
        time.sleep(0.01)
    has_ended = not is_alive(pid)
    if not has_ended:
        os.kill(pid, signal.SIGKILL)
    assert has_ended


@pytest.mark.slow
def test_memory_of_a_worker_grows_with_its_tokens() -> None:
    """Outputs of 180,000 tokens together take more than the memory of a short grammar."""
    tokenizer = all_bytes_tokenizer("=" * 10)
    (token_id,) = tokenizer.encode("=" * 10, add_special_tokens=False)
    compiler = GrammarCompiler(tokenizer, VOCAB_SIZE, [EOS])
    form = StructuredOutputsParams(grammar="start: /./*")
    params = SamplingParams(structured_outputs=form)
    for matcher in [GrammarMatcher(compiler, params) for _ in range(30)]:
        for _ in range(6000):
            matcher.offer(token_id)
        assert matcher.error is None
