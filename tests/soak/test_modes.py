"""The modes of the engine agree on a few requests, and what differs is found."""

from __future__ import annotations

import pytest

from tests.soak.modes import Mode, Request, Token, differences, run_mode, run_modes


@pytest.mark.slow
def test_blocks_that_come_back_from_host_memory_give_the_tokens_of_the_reference() -> None:
    assert run_modes(count=8, longest=200, seed=0, name="host memory") == []


@pytest.mark.slow
def test_chunks_hits_and_preemption_give_the_tokens_of_the_reference() -> None:
    assert run_modes(count=8, longest=200, seed=0, name="all at once") == []


def test_another_token_is_found_unless_it_is_within_rounding() -> None:
    def answers(token_id: int, lead: float, checksum: int = 0) -> dict[str, list[Token]]:
        return {"a": [Token(5, 9.0, 1), Token(token_id, lead, checksum)]}

    def told(other: dict[str, list[Token]], *, bits: bool = False, lead: float = 1.0) -> list[str]:
        return list(differences(answers(7, lead), other, bits=bits))

    assert told(answers(7, 1.0, checksum=3)) == []
    assert told(answers(8, 1.0)) == ["request a: token 1 is 8, not 7, which leads by 1"]
    assert told(answers(8, 1.0), lead=1e-3) == []
    assert told(answers(7, 1.0, checksum=3), bits=True) == ["request a: logits of token 1 differ"]


def test_a_mode_that_does_not_happen_is_found() -> None:
    request = Request("0", (5, 6, 7), 2)
    with pytest.raises(AssertionError, match="preemption: nothing was preempted"):
        run_mode(Mode("preemption", preempts=True), [request], "float32")
