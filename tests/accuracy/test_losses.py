"""Losses of a text: windows that score every token once, and losses against naive loops."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fd_dsa.accuracy.embedded import OpenModel, SingleSequenceRunner, open_model
from fd_dsa.accuracy.perplexity import (
    Losses,
    cut,
    losses_of,
    measure,
    start_of_sequence,
    stretches,
    token_losses,
)
from fd_dsa.accuracy.selection.topk_hook import recording
from fd_dsa.errors import ConfigError, FdDsaError
from fd_dsa.runner import InputBatch, ModelRunner
from tests.accuracy.broken_selectors import FewLastKeysOnly
from tests.demo.samples import PROSE
from tests.runner.tiny import V32, run_rows, tiny_model, tiny_runner


class TestWindows:
    """How a text is cut."""

    @given(
        count=st.integers(2, 60),
        context=st.integers(3, 20),
        lead=st.lists(st.just(-1), max_size=2),
    )
    def test_every_token_is_scored_once_in_order(
        self, count: int, context: int, lead: list[int]
    ) -> None:
        assume(context > len(lead))
        ids = list(range(count))
        first, windows = cut(ids, context, lead)
        scored = [token for window in windows for token in window[first:]]
        assert scored == (ids if lead else ids[1:])
        for window in windows:
            assert len(window) <= context
            assert list(window[: len(lead)]) == lead
            own = window[len(lead) :]
            assert list(own) == list(range(own[0], own[0] + len(own)))

    @pytest.mark.parametrize(
        ("ids", "context", "lead", "message"),
        [
            ([], 8, [0], "has 0 tokens, too few to"),
            ([5], 8, [], "has 1 tokens, too few to"),
            ([5, 6], 2, [0, 0], "--context: got 2, allowed: at least 3"),
        ],
    )
    def test_what_cannot_be_cut_is_refused(
        self, ids: list[int], context: int, lead: list[int], message: str
    ) -> None:
        with pytest.raises(ConfigError, match=message):
            cut(ids, context, lead)


def test_losses_are_minus_log_softmax() -> None:
    logits = np.array([[0.0, 0.0, 0.0, 0.0], [1000.0, 0.0, -1000.0, 999.0]], np.float32)
    found = losses_of(logits, np.array([2, 3]))
    assert found[0] == pytest.approx(math.log(4))
    assert found[1] == pytest.approx(math.log(1 + math.e))


def figures(nats: list[float], characters: int, num_bytes: int = 1) -> Losses:
    """Losses of one window."""
    return Losses(np.array(nats), np.arange(1, len(nats) + 1), 1, characters, num_bytes)


def test_perplexity_and_bits() -> None:
    # two bits, then four, for three characters of five bytes
    losses = figures([2 * math.log(2), 4 * math.log(2)], 3, 5)
    assert losses.perplexity == pytest.approx(8)
    assert losses.to_json()["bits_per_character"] == pytest.approx(2)
    assert losses.to_json()["bits_per_byte"] == pytest.approx(6 / 5)
    assert figures([1e4], 1).perplexity == math.inf
    assert figures([1e4], 1).to_json()["perplexity"] is None


def test_stretches_part_at_the_selection_s_size() -> None:
    losses = figures([0.0] * 100, 1)
    found = [(first, last, int(inside.sum())) for first, last, inside in stretches(losses, 20)]
    assert found[:3] == [(1, 12, 12), (13, 20, 8), (21, 28, 8)]
    assert found[-1][1] >= 100
    assert sum(count for *_, count in found) == 100
    assert [first for first, *_ in found[1:]] == [last + 1 for _, last, _ in found[:-1]]


def test_token_losses_of_a_tiny_model_are_those_of_its_logits() -> None:
    tokens = np.random.default_rng(0).integers(2, 50, 50).tolist()
    logits = run_rows(tiny_runner(tiny_model(V32)), [(0, tokens, 0, True)]).astype(np.float64)
    wanted = [
        math.log(sum(math.exp(v) for v in row)) - row[token]
        for row, token in zip(logits.tolist(), tokens[1:], strict=False)
    ]
    sequence = SingleSequenceRunner(tiny_runner(tiny_model(V32)))
    np.testing.assert_allclose(token_losses(sequence, tokens), wanted, rtol=0, atol=1e-4)
    # again, and after another sequence
    token_losses(sequence, tokens[::-1])
    np.testing.assert_allclose(token_losses(sequence, tokens), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("chunk", [7, 13, 49])
def test_chunks_do_not_matter(chunk: int) -> None:
    tokens = np.random.default_rng(1).integers(2, 50, 50).tolist()
    model = tiny_model(V32)
    wanted = token_losses(SingleSequenceRunner(tiny_runner(model)), tokens)
    layout = model.config.cache_layout("float32", 16)
    runner = ModelRunner(model, InputBatch(1, chunk, 4, 16), layout, 4)
    found = token_losses(SingleSequenceRunner(runner), tokens)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)


def test_a_sequence_longer_than_the_caches_is_refused() -> None:
    sequence = SingleSequenceRunner(tiny_runner(tiny_model(V32)))
    with pytest.raises(ValueError, match="65 tokens, the caches have room for 64"):
        token_losses(sequence, [3] * 65)


def fake_tokenizer(empty: list[int], bos: int | None) -> SimpleNamespace:
    return SimpleNamespace(encode=lambda text: list(empty), bos_token_id=bos)


@pytest.mark.parametrize(
    ("empty", "bos", "wanted"), [([], 7, [7]), ([], None, []), ([3, 4], 7, [3, 4])]
)
def test_a_sequence_begins_as_its_tokenizer_says(
    empty: list[int], bos: int | None, wanted: list[int]
) -> None:
    assert start_of_sequence(fake_tokenizer(empty, bos)) == wanted


# more than a few tokens past what the demo model selects
TEXT = PROSE * 3


@pytest.fixture(scope="module")
def model() -> OpenModel:
    """The demo model."""
    return open_model(device="cpu", max_model_len=512)


@pytest.fixture(scope="module")
def losses(model: OpenModel) -> Losses:
    """What it makes of the text."""
    return measure(model, TEXT)


def test_windows_of_the_demo_model(model: OpenModel, losses: Losses) -> None:
    ids = model.tokenizer.encode(PROSE)
    found = measure(replace(model, max_model_len=41), PROSE)
    assert found.num_windows == math.ceil(len(ids) / 40)
    assert len(found.nats) == len(ids)
    np.testing.assert_allclose(found.nats[:40], losses.nats[:40], rtol=0, atol=1e-3)
    bos = model.tokenizer.bos_token_id
    again = token_losses(model.sequence, [bos, *ids[40:80]])
    np.testing.assert_allclose(found.nats[40:80], again, rtol=0, atol=1e-3)


def test_no_jump_at_the_selection_s_size(model: OpenModel, losses: Losses) -> None:
    """Losses before, at and after index_topk follow dense attention; a collapse would not."""
    dense = measure(open_model(device="cpu", max_model_len=512, index_topk=512), TEXT)
    difference = np.abs(losses.nats - dense.nats)
    border = model.model_config.index_topk
    # num_keys is the index plus one: up to here every key is chosen
    assert difference[:border].max() < 1e-3
    assert difference[border:].max() > 1e-5, "nothing is selected"
    assert difference[border : border + 16].max() < 0.1
    with recording(model.sequence.runner, "cpu", FewLastKeysOnly):
        spoiled = measure(model, TEXT)
    jump = np.abs(spoiled.nats - losses.nats)
    # only rounding: on some processors the sums of a GEMM depend on the address of its memory
    assert jump[:border].max() < 1e-4
    assert jump[border : border + 16].max() > 1


def test_losses_that_are_no_numbers_are_told(
    model: OpenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(hidden: np.ndarray) -> np.ndarray:
        logits = np.zeros((len(hidden), model.sequence.runner.vocab_size), np.float32)
        logits[1] = np.nan
        return logits

    monkeypatch.setattr(model.sequence, "logits", broken)
    with pytest.raises(FdDsaError, match="window 0: the loss of token 2 is not finite"):
        measure(model, "One, two, three.")


def test_open_model_refuses_a_selection_of_nothing() -> None:
    with pytest.raises(ConfigError, match="--index-topk: got 0, allowed: an integer of at least 1"):
        open_model(index_topk=0)
