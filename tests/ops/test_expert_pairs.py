"""Lists of pairs that the launch of a choice makes, against those of `group_pairs`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("paddle", reason="the launches take Paddle's tensors")

from fd_dsa.device.transfers import Transfers
from fd_dsa.ops import split_sums
from fd_dsa.ops.expert_kernels import choose_experts
from fd_dsa.ops.expert_pairs import MAX_TOKENS, Choice, group_pairs
from fd_dsa.ops.expert_tables import look_up_experts
from tests.conftest import PADDLE_MEMORIES
from tests.kernel_memory import KernelMemory, ending_midway, open_memory

pytestmark = pytest.mark.triton

# experts, groups, selected groups, experts of a token
RULES = [(8, 1, 1, 2), (9, 3, 1, 3), (64, 8, 4, 8), (256, 8, 4, 8), (256, 1, 1, 6), (384, 1, 1, 6)]


class Tokens:
    """Logits of tokens in a memory, of which some are padding."""

    def __init__(
        self, m: KernelMemory, tokens: int, experts: int, padded: float = 0.0, seed: int = 0
    ) -> None:
        self.m, self.experts = m, experts
        self._rng = np.random.default_rng([tokens, experts, seed])
        # few values, so that scores tie and some experts have many tokens
        self._logits = self._rng.integers(-2, 3, (tokens, experts)).astype(np.float32)
        self._bias = self._rng.integers(0, 9, experts).astype(np.float32) / 4
        self._slots = np.where(self._rng.random(tokens) < padded, -1, 5)

    def choose(self, rule: tuple[int, int, int, int], repeats: int = 1, **options: Any) -> Choice:
        """The experts with the best scores, of all tokens so many times."""
        _, groups, top_groups, top_k = rule
        options = {"norm": True, "scaling": 2.5, "score": "sigmoid"} | options
        return choose_experts(
            self.m.put(np.tile(self._logits, (repeats, 1))),
            self.m.put(self._bias),
            top_k=top_k,
            n_group=groups,
            topk_group=top_groups,
            slot_mapping=self.m.put(np.tile(self._slots, repeats)),
            **options,
        )

    def look_up(self, top_k: int, repeats: int = 1) -> Choice:
        """The experts of a table, whose rows name some experts more than once."""
        tokens = len(self._slots)
        rng = np.random.default_rng(tokens)
        table = np.sort(rng.integers(0, min(self.experts, 2 * top_k), (5, top_k)), axis=1)
        # below 0 is the result code of a request without a token
        ids = rng.integers(-1, 5, tokens)
        return look_up_experts(
            self.m.put(np.tile(self._logits, (repeats, 1))),
            self.m.put(table.astype(np.int32)),
            self.m.put(np.tile(ids, repeats)),
            self.m.put(np.tile(self._slots, repeats).astype(np.int32)),
            scaling=1.5,
            score="sqrtsoftplus",
        )


def check(m: KernelMemory, choice: Choice, experts: int) -> None:
    """Assert that lists were made, and equal those of another launch."""
    assert choice.lists is not None
    found, wanted = (
        [m.get(one) for one in lists] for lists in (choice.lists, group_pairs(choice.ids, experts))
    )
    np.testing.assert_array_equal(found[1], wanted[1])
    assert found[0].shape == wanted[0].shape and found[0].dtype == wanted[0].dtype
    for expert, count in enumerate(wanted[1]):
        np.testing.assert_array_equal(found[0][expert, :count], wanted[0][expert, :count])


@pytest.mark.parametrize("memory", PADDLE_MEMORIES)
@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_lists_of_any_choice(memory: str, data: st.DataObject) -> None:
    """Each launch finds the masks of the launch before it at zero."""
    m, rule = open_memory(memory), data.draw(st.sampled_from(RULES))
    count = data.draw(st.one_of(st.integers(1, 12), st.integers(1, MAX_TOKENS)))
    padded = data.draw(st.sampled_from([0.0, 0.3, 1.0]))
    tokens = Tokens(m, count, rule[0], padded, data.draw(st.integers(0, 9)))
    score = data.draw(st.sampled_from(["sigmoid", "sqrtsoftplus"]))
    check(m, tokens.choose(rule, norm=data.draw(st.booleans()), score=score), rule[0])
    check(m, tokens.look_up(rule[3]), rule[0])


@pytest.mark.parametrize("tokens", [1, 2, 40])
def test_lists_do_not_change_the_choice(paddle_memory: KernelMemory, tokens: int) -> None:
    """More than MAX_TOKENS tokens have no lists, and the same experts and weights."""
    m, rule, case = paddle_memory, RULES[2], Tokens(paddle_memory, tokens, 64, 0.2)
    repeats = MAX_TOKENS // tokens + 1
    for few, many in (
        (case.choose(rule), case.choose(rule, repeats)),
        (case.look_up(6), case.look_up(6, repeats)),
    ):
        assert few.lists is not None and many.lists is None
        for found, wanted in zip(few[:2], many[:2], strict=True):
            np.testing.assert_array_equal(m.get(found), m.get(wanted)[:tokens])


def test_no_tokens_and_many_experts(paddle_memory: KernelMemory) -> None:
    m = paddle_memory
    assert list(Tokens(m, 0, 8).choose(RULES[0]).ids.shape) == [0, 2]
    assert Tokens(m, 2, 1025).choose((1025, 1, 1, 1)).lists is None
    check(m, Tokens(m, 1, 1025).choose((1025, 1, 1, 1)), 1025)


def test_captured_before_the_first_run_it_lists_one_token(
    paddle_memory: KernelMemory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    m = paddle_memory
    monkeypatch.setattr(Transfers, "is_capturing", lambda self: True)
    monkeypatch.setattr(split_sums, "SCRATCH", {})
    check(m, Tokens(m, 1, 8).choose(RULES[0]), 8)
    assert not caplog.text
    assert Tokens(m, 2, 8).choose(RULES[0]).lists is None
    assert "run a step before the capture" in caplog.text and not split_sums.SCRATCH


def test_a_launch_that_ends_midway_leaves_no_masks(
    paddle_memory: KernelMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    m, case = paddle_memory, Tokens(paddle_memory, 3, 8)
    case.choose(RULES[0])
    with ending_midway(m, monkeypatch):
        case.choose(RULES[0])
    check(m, Tokens(m, 4, 8).choose(RULES[0]), 8)
