"""Tokens as grammars see them: the bytes that they add to the text of an answer."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from fd_dsa.engine import grammar
from fd_dsa.engine.detokenizer import new_detokenizer
from fd_dsa.engine.grammar import GrammarCompiler
from fd_dsa.engine.grammar_process import WorkerSource
from fd_dsa.engine.reasoning import AnswerStart, Reasoning
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.engine.structured_outputs import StructuredOutputsParams
from fd_dsa.engine.tokenizer import Tokenizer
from tests.engine import tokenizer_kinds
from tests.engine.byte_model import EOS, TOKENIZER
from tests.engine.grammar_walks import Walks
from tests.engine.published import demo_with

pytest.importorskip("llguidance", reason="the extra [structured] is not installed")

ANY_TEXT = StructuredOutputsParams(regex="(?s:.*)")


def test_tokens_with_the_same_bytes_may_both_come() -> None:
    tokenizer = demo_with((), (" the",))
    walks = Walks(tokenizer)
    (added,) = tokenizer.encode(" the", add_special_tokens=False)
    same = [i for i in range(walks.size) if tokenizer.piece_bytes(i) == b" the"]
    assert added in same and len(same) > 1
    allowed = walks.allowed(walks.begin(StructuredOutputsParams(choice=["x", " the"])))
    assert set(same) <= set(allowed.tolist())


def test_what_a_text_leaves_out_never_comes() -> None:
    """A special token shows up only if the text has it, and an end of sequence never does."""
    tokenizer = demo_with(("<hidden>", "<kept>"), ("<plain>",))
    walks = Walks(tokenizer)
    hidden, kept, plain = (
        tokenizer.encode(text, add_special_tokens=False)[0]
        for text in ("<hidden>", "<kept>", "<plain>")
    )
    string = StructuredOutputsParams(json={"type": "string"})
    for form, begin in ((ANY_TEXT, ""), (string, '"')):
        for fields, shown in (
            ({}, {plain}),
            ({"kept_special_token_ids": frozenset({kept, plain})}, {plain, kept}),
            ({"skip_special_tokens": False}, {plain, kept, hidden}),
        ):
            matcher = walks.begin(form, **fields)
            walks.take(matcher, tokenizer.encode(begin, add_special_tokens=False))
            allowed = set(walks.allowed(matcher).tolist())
            assert allowed & {hidden, kept, plain} == shown
            assert (walks.eos in allowed) is (form is ANY_TEXT)


def test_a_grammar_may_name_a_token() -> None:
    walks = Walks(demo_with(("<hidden>",), ("<plain>",)))
    for text in ("<hidden>", "<plain>"):
        (token_id,) = walks.tokenizer.encode(text, add_special_tokens=False)
        for name in (text, f"<[{token_id}]>"):
            form = StructuredOutputsParams(grammar=f'start: {name} "a" # {text}')
            matcher = walks.begin(form)
            assert token_id in walks.allowed(matcher)
            assert walks.take(matcher, [token_id]) == 1


def byte_level_in_steps() -> Backend:
    """The demo model's, with a decoder that is a list of one."""
    backend = tokenizer_kinds.demo()
    backend.decoder = decoders.Sequence([decoders.ByteLevel()])
    return backend


@pytest.mark.parametrize(
    "make",
    [
        tokenizer_kinds.llama,
        tokenizer_kinds.gpt2,
        tokenizer_kinds.digits_from_the_right,
        tokenizer_kinds.deepseek,
        byte_level_in_steps,
    ],
)
def test_other_kinds_of_tokenizers(make: Callable[[], Backend]) -> None:
    """Forms hold for tokenizers that put a space in front, and for those with byte fallback."""
    backend = make()
    backend.add_special_tokens(["<hidden>"])
    walks = Walks(Tokenizer(backend))
    assert backend.token_to_id("<hidden>") not in walks.allowed(walks.begin(ANY_TEXT))
    rng = np.random.default_rng(0)
    form = StructuredOutputsParams(regex="(a|the|é){1,4}( word|漢)[.]?")
    for _ in range(5):
        matcher = walks.begin(form)
        ids = walks.wander(matcher, rng, 100)
        assert matcher.is_finished
        # the space in front of a whole text is lost
        text = walks.tokenizer.decode(ids)
        assert re.fullmatch("(a|the|é){1,4}( word|漢)[.]?", text)


