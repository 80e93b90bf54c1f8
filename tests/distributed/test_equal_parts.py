"""Equal parts of a step's tokens: which steps are divided, and where the parts end."""

from __future__ import annotations

import numpy as np
import pytest

from fd_dsa.distributed import equal_parts
from fd_dsa.distributed.equal_parts import LEAST_TOKENS, EqualParts
from fd_dsa.distributed.host import HostGroup
from tests.distributed.groups import on_ranks


def owns(size: int, num_tokens: int) -> list[tuple[int, int]]:
    """The tokens of every rank."""
    return on_ranks(size, lambda group: EqualParts(group, num_tokens).own)


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_share_long_steps_of_whole_units(size: int) -> None:
    least = size * LEAST_TOKENS
    for num_tokens in (least, 8192):
        found, count = owns(size, num_tokens), num_tokens // size
        assert found == [(rank * count, (rank + 1) * count) for rank in range(size)]
        assert all(begin % 16 == 0 for begin, _ in found)
    for whole in (0, 1, least - size * 16, least + 8, least + 16 * (size - 1)):
        assert owns(size, whole) == [(0, whole)] * size


@pytest.mark.parametrize("size", [2, 4])
def test_padding_divides_every_long_step(size: int) -> None:
    least = size * LEAST_TOKENS
    for num_tokens in (least, least + 1, 8000):
        [padded] = set(on_ranks(size, lambda group, n=num_tokens: EqualParts.padded(group, n)))
        assert 0 <= padded - num_tokens < 16 * size
        assert owns(size, padded)[0] == (0, padded // size)
    for short in (0, 1, least - 1):
        assert on_ranks(size, lambda group, n=short: EqualParts.padded(group, n)) == [short] * size
    assert EqualParts.padded(None, 8000) == 8000


def test_the_minimum_is_that_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FD_DSA_DIVIDED_MIN_TOKENS", "96")
    assert owns(2, 96) == [(0, 48), (48, 96)]
    assert owns(2, 64) == [(0, 64)] * 2
    assert on_ranks(2, lambda group: EqualParts.padded(group, 95)) == [95] * 2
    assert on_ranks(2, lambda group: EqualParts.padded(group, 97)) == [128] * 2
    monkeypatch.setenv("FD_DSA_DIVIDED_MIN_TOKENS", "0")
    assert owns(2, 8192) == [(0, 8192)] * 2


def test_one_rank_and_the_batch_invariant_mode_divide_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert EqualParts(None, 8192).own == (0, 8192)
    monkeypatch.setattr(equal_parts, "row_dependence_refusal", lambda: "one form")
    assert owns(2, 8192) == [(0, 8192)] * 2


def test_the_log_says_which_steps_are_divided(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", equal_parts.__name__)
    EqualParts.announce(None)
    on_ranks(2, EqualParts.announce)
    monkeypatch.setenv("FD_DSA_DIVIDED_MIN_TOKENS", "0")
    on_ranks(2, EqualParts.announce)
    monkeypatch.setattr(HostGroup, "gathers_rows", False)
    assert owns(2, 8192) == [(0, 8192)] * 2
    on_ranks(2, EqualParts.announce)
    begin = "residual streams and selection of long steps:"
    assert [*caplog.messages[::2]] == [
        f"{begin} divided among ranks from 1024 tokens on",
        f"{begin} on every rank (FD_DSA_DIVIDED_MIN_TOKENS is 0)",
        f"{begin} on every rank (the ranks cannot gather rows)",
    ]


@pytest.mark.parametrize("num_tokens", [8192, 100])
def test_parts_of_a_sum_are_gathered_again(num_tokens: int) -> None:
    rows = np.arange(num_tokens, dtype=np.float32)[:, None]

    def work(group: HostGroup) -> tuple[np.ndarray, np.ndarray]:
        parts = EqualParts(group, num_tokens)
        own = parts.summed(rows + group.rank)
        np.testing.assert_array_equal(own, 2 * parts.take(rows) + 1)
        return parts.take(rows), parts.gathered(own)

    takes, gathered = zip(*on_ranks(2, work), strict=True)
    assert len(takes[0]) == (4096 if num_tokens >= 1024 else num_tokens)
    for whole in gathered:
        np.testing.assert_array_equal(whole, 2 * rows + 1)
