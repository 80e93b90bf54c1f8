"""Values that SamplingParams accepts."""

from __future__ import annotations

import dataclasses

import pytest

from fd_dsa.engine.sampling_params import SamplingParams


def test_defaults():
    params = SamplingParams()
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (1.0, 1.0, -1, 16)
    assert params.stop_strings == ()
    assert params.seed is None
    assert params.ignore_eos is False


def test_stop_is_one_string_or_several():
    assert SamplingParams(stop="ab").stop_strings == ("ab",)
    assert SamplingParams(stop=["ab", "c"]).stop_strings == ("ab", "c")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_p", 1.01),
        ("top_p", -0.01),
        ("top_p", None),
        ("top_k", -2),
        ("top_k", 1.5),
        ("max_tokens", 0),
        ("max_tokens", "9"),
        ("seed", 2**64),
        ("seed", -(2**63) - 1),
        ("seed", 1.0),
        ("ignore_eos", 1),
        ("cache_salt", ""),
        ("cache_salt", 3),
        ("skip_reading_prefix_cache", 1),
        ("n", 0),
        ("n", 129),
        ("n", True),
        ("logprobs", 21),
        ("logprobs", -1),
        ("prompt_logprobs", 1.0),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("frequency_penalty", "1"),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", float("inf")),
        ("logit_bias", [1]),
        ("logit_bias", {"1": 2.0}),
        ("logit_bias", {-1: 2.0}),
        ("logit_bias", {1: 100.5}),
        ("logit_bias", {1: float("nan")}),
        ("bad_words", "a"),
        ("bad_words", [""]),
        ("bad_words", [3]),
        ("bad_words", ["a"] * 1025),
        ("bad_words", ["a" * 512] * 64 + ["b"]),
        ("stop", ["a" * 512] * 16 + ["b"]),
        ("cache_salt", "a" * 513),
        ("bad_words_token_ids", [[1]]),
        ("bad_words_token_ids", [True]),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("stop_token_ids", 5),
        ("stop_token_ids", [2**31]),
        ("include_stop_str_in_output", None),
        ("skip_special_tokens", 0),
        ("stop", "x" * 513),
        ("stop", ["a"] * 65),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", [3]),
        ("stop", 3),
    ],
)
def test_a_bad_value_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"top_p": 0},
        {"top_k": 0},
        {"seed": -1},
        {"max_tokens": None},
        {"min_p": 1},
        {"presence_penalty": -2, "frequency_penalty": 2.0},
        {"repetition_penalty": 1e-3},
        {"logit_bias": {0: -100, 5: 100.0}},
        {"min_tokens": 16},
        {"max_tokens": None, "min_tokens": 10**6},
        {"stop_token_ids": []},
    ],
)
def test_the_edges_are_accepted(fields):
    assert dataclasses.asdict(SamplingParams(**fields)).items() >= fields.items()
