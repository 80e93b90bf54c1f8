"""Failures that other DSA engines have had: each one is put in here, and has to be noticed.

Those of a single operator are injected in `tests/attention/test_known_failures.py`; the other
pairing of a RoPE also in `tests/models/test_mla.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest

from fd_dsa.accuracy.embedded import OpenModel, open_model
from fd_dsa.accuracy.retrieval.prompts import sentences
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
from fd_dsa.accuracy.selection.tap import recording
from fd_dsa.config import EngineConfig
from fd_dsa.engine.block_manager import BlockManager
from fd_dsa.engine.factory import build_engine
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.errors import ConfigError
from tests.accuracy.broken_selectors import FirstKeysOnly, OwnChunkOnly, TrailingKeysOnly

LENGTH, CHUNK = 640, 256


@pytest.fixture(scope="module")
def model() -> OpenModel:
    """The demo model with room for one chunk of `LENGTH` tokens."""
    return open_model(device="cpu", max_model_len=LENGTH + 64, max_num_batched_tokens=LENGTH)


@pytest.fixture(scope="module")
def text(model: OpenModel) -> NeedleText:
    """A pass key in the first of three chunks."""
    found = next(iter(needle_texts(model, LENGTH, 4, seed=3)))
    assert model.model_config.index_topk + CHUNK < LENGTH
    assert max(needle for _, needle in found.pairs) < CHUNK
    return found


@pytest.fixture(scope="module")
def one_shot(model: OpenModel, text: NeedleText) -> np.ndarray:
    """Logits of the first answered token, the prompt read in one chunk."""
    return read(model, text.prompt, LENGTH)


def read(model: OpenModel, token_ids: Sequence[int], chunk: int) -> np.ndarray:
    """float32 [vocab_size]: logits after a prompt that is read in chunks."""
    model.sequence.length = 0
    for start in range(0, len(token_ids), chunk):
        hidden = model.sequence.run(token_ids[start : start + chunk])
    return model.sequence.logits(hidden[-1:])[0]


def answer(
    model: OpenModel, token_ids: Sequence[int], chunk: int = CHUNK
) -> tuple[str, np.ndarray]:
    """What the model says, greedily, at most 12 tokens, and the logits of its first token."""
    first = logits = read(model, token_ids, chunk)
    said = []
    while len(said) < 12:
        token = int(logits.argmax())
        if token in model.model_config.eos_token_ids:
            break
        said.append(token)
        logits = model.sequence.logits(model.sequence.run([token], decode=True))[0]
    return model.tokenizer.decode(said), first


def key_of(model: OpenModel, text: NeedleText) -> str:
    """The hidden number."""
    return model.tokenizer.decode([text.prompt[needle] for _, needle in text.pairs])


# Texts with a hidden number, by which most failures show.


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
    first, second = itertools.islice(needle_texts(model, LENGTH, 4, seed=3), 2)
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


# The pairing of the indexer's RoPE: DeepSeek-V3.2-Exp commit 8631a81, vLLM #28968, mlxcel #583.


@pytest.fixture
def other_pairing(model: OpenModel) -> Iterator[None]:
    """The demo model's indexers with the pairing that is not theirs."""
    runner = model.sequence.runner
    indexers = [layer.self_attn.indexer for layer in runner.model.layers]
    own = [indexer.config for indexer in indexers]
    for indexer, config in zip(indexers, own, strict=True):
        indexer.config = replace(config, indexer_rope_interleave=not config.indexer_rope_interleave)
    yield
    for indexer, config in zip(indexers, own, strict=True):
        indexer.config = config


@pytest.fixture(scope="module")
def figures(model: OpenModel, text: NeedleText) -> list[LayerFigures]:
    """Of every layer of the demo model, as it is."""
    return measure(model, [text], num_queries=12)