def word_level() -> Backend:
    """One token for each word, and no decoder."""
    backend = Backend(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return backend


def long_token() -> Backend:
    """A token that is longer than llguidance can represent, which panics."""
    backend = tokenizer_kinds.demo()
    backend.add_tokens(["x" * 5000])
    return backend


@pytest.mark.parametrize(
    "make", [word_level, long_token, tokenizer_kinds.wordpiece, tokenizer_kinds.unigram]
)
def test_a_tokenizer_without_texts_turns_forms_off_only(
    make: Callable[[], Backend], caplog: pytest.LogCaptureFixture
) -> None:
    compiler = GrammarCompiler(Tokenizer(make()), 10_000, [1])
    with caplog.at_level(logging.WARNING):
        compiler.prepare()
    (record,) = caplog.records
    reason = r"cannot use this model's tokenizer: \w"
    assert "structured output and forced tool calls are off" in record.message
    asked = StructuredOutputsParams(choice=["a"], source="guided_choice")
    with pytest.raises(ValueError, match=f"^guided_choice cannot be used: .*{reason}"):
        compiler.check(SamplingParams(structured_outputs=asked))


def test_a_process_that_ends_at_once_turns_forms_off_for_a_request_only(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As without descriptors or memory, which no tokenizer causes."""
    compiler = GrammarCompiler(TOKENIZER, 300, [EOS])
    asked = StructuredOutputsParams(choice=["a"], source="guided_choice")
    params = SamplingParams(structured_outputs=asked)
    source = WorkerSource()
    monkeypatch.setattr(grammar, "WORKERS", source)
    monkeypatch.setattr(WorkerSource, "COMMAND", (sys.executable, "-c", "raise SystemExit(1)"))
    with caplog.at_level(logging.WARNING):
        compiler.prepare()
    assert "are off: llguidance has no process (" in caplog.text
    with pytest.raises(ValueError, match=r"^guided_choice .*llguidance has no process \(.+\)"):
        compiler.check(params)
    monkeypatch.undo()
    compiler.check(params)


def test_special_tokens_around_the_reasoning_are_shown() -> None:
    walks = Walks(demo_with(("<think>", "</think>")))
    form = StructuredOutputsParams(choice=["yes"])
    for reasoning, text in (
        (Reasoning(), "So</think>yes"),
        (Reasoning("<think>"), "<think>So</think>yes"),
        (Reasoning("<think>"), "yes"),
    ):
        assert walks.accepts(form, text, reasoning=reasoning) == (True, True)
        assert walks.accepts(form, text[:-1] + "x", reasoning=reasoning) == (False, False)


WALKS = Walks(TOKENIZER)
_PIECES = [*"abcx!<>/ ", "ab", " a", "\n<", "b!", "</think>"]
_DRAFTS = sorted({i for text in _PIECES for i in TOKENIZER.encode(text, add_special_tokens=False)})
_FORM = re.compile(" ?(ab?[!x]?)*")


def _is_allowed(before: str, token: str, reasoning: Reasoning) -> bool:
    """Return True if a text may follow another one, by a search in the whole text."""
    text, begin = before + token, reasoning.begin
    stripped = text.lstrip()
    if begin and not stripped.startswith(begin):
        # every beginning of a text of this form has the form
        space = text[: len(text) - len(stripped)]
        may_begin = begin.startswith(stripped) and bool(stripped) and _FORM.fullmatch(space)
        return bool(_FORM.fullmatch(text) or may_begin)
    _, found, rest = stripped.removeprefix(begin).partition(reasoning.end)
    return not found or _FORM.fullmatch(rest) is not None


@settings(max_examples=200, deadline=None)
@given(
    begin=st.sampled_from(["", "", "<", "ab", "a", "!<x"]),
    end=st.sampled_from(["!", "ab", "aba", "<x>", "</x>"]),
    drafts=st.lists(st.sampled_from(_DRAFTS), max_size=12),
)
def test_a_form_begins_with_the_answer(begin: str, end: str, drafts: list[int]) -> None:
    """Masks, accepted tokens and drafts agree with a search, and with the rules of the answer."""
    reasoning = Reasoning(begin, end)
    matcher = WALKS.begin(StructuredOutputsParams(regex=_FORM.pattern), reasoning=reasoning)
    start = AnswerStart(reasoning, new_detokenizer(TOKENIZER))
    taken: list[int] = []
    for number, token_id in enumerate(drafts):
        before = TOKENIZER.decode(taken)
        may_come = _is_allowed(before, TOKENIZER.decode([token_id]), reasoning)
        assert WALKS.may_come(matcher, token_id) is may_come
        assert (matcher.count_allowed(drafts[number:]) > 0) is may_come
        is_answer = start.index is not None and (start.index > 0 or _FORM.fullmatch(before))
        assert WALKS.may_come(matcher, EOS) is bool(is_answer)
        if not may_come:
            break
        matcher.accept(token_id)
        taken.append(token_id)
        start.append_draft(token_id, len(taken))


@settings(max_examples=60, deadline=None)
@given(
    begin=st.sampled_from(["", "<", "ab"]),
    drafts=st.lists(st.sampled_from(_DRAFTS), max_size=12),
)
def test_drafts_are_counted_as_they_are_accepted(begin: str, drafts: list[int]) -> None:
    fields = {"reasoning": Reasoning(begin, "!")}
    form = StructuredOutputsParams(regex=_FORM.pattern)
    one = WALKS.begin(form, **fields)
    num_allowed = one.count_allowed(drafts)
    assert WALKS.take(one, drafts) == num_allowed
