"""The figures of a selection on the demo model, and failures that they have to show.

The other pairing of a RoPE is also in `tests/models/test_mla.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from fd_dsa.accuracy.embedded import OpenModel, open_model
from fd_dsa.accuracy.selection.measure import (
    INDEXER,
    LAST,
    RANDOM,
    LayerFigures,
    NeedleText,
    measure,
    needle_texts,
)
from fd_dsa.config import EngineConfig
from tests.accuracy.broken_selectors import TrailingKeysOnly

LENGTH, CHUNK = 448, 176


@pytest.fixture(scope="module")
def model() -> OpenModel:
    """The demo model with room for one chunk of `LENGTH` tokens."""
    return open_model(
        EngineConfig(device="cpu", max_model_len=LENGTH + 64, max_num_batched_tokens=LENGTH)
    )


@pytest.fixture(scope="module")
def text(model: OpenModel) -> NeedleText:
    """A pass key in the first of three chunks."""
    found = next(iter(needle_texts(model, LENGTH, 4, seed=3)))
    assert model.config.index_topk + CHUNK < LENGTH
    assert max(found.needles.values()) < CHUNK
    return found


# Texts with a hidden number, by which most failures show.


def test_a_text_has_its_length_and_says_where_the_number_stands(
    model: OpenModel, text: NeedleText
) -> None:
    assert len(text.prompt) == LENGTH
    ids = [*text.prompt, *text.answer]
    number = "".join(
        model.tokenizer.decode([text.prompt[needle]]) for needle in text.needles.values()
    )
    assert len(number) == 5 and number.isdigit()
    assert f"The pass key is {number}. Remember it." in model.tokenizer.decode(text.prompt)
    assert model.tokenizer.decode(text.answer) == f"The pass key is {number[:-1]}"
    # at a query the token of its needle comes next
    follow = [*ids[1:], text.prompt[max(text.needles.values())]]
    assert all(follow[query] == ids[needle] for query, needle in text.needles.items())


def test_texts_do_not_depend_on_their_number(model: OpenModel, text: NeedleText) -> None:
    first, second = itertools.islice(needle_texts(model, LENGTH, 4, seed=3), 2)
    assert first == text
    assert second.prompt != first.prompt
    assert min(second.needles.values()) != min(first.needles.values())


# The pairing of the indexer's RoPE: DeepSeek-V3.2-Exp commit 8631a81, vLLM #28968, mlxcel #583.


@pytest.fixture
def other_pairing(model: OpenModel) -> Iterator[None]:
    """The demo model's indexers with the pairing that is not theirs."""
    runner = model.sequence.runner
    indexers = [layer.self_attn.indexer for layer in runner.model.layers]
    own = [indexer.rope_interleave for indexer in indexers]
    for indexer, interleaves in zip(indexers, own, strict=True):
        indexer.rope_interleave = not interleaves
    yield
    for indexer, interleaves in zip(indexers, own, strict=True):
        indexer.rope_interleave = interleaves


@pytest.fixture(scope="module")
def figures(model: OpenModel, text: NeedleText) -> list[LayerFigures]:
    """Of every layer of the demo model, as it is."""
    return measure(model, [text], num_queries=12)


def test_the_indexer_finds_the_number_where_a_head_looks_for_it(
    figures: list[LayerFigures], model: OpenModel, text: NeedleText
) -> None:
    looking = [figure for figure in figures if figure.attends]
    assert looking and len(looking) < len(figures)
    topk = model.config.index_topk
    for figure in looking:
        recall = figure.to_json()["needle_recall"]
        assert recall[INDEXER] == 1.0
        assert recall[LAST] == float(min(text.needles.values()) >= LENGTH - topk)
        assert 0 < recall[RANDOM] < 0.9


def test_the_selection_holds_the_attention(figures: list[LayerFigures]) -> None:
    for figure in figures:
        assert min(figure.exact) == 1.0
        assert np.mean(figure.mass[INDEXER]) > max(0.6, np.mean(figure.mass[RANDOM]) + 0.1)


@pytest.mark.usefixtures("other_pairing")
def test_attention_mass_shows_the_other_pairing(
    model: OpenModel, text: NeedleText, figures: list[LayerFigures]
) -> None:
    """Needle recall hardly does: the demo model finds a pass key by what it says, not where."""
    spoiled = measure(model, [text], num_queries=12)
    pairs = list(zip(figures, spoiled, strict=True))
    lost = [np.mean(a.mass[INDEXER]) - np.mean(b.mass[INDEXER]) for a, b in pairs]
    assert max(lost) > 0.1 and np.mean(lost) > 0.05
    # worse than to keep the last keys, whatever they are
    assert any(np.mean(b.mass[INDEXER]) < np.mean(b.mass[LAST]) - 0.05 for b in spoiled)


# Zero scores for very large tensors, so that only the last keys are seen: mlx-lm #1454.


def test_a_selector_of_last_keys_collapses(
    model: OpenModel, text: NeedleText, figures: list[LayerFigures]
) -> None:
    spoiled = measure(model, [text], num_queries=12, backend=TrailingKeysOnly)
    assert max(text.needles.values()) < LENGTH - model.config.index_topk
    looking = [figure for figure in spoiled if figure.attends]
    assert looking
    for figure in looking:
        assert figure.to_json()["needle_recall"][INDEXER] == 0.0
        assert figure.mass[INDEXER] == pytest.approx(figure.mass[LAST])
    assert min(min(figure.exact) for figure in spoiled) < 0.9
    best = max(figures, key=lambda figure: np.mean(figure.needle_attention)).layer
    assert sum(spoiled[best].mass[INDEXER]) < sum(figures[best].mass[INDEXER])
