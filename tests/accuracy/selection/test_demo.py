"""The demo model on hidden numbers: its indexer finds them, a selector of last keys does not."""

from __future__ import annotations

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
    tokens_of,
)
from fd_dsa.errors import ConfigError
from tests.accuracy.broken_selectors import TrailingKeysOnly

LENGTH = 600


@pytest.fixture(scope="module")
def model() -> Iterator[OpenModel]:
    yield open_model(device="cpu", max_model_len=LENGTH + 64)


@pytest.fixture(scope="module")
def text(model: OpenModel) -> NeedleText:
    (found,) = needle_texts(model, LENGTH, 1, seed=1)
    return found


@pytest.fixture(scope="module")
def figures(model: OpenModel, text: NeedleText) -> list[LayerFigures]:
    return measure(model, [text], num_queries=8)


def test_a_text_has_its_length_and_says_where_the_number_stands(
    model: OpenModel, text: NeedleText
) -> None:
    assert len(text.prompt) == LENGTH
    ids = [*text.prompt, *text.answer]
    number = "".join(model.tokenizer.decode([text.prompt[needle]]) for _, needle in text.pairs)
    assert len(number) == 5 and number.isdigit()
    assert f"The pass key is {number}. Remember it." in model.tokenizer.decode(text.prompt)
    assert model.tokenizer.decode(text.answer) == f"The pass key is {number[:-1]}"
    # at a query the token of its needle comes next
    follow = [*ids[1:], text.prompt[text.pairs[-1][1]]]
    assert [follow[query] for query in text.queries] == [ids[needle] for _, needle in text.pairs]


def test_texts_do_not_depend_on_their_number(model: OpenModel, text: NeedleText) -> None:
    first, second = needle_texts(model, LENGTH, 2, seed=1)
    assert first == text
    assert second.prompt != first.prompt and second.depth != first.depth


def test_a_text_that_is_not_there_once_is_refused(model: OpenModel) -> None:
    ids = model.tokenizer.encode("48 by the sea, 48")
    with pytest.raises(ConfigError, match="'48' is in the text 2 times, not once"):
        tokens_of(model.tokenizer, ids, "48")
    # tokens that the text reaches into count
    found = tokens_of(model.tokenizer, ids, "he se")
    assert found == list(range(found[0], found[-1] + 1)) and len(found) < len(ids)
    assert "he se" in model.tokenizer.decode([ids[place] for place in found])
    assert "he se" not in model.tokenizer.decode([ids[place] for place in found[1:]])


def test_the_indexer_finds_the_number_where_a_head_looks_for_it(
    figures: list[LayerFigures], model: OpenModel, text: NeedleText
) -> None:
    looking = [figure for figure in figures if figure.attends]
    assert looking and len(looking) < len(figures)
    topk = model.model_config.index_topk
    for figure in looking:
        assert figure.recall(INDEXER).value == 1.0
        assert figure.recall(LAST).value == float(text.pairs[0][1] >= LENGTH - topk)
        assert 0 < figure.recall(RANDOM).value < 0.9


def test_a_selector_of_last_keys_collapses(
    model: OpenModel, text: NeedleText, figures: list[LayerFigures]
) -> None:
    spoiled = measure(model, [text], num_queries=8, backend=TrailingKeysOnly)
    assert text.pairs[-1][1] < LENGTH - model.model_config.index_topk
    looking = [figure for figure in spoiled if figure.attends]
    assert looking
    for figure in looking:
        assert figure.recall(INDEXER).value == 0.0
        assert figure.mass[INDEXER] == pytest.approx(figure.mass[LAST])
    assert min(min(figure.exact) for figure in spoiled) < 0.9
    best = max(figures, key=lambda figure: np.mean(figure.needle_attention)).layer
    assert sum(spoiled[best].mass[INDEXER]) < sum(figures[best].mass[INDEXER])
