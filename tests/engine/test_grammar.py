"""Structured output: what comes out has the form asked for, whatever else is asked for."""

from __future__ import annotations

import json
import re
from itertools import islice

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fd_dsa.config import demo_model_path
from fd_dsa.engine.grammar import GrammarCompiler
from fd_dsa.engine.grammar_matcher import GrammarMatcher
from fd_dsa.engine.grammar_process import WORKERS
from fd_dsa.engine.logit_rules import BadWords, LogitRules
from fd_dsa.engine.output import ConstraintError
from fd_dsa.engine.reasoning import Reasoning
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.engine.structured_outputs import StructuredOutputsParams
from fd_dsa.engine.tokenizer import Tokenizer
from tests.engine.byte_model import EOS, TOKENIZER, VOCAB_SIZE, make_engine
from tests.engine.fakes import run_all

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "size": {"type": "integer", "minimum": -5, "maximum": 300},
        "tags": {"type": "array", "items": {"enum": ["a", "bb", "ü"]}, "maxItems": 3},
        "on": {"type": "boolean"},
    },
    "required": ["name", "size", "tags"],
    "additionalProperties": False,
}


def params(form, **fields):
    """A request for a form."""
    return SamplingParams(**{"max_tokens": 400, "structured_outputs": form, **fields})


def answers(form, engine=None, **fields):
    """All outputs of one request."""
    engine = engine or make_engine()
    engine.add_request("r", [5, 6, 7], params(form, **fields))
    return [output for output in run_all(engine)["r"] if output.finished]


def allowed(matcher):
    """Tokens that may come next."""
    mask = np.zeros(-(-VOCAB_SIZE // 32), np.int32)
    matcher.fill_bitmask(mask)
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


def id_of(text):
    """The token of a letter."""
    return TOKENIZER.encode(text, add_special_tokens=False)[0]


FORMS = {
    "schema": StructuredOutputsParams(json=SCHEMA),
    "schema text": StructuredOutputsParams(json=json.dumps(SCHEMA)),
    "object": StructuredOutputsParams(json_object=True),
    "regex": StructuredOutputsParams(regex=r"[a-c]{2,4}(é|🙂)?-[0-9]+"),
    "choice": StructuredOutputsParams(choice=["yes", "no", 'may "be"', "n\n", "ü🙂", "a/b|c"]),
    "lark": StructuredOutputsParams(grammar='start: "(" start ")" | /[xy]/'),
    # a mark before the start rule, and a text that only looks like GBNF
    "inlined": StructuredOutputsParams(grammar='?start: "<" /[0-9]+/ ">" | n // ::=\nn: "none"'),
    "gbnf": StructuredOutputsParams(grammar='root ::= "<" [0-9]+ ">" | "none"'),
}


def has_form(name, text):
    """Return True if a text has one of the forms, by other means than the grammar."""
    if name.startswith("schema"):
        jsonschema.validate(json.loads(text), SCHEMA)
        return True
    if name == "object":
        return isinstance(json.loads(text), dict)
    if name == "choice":
        return text in FORMS["choice"].choice
    if name == "lark":
        depth = text.count("(")
        return text in ("(" * depth + letter + ")" * depth for letter in "xy")
    pattern = FORMS["regex"].regex if name == "regex" else "<[0-9]+>|none"
    return re.fullmatch(pattern, text) is not None


@pytest.mark.parametrize("name", FORMS)
@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    temperature=st.sampled_from([0.0, 1.0, 3.0]),
    min_tokens=st.sampled_from([0, 30]),
    ignore_eos=st.booleans(),
    top_p=st.sampled_from([1.0, 0.9]),
)
def test_a_finished_output_has_its_form(name, seed, temperature, min_tokens, ignore_eos, top_p):
    fields = {"seed": seed, "temperature": temperature, "top_p": top_p, "min_tokens": min_tokens}
    (output,) = answers(FORMS[name], ignore_eos=ignore_eos, **fields)
    assert output.finish_reason in ("stop", "length"), output.error
    if output.finish_reason == "stop":
        assert has_form(name, output.text)
    else:
        assert len(output.token_ids) == 400


def test_most_outputs_finish():
    for name, form in FORMS.items():
        ends = (answers(form, seed=seed)[0].finish_reason for seed in range(4))
        # no more outputs are asked for once two have finished
        assert len(list(islice((end for end in ends if end == "stop"), 2))) == 2, name


@settings(max_examples=8, deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.sampled_from(sorted(FORMS)), st.integers(1, 3), st.integers(0, 50)),
        min_size=1,
        max_size=6,
    ),
    max_num_seqs=st.integers(1, 4),
    budget=st.integers(1, 16),
    spare_blocks=st.integers(0, 20),
)
def test_preemption_and_batches_change_no_output(requests, max_num_seqs, budget, spare_blocks):
    engine = make_engine(13 + spare_blocks, max_num_seqs, budget)
    for i, (name, n, seed) in enumerate(requests):
        one = params(FORMS[name], n=n, seed=seed, max_tokens=50)
        engine.add_request(str(i), [5, 6, 7], one)
    results = run_all(engine)
    for i, (name, n, seed) in enumerate(requests):
        expected = {out.index: out for out in answers(FORMS[name], n=n, seed=seed, max_tokens=50)}
        found = {out.index: out for out in results[str(i)] if out.finished}
        assert sorted(found) == list(range(n))
        for index, output in found.items():
            assert output.token_ids == expected[index].token_ids
            assert output.finish_reason == expected[index].finish_reason
    assert engine.stats().num_used_blocks == 0


