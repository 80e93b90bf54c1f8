"""Rules for logits and ends of outputs through the whole engine, over a fake runner."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fd_dsa.engine.output import ConstraintError
from fd_dsa.engine.sampling_params import SamplingParams
from tests.engine.fakes import EOS, VOCAB_SIZE, byte_tokenizer, expected_greedy, make_engine
from tests.engine.reference_sampler import ref_adjusted
from tests.engine.test_engine import find_eos_prompt, letters, run_one

PROMPT = [7, 8, 9]


def greedy(**fields):
    """Greedy parameters, 12 tokens whatever comes unless the fields say something else."""
    return SamplingParams(**{"temperature": 0, "max_tokens": 12, "ignore_eos": True, **fields})


def answer(params, prompt=PROMPT):
    """Last output of one request."""
    return run_one(make_engine(), prompt, params)[-1]


def expected_tokens(params, prompt=PROMPT, bad_sequences=()):
    """Greedy continuation under the rules, computed without an engine."""
    runner = make_engine().runner
    output = []
    ends = {*(params.stop_token_ids or ()), *([] if params.ignore_eos else [EOS])}
    while len(output) < params.max_tokens:
        logits = runner.logits_after([*prompt, *output])
        adjusted = ref_adjusted(logits, params, prompt, output, bad_sequences, ends)
        output.append(int(adjusted.argmax()))
        if output[-1] in ends:
            break
    return output


@settings(max_examples=60)
@given(
    repetition=st.sampled_from([1.0, 1.7]),
    frequency=st.sampled_from([0.0, 1.3, -0.5]),
    presence=st.sampled_from([0.0, 1.1]),
    bias=st.none() | st.dictionaries(st.integers(0, VOCAB_SIZE - 1), st.floats(-3, 3)),
    min_tokens=st.integers(0, 12),
    stops=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=6),
    ignore_eos=st.booleans(),
)
def test_a_greedy_answer_follows_its_rules(
    repetition, frequency, presence, bias, min_tokens, stops, ignore_eos
):
    params = greedy(
        repetition_penalty=repetition,
        frequency_penalty=frequency,
        presence_penalty=presence,
        logit_bias=bias,
        min_tokens=min_tokens,
        stop_token_ids=stops,
        ignore_eos=ignore_eos,
    )
    assert answer(params).token_ids == expected_tokens(params)


def test_a_bad_word_never_comes_and_what_only_begins_like_it_may():
    plain = letters(expected_greedy(PROMPT, 12, eos=None))
    for length in (1, 2, 3):
        word = plain[4 : 4 + length]
        text = answer(greedy(bad_words=[word])).text
        assert text[:4] == plain[:4]
        assert word not in text
        ids = byte_tokenizer().encode(word, add_special_tokens=False)
        assert answer(greedy(bad_words=[word])).token_ids == expected_tokens(
            greedy(), bad_sequences=[tuple(ids)]
        )
    assert text[4:6] == plain[4:6]


def test_a_stop_token_ends_the_output_without_its_text_unless_asked():
    plain = expected_greedy(PROMPT, 12, eos=None)
    last = answer(greedy(stop_token_ids=[plain[5]]))
    first = plain.index(plain[5])
    assert last.token_ids == plain[: first + 1]
    assert (last.finish_reason, last.stop_reason) == ("stop", plain[5])
    assert last.text == letters(plain[:first])
    kept = answer(greedy(stop_token_ids=[plain[5]], include_stop_str_in_output=True))
    assert kept.text == letters(plain[: first + 1])


@pytest.mark.parametrize("is_kept", [True, False])
def test_a_stop_string_over_several_tokens_ends_the_text(is_kept):
    text = letters(expected_greedy(PROMPT, 12, eos=None))
    stop = text[4:7]
    end = text.index(stop) + 3 * is_kept
    params = greedy(stop=["never", stop], include_stop_str_in_output=is_kept)
    outputs = run_one(make_engine(), PROMPT, params)
    assert outputs[-1].text == "".join(output.new_text for output in outputs) == text[:end]
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", stop)


def test_min_tokens_puts_off_every_kind_of_end():
    prompt, tokens = find_eos_prompt()
    params = greedy(ignore_eos=False, min_tokens=11)
    assert len(answer(params, prompt).token_ids) >= 11
    assert answer(params, prompt).token_ids[: len(tokens) - 1] == tokens[:-1]
    text = letters(expected_greedy(PROMPT, 12, eos=None))
    # its first character repeats later or not: the first end after the minimum counts
    for min_tokens in range(12):
        last = answer(greedy(stop=text[3], min_tokens=min_tokens))
        end = text.find(text[3], min_tokens)
        assert last.text == (text if end < 0 else text[:end])
        assert last.finish_reason == ("length" if end < 0 else "stop")


def test_special_tokens_are_shown_when_asked():
    prompt, tokens = find_eos_prompt()
    params = greedy(logit_bias={0: 100.0}, max_tokens=2)
    assert answer(params).text == ""
    assert answer(greedy(logit_bias={0: 100.0}, max_tokens=2, skip_special_tokens=False)).text == (
        "<bos><bos>"
    )
    shown = greedy(ignore_eos=False, skip_special_tokens=False, include_stop_str_in_output=True)
    assert answer(shown, prompt).text == letters(tokens[:-1]) + "<eos>"


def test_rules_that_leave_nothing_end_the_request_alone_and_keep_the_cache():
    engine = make_engine()
    engine.add_request("all", [5] * 9, greedy(bad_words_token_ids=range(VOCAB_SIZE)))
    (failed,) = engine.step()
    assert failed.finish_reason == "error"
    assert isinstance(failed.error, ConstraintError)
    assert "bad_words" in str(failed.error)
    assert run_one(engine, [5] * 9, greedy())[-1].num_cached_tokens == 8


@pytest.mark.parametrize("field", ["logit_bias", "stop_token_ids", "bad_words_token_ids"])
def test_tokens_that_the_model_lacks_are_refused(field):
    value = {VOCAB_SIZE: 1.0} if field == "logit_bias" else [VOCAB_SIZE]
    with pytest.raises(ValueError, match=f"{field} has the token id {VOCAB_SIZE}"):
        make_engine().add_request("r", PROMPT, SamplingParams(**{field: value}))
