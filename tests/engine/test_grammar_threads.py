"""Compilation of grammars, never in the thread that steps the engine."""

from __future__ import annotations

import re
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

from fd_dsa.engine.grammar import GrammarCompiler
from fd_dsa.engine.grammar_matcher import GrammarMatcher
from fd_dsa.engine.grammar_process import WORKERS
from fd_dsa.engine.output import ConstraintError
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.engine.structured_outputs import StructuredOutputsParams
from tests.engine.byte_model import EOS, TOKENIZER, VOCAB_SIZE, make_engine
from tests.engine.fakes import run_all
from tests.engine.test_grammar import FORMS, has_form, params


def record_compilers(monkeypatch):
    """The threads that have compiled a grammar, one entry each time."""
    threads = []
    compile_once = WORKERS.compile

    def recorded(*given):
        threads.append(threading.get_ident())
        return compile_once(*given)

    monkeypatch.setattr(WORKERS, "compile", recorded)
    return threads


def compiler_with_a_follower(monkeypatch):
    """The threads that compile, a compiler, and an output that follows its regular expression."""
    threads = record_compilers(monkeypatch)
    compiler = GrammarCompiler(TOKENIZER, VOCAB_SIZE, [EOS])
    matcher = GrammarMatcher(compiler, params(FORMS["regex"]))
    assert not matcher.is_finished
    return threads, compiler, matcher


def test_grammars_that_were_dropped_are_compiled_beside_the_steps(monkeypatch):
    """24 requests over 12 grammars, of which 8 are kept, and a stream that never waits."""
    monkeypatch.setattr("fd_dsa.engine.grammar.MAX_KEPT", 8)
    threads = record_compilers(monkeypatch)
    engine = make_engine(num_blocks=2048, max_num_seqs=6)
    forms = [StructuredOutputsParams(regex=f"[a-c]{{{2 + i % 7}}}-{i}") for i in range(12)]
    requests = {str(i): params(forms[i % 12], seed=i, max_tokens=30) for i in range(24)}
    with ThreadPoolExecutor(3) as pool:
        # as a server's threads check them
        assert list(pool.map(lambda one: engine.validate([5, 6], one), requests.values()))
    num_checked = len(threads)
    endless = SamplingParams(max_tokens=500, min_tokens=500, ignore_eos=True)
    engine.add_request("stream", [5], endless)
    engine.step()
    for name, one in requests.items():
        engine.add_request(name, [5, 6], one)
    texts = {}
    while requests.keys() - texts.keys():
        outputs = {output.request_id: output for output in engine.step()}
        # running requests go on while another one's grammar is compiled
        assert "stream" in outputs or "stream" in texts
        texts.update((name, out.text) for name, out in outputs.items() if out.finished)
    assert len(threads) > num_checked
    assert threading.get_ident() not in threads
    for name, one in requests.items():
        assert re.fullmatch(one.structured_outputs.regex, texts[name]), name


def test_requests_are_served_in_order_also_where_one_waits_for_its_grammar(monkeypatch):
    """With nothing else to run a step waits, rather than fail or turn round."""
    threads = record_compilers(monkeypatch)
    engine = make_engine(max_num_seqs=1)
    engine.add_request("form", [5, 6], params(FORMS["regex"], max_tokens=3))
    engine.add_request("plain", [5, 6], SamplingParams(max_tokens=3, ignore_eos=True))
    assert [output.request_id for output in engine.step()] == ["form"]
    assert len(threads) == 1 and threading.get_ident() not in threads
    ends = {name: outputs[-1].finish_time for name, outputs in run_all(engine).items()}
    assert ends["form"] < ends["plain"]


def test_a_form_that_was_never_checked_fails_its_request_alone():
    engine = make_engine()
    wrong = StructuredOutputsParams(regex="(", source="guided_regex")
    engine.add_request("plain", [5, 6], SamplingParams(max_tokens=9, ignore_eos=True))
    engine.add_request("wrong", [5, 6], params(wrong, n=2))
    results = run_all(engine)
    assert len(results["plain"][-1].token_ids) == 9
    for output in results["wrong"]:
        assert output.finish_reason == "error" and isinstance(output.error, ConstraintError)
        assert "guided_regex cannot be used" in str(output.error)


def test_a_grammar_that_outputs_follow_is_not_compiled_again(monkeypatch):
    monkeypatch.setattr("fd_dsa.engine.grammar.MAX_KEPT", 1)
    threads, compiler, matcher = compiler_with_a_follower(monkeypatch)
    compiler.check(params(FORMS["choice"]))
    compiler.check(params(FORMS["regex"]))
    # and a poll gives the other thread nothing to do
    assert compiler.poll(params(FORMS["regex"])) is not None and not compiler.wait()
    assert len(threads) == 2
    del matcher
    compiler.check(params(FORMS["choice"]))
    assert len(threads) == 3


def test_a_grammar_that_nobody_asks_for_is_dropped(monkeypatch):
    monkeypatch.setattr("fd_dsa.engine.grammar.KEPT_FOR_S", 0.2)
    threads, compiler, followed = compiler_with_a_follower(monkeypatch)
    dropped = weakref.ref(compiler.find(params(FORMS["choice"])))
    kept = weakref.ref(compiler.find(params(FORMS["regex"])))
    # twice, as what is kept after the first look needs another one
    for _ in range(2):
        end = time.monotonic() + 30
        while dropped() is not None and time.monotonic() < end:
            time.sleep(0.02)
        assert dropped() is None and kept() is not None
        dropped = weakref.ref(compiler.find(params(FORMS["choice"])))
    compiler.check(params(FORMS["regex"]))
    assert len(threads) == 4
    assert not followed.is_finished


def test_a_request_that_leaves_does_not_hold_up_the_next_ones_grammar(monkeypatch):
    threads = record_compilers(monkeypatch)
    engine = make_engine()
    engine.add_request("plain", [5, 6], SamplingParams(max_tokens=400, ignore_eos=True))
    engine.step()
    for i in range(20):
        engine.add_request(str(i), [5, 6], params(StructuredOutputsParams(regex=f"x{{{i + 1}}}")))
        engine.step()
        engine.abort_request(str(i))
    engine.add_request("last", [5, 6], params(FORMS["choice"]))
    (output,) = [out for out in run_all(engine)["last"] if out.finished]
    assert has_form("choice", output.text)
    assert threading.get_ident() not in threads