def test_preemption_really_happens_in_the_test_above():
    engine = make_engine(14)
    for i in range(4):
        engine.add_request(str(i), [5, 6, 7], params(FORMS["lark"], seed=i, max_tokens=50))
        engine.add_request(f"s{i}", [5, 6, 7], params(FORMS["schema"], seed=i, max_tokens=50))
    run_all(engine)
    assert engine.stats().num_preemptions > 0


def test_a_stop_string_cuts_a_form_and_other_rules_hold_inside():
    (output,) = answers(StructuredOutputsParams(regex="[ab]{40}"), stop="bb", seed=1)
    assert output.finish_reason == "stop" and "bb" not in output.text
    ab, a = TOKENIZER.encode("ab", add_special_tokens=False), TOKENIZER.encode("a")
    bans = [*ab, *a]
    (output,) = answers(StructuredOutputsParams(regex="[abc]{20}"), bad_words_token_ids=bans)
    assert re.fullmatch("[bc]{20}", output.text)


def test_a_model_that_loves_spaces_gets_on():
    space = id_of(" ")
    form = StructuredOutputsParams(json={"type": "array", "items": {"const": 1}, "maxItems": 2})
    (output,) = answers(form, logit_bias={space: 100.0})
    assert output.finish_reason == "stop"
    assert " " * 40 in output.text and " " * 41 not in output.text
    assert json.loads(output.text) in ([], [1], [1, 1])


def test_rules_that_exclude_a_form_end_the_request():
    form = StructuredOutputsParams(choice=["a", "ab"])
    bans = [id_of(text) for text in ("a", "ab")]
    (output,) = answers(form, bad_words_token_ids=bans)
    assert output.finish_reason == "error"
    assert isinstance(output.error, ConstraintError)


def test_a_finite_form_ends_the_output_without_an_end_of_sequence():
    (output,) = answers(StructuredOutputsParams(choice=["true"]), ignore_eos=True, min_tokens=50)
    assert (output.text, output.finish_reason, output.stop_reason) == ("true", "stop", None)
    assert EOS not in output.token_ids


def test_the_end_of_sequence_comes_only_where_the_form_is_complete():
    compiler = GrammarCompiler(TOKENIZER, VOCAB_SIZE, [EOS])
    matcher = GrammarMatcher(compiler, params(StructuredOutputsParams(regex="xy*")))
    x, y = map(id_of, "xy")
    assert allowed(matcher) == {x}
    matcher.accept(x)
    assert allowed(matcher) == {y, EOS}
    assert not matcher.is_finished
    matcher.accept(EOS)
    assert matcher.is_finished
    assert matcher.error is None


