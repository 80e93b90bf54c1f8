"""Where two modes part, and whether rounding explains it."""

from __future__ import annotations

import pytest

from fd_dsa.accuracy.matrix.agreement import agreement
from tests.accuracy.matrix.traces import trace


def test_equal_answers_bit_for_bit() -> None:
    found = agreement({"a": trace([5, 6]), "b": trace([7])}, {"a": trace([5, 6]), "b": trace([7])})
    assert (found.requests, found.equal, found.tokens, found.equal_bits) == (2, 2, 3, 3)
    assert found.bit_for_bit and found.logit_difference == 0 and found.smallest_gap == 1


def test_equal_tokens_of_other_logits() -> None:
    found = agreement({"a": trace([5, 6])}, {"a": trace([5, 6], shift=0.25)})
    assert found.equal == 1 and not found.bit_for_bit
    assert found.logit_difference == pytest.approx(0.25) and found.equal_bits == 0


def test_the_first_difference_and_its_gap() -> None:
    one, two = trace([5, 6, 20], gap=0.5), trace([5, 7, 30], gap=0.5)
    found = agreement({"a": one, "b": trace([1])}, {"a": two, "b": trace([1])})
    (parting,) = found.partings
    assert (parting.key, parting.position, parting.tokens) == ("a", 1, (6, 7))
    # 7 is the second candidate of 6
    assert parting.gap == pytest.approx(0.5)
    # nothing behind the difference is compared
    assert found.tokens == 2 + 1
    assert found.share.value == pytest.approx(0.5)


@pytest.mark.parametrize(("gap", "near"), [(0.001, True), (1.0, False)])
def test_rounding_explains_no_more_than_what_is_seen_elsewhere(gap: float, near: bool) -> None:
    one = {"a": trace([6], gap=gap), "b": trace([3])}
    two = {"a": trace([7], gap=gap), "b": trace([3], shift=0.01)}
    found = agreement(one, two)
    assert found.logit_difference == pytest.approx(0.01, rel=1e-3)
    assert found.within_rounding(found.partings[0]) is near


def test_a_token_that_was_no_candidate_is_never_within_rounding() -> None:
    found = agreement({"a": trace([6])}, {"a": trace([600])})
    (parting,) = found.partings
    assert parting.gap is None and not found.within_rounding(parting)


def test_an_answer_that_ends_early_differs_there() -> None:
    (parting,) = agreement({"a": trace([5, 6])}, {"a": trace([5])}).partings
    assert (parting.position, parting.tokens) == (1, (6, -1))
    (parting,) = agreement({"a": trace([5])}, {"a": trace([5, 6])}).partings
    assert parting.tokens == (-1, 6)


def test_a_mode_may_leave_requests_out_but_not_add_any() -> None:
    one, two = {"a": trace([5]), "b": trace([6])}, {"b": trace([6])}
    assert agreement(one, two).requests == 1
    with pytest.raises(ValueError, match="'a'"):
        agreement(two, one)