def test_the_indexer_finds_the_number_where_a_head_looks_for_it(
    figures: list[LayerFigures], model: OpenModel, text: NeedleText
) -> None:
    looking = [figure for figure in figures if figure.attends]
    assert looking and len(looking) < len(figures)
    topk = model.model_config.index_topk
    for figure in looking:
        recall = figure.to_json()["needle_recall"]
        assert recall[INDEXER] == 1.0
        assert recall[LAST] == float(text.pairs[0][1] >= LENGTH - topk)
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


# Second and later chunks score their own chunk alone: pypto-lib #592, mlx-lm #1189.


def test_a_needle_in_the_first_of_three_chunks(
    model: OpenModel, text: NeedleText, one_shot: np.ndarray
) -> None:
    said, logits = answer(model, text.prompt)
    assert key_of(model, text) in said
    np.testing.assert_allclose(logits, one_shot, rtol=0, atol=1e-3)


def test_chunks_that_see_themselves_alone_are_noticed(
    model: OpenModel, text: NeedleText, one_shot: np.ndarray
) -> None:
    with recording(model.sequence.runner, "cpu", OwnChunkOnly):
        said, logits = answer(model, text.prompt)
    assert key_of(model, text) not in said
    assert np.abs(logits - one_shot).max() > 1e-2


# Zero scores for very large tensors, so that only the last keys are seen: mlx-lm #1454.


def test_a_selector_of_last_keys_collapses(
    model: OpenModel, text: NeedleText, figures: list[LayerFigures]
) -> None:
    spoiled = measure(model, [text], num_queries=12, backend=TrailingKeysOnly)
    assert text.pairs[-1][1] < LENGTH - model.model_config.index_topk
    looking = [figure for figure in spoiled if figure.attends]
    assert looking
    for figure in looking:
        assert figure.to_json()["needle_recall"][INDEXER] == 0.0
        assert figure.mass[INDEXER] == pytest.approx(figure.mass[LAST])
    assert min(min(figure.exact) for figure in spoiled) < 0.9
    best = max(figures, key=lambda figure: np.mean(figure.needle_attention)).layer
    assert sum(spoiled[best].mass[INDEXER]) < sum(figures[best].mass[INDEXER])


# A collapse exactly at index_topk: mlx-lm #1443, ik_llama.cpp #2045.


def question_after(model: OpenModel, num_tokens: int) -> list[int]:
    """A sum to be answered after a tale of at least so many tokens."""
    tale = ""
    for sentence in sentences():
        if len(model.tokenizer.encode(tale)) >= num_tokens:
            break
        tale += sentence + " "
    turns = [("user", tale.strip()), ("assistant", "Thank you."), ("user", "What is 7 plus 5?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    return model.tokenizer.apply_chat_template(messages)


def test_a_short_question_after_a_long_text(model: OpenModel) -> None:
    topk = model.model_config.index_topk
    short, long = question_after(model, topk // 4), question_after(model, 2 * topk)
    assert len(short) < topk < 2 * topk < len(long) <= LENGTH
    assert "12" in answer(model, short)[0]
    assert "12" in answer(model, long)[0]
    with recording(model.sequence.runner, "cpu", FirstKeysOnly):
        assert "12" not in answer(model, long)[0]


# A prefix cache that never hits, without a word: vLLM #44082, vllm-ascend #16270.


def hits_of_a_shared_prompt() -> tuple[int, int]:
    """Tokens found in the prefix cache, and tokens looked for, by two prompts that begin alike."""
    engine = build_engine(EngineConfig(device="cpu", max_model_len=256, max_num_seqs=2))
    shared = engine.tokenizer.encode(" ".join(sentences()[:40]))[:200]
    for number, last in enumerate((5, 6)):
        engine.add_request(str(number), [*shared, last], SamplingParams(max_tokens=1))
        while engine.has_unfinished_requests():
            engine.step()
    stats = engine.stats()
    return stats.prefix_cache_hits, stats.prefix_cache_queries


def test_shared_prompts_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    # the second prompt finds the three full blocks of its first 200 tokens
    assert hits_of_a_shared_prompt() == (192, 402)
    monkeypatch.setattr(BlockManager, "cache_full_blocks", lambda *_: None)
    assert hits_of_a_shared_prompt() == (0, 402)