def test_a_form_may_begin_behind_a_token():
    end = id_of("!")
    form, fields = StructuredOutputsParams(regex="[ab]{3}"), {"reasoning": Reasoning("", "!")}
    num_cut = 0
    for seed in range(10):
        (output,) = answers(form, seed=seed, logit_bias={end: 3.0, EOS: 3.0}, **fields)
        assert EOS not in output.token_ids
        before, mark, after = output.text.partition("!")
        if mark:
            assert re.fullmatch("[ab]{3}", after)
            assert output.finish_reason == "stop"
            num_cut += re.fullmatch("[ab]*", before) is None
    assert num_cut > 5


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([*map(id_of, "abc!"), EOS, -1]), max_size=4), st.integers(0, 5))
def test_masks_after_drafts_are_those_after_tokens(drafts, min_tokens):
    """As far as drafts may come; what follows is free, and no draft is taken."""
    form = StructuredOutputsParams(regex="(a[bc]?)*")
    bad = BadWords(["ca"], [[id_of("c"), id_of("a")]])
    compiler = GrammarCompiler(TOKENIZER, VOCAB_SIZE, [EOS])
    output, rule = [], SamplingParams(min_tokens=min_tokens, max_tokens=9)
    matcher = GrammarMatcher(compiler, params(form, reasoning=Reasoning("", "!")))
    rules = LogitRules(rule, [5], output, bad, [EOS], matcher)
    output.append(id_of("!"))
    rules.grammar.accept(output[-1])
    found = rules.masks(VOCAB_SIZE, drafts)
    assert len(found) == 1 + len(drafts)
    for place, mask in enumerate(found):
        (alone,) = rules.masks(VOCAB_SIZE)
        assert mask.tolist() == alone.tolist()
        draft = drafts[place] if place < len(drafts) else -1
        if draft < 0 or not alone[draft // 32] >> draft % 32 & 1 or draft == EOS:
            assert all((later == -1).all() for later in found[place + 1 :])
            break
        output.append(draft)
        rules.grammar.accept(draft)


def test_what_others_have_asked_of_a_form_does_not_wear_it_out(monkeypatch):
    """Outputs of one form share the states that they reach, of which there may be so many."""
    monkeypatch.setattr("fd_dsa.engine.grammar.MAX_LEXER_STATES", 400)
    monkeypatch.setattr("fd_dsa.engine.grammar_matcher.RENEWED_AFTER_TOKENS", 80)
    compiler = GrammarCompiler(TOKENIZER, VOCAB_SIZE, [EOS])
    form = StructuredOutputsParams(regex="(a|b)*a(a|b){10}x")
    letters = [id_of(text) for text in "ab"]
    rng = np.random.default_rng(0)
    errors = []

    def follow(num_tokens):
        matcher = GrammarMatcher(compiler, params(form))
        for token in rng.choice(letters, num_tokens).tolist():
            allowed(matcher)
            errors.append(matcher.error)
            if matcher.error:
                break
            matcher.accept(token)

    for _ in range(40):
        follow(60)
    assert not any(errors)
    # all 2048 states are too many for one
    follow(5000)
    assert "too many states" in errors[-1]


def test_a_form_that_is_too_complex_is_not_compiled_for_every_output(monkeypatch):
    monkeypatch.setattr("fd_dsa.engine.grammar.MAX_LEXER_STATES", 20)
    compiler = GrammarCompiler(TOKENIZER, VOCAB_SIZE, [EOS])
    form = StructuredOutputsParams(regex="(a|b)*a(a|b){10}x")
    compiled = []
    compile_once = WORKERS.compile
    monkeypatch.setattr(
        WORKERS, "compile", lambda *given: compiled.append(given) or compile_once(*given)
    )
    a = id_of("a")
    for _ in range(10):
        matcher = GrammarMatcher(compiler, params(form))
        for _ in range(50):
            allowed(matcher)
            matcher.accept(a)
        assert "too many states" in matcher.error
    assert len(compiled) == 1
    monkeypatch.setattr("fd_dsa.engine.grammar_matcher.RENEWED_AFTER_S", 0.0)
    allowed(GrammarMatcher(compiler, params(form)))
    assert len(compiled) == 2


def test_the_tokenizer_of_a_model_folder():
    tokenizer = Tokenizer.from_folder(demo_model_path())
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, [tokenizer.eos_token_id])
    matcher = GrammarMatcher(compiler, params(FORMS["schema"]))
    mask = np.zeros(-(-tokenizer.vocab_size // 32), np.int32)
    rng = np.random.default_rng(0)
    token_ids = []
    while not matcher.is_finished and len(token_ids) < 500:
        matcher.fill_bitmask(mask)
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
        token_ids.append(int(rng.choice(np.flatnonzero(bits))))
        matcher.accept(token_ids[-1])
    assert matcher.error is None
    if matcher.is_finished:
        jsonschema.validate(json.loads(tokenizer.decode(token_ids)), SCHEMA)
