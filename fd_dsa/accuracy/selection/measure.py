"""Compares every layer's selection with dense attention, on texts that hide numbers.

The answer is given token by token, so at every token of the number the model must look up the next
one. The preceding token in the answer is a query, and the next token in the text is its needle. A
query at position n - 1 sees the keys at positions 0 to n - 1. A selection is an int array of
distinct positions. Everything is computed in NumPy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np

from fd_dsa.accuracy.embedded import OpenModel
from fd_dsa.accuracy.retrieval.prompts import Item, PromptBuilder, TokenCounter, passkey
from fd_dsa.accuracy.selection.topk_hook import (
    RecordingBackend,
    read_index_keys,
    read_latents,
    recording,
)
from fd_dsa.accuracy.stats import wilson
from fd_dsa.errors import ConfigError, FdDsaError

if TYPE_CHECKING:
    from fd_dsa.engine.tokenizer import Tokenizer

INDEXER, LAST, RANDOM = "indexer", "last", "random"
SELECTORS = (INDEXER, LAST, RANDOM)
"""The model's selection, the same number of last keys, and of random keys.

A random set of k of n keys holds each key, and each part of attention, with a share of k / n.
"""

ATTENDS = 0.1
"""Minimum attention of the strongest head, for a layer that looks for needles."""

# tolerance of float32 scores between two implementations, relative to the row's maximum
_SCORE_TOLERANCE = 1e-5
# multiples of the golden ratio modulo 1 are evenly spread for any count
_GOLDEN = 0.6180339887498949


@dataclass
class LayerFigures:
    """Figures of one layer over all texts.

    Attributes:
        has_indexer: False if the layer shares the selection of an earlier layer.
        needle_attention: dense attention of the strongest head on the needle, by needle query.
        found: selector -> share of the needle that is selected, by needle query.
        mass: selector -> share of dense attention on the selected keys, by query.
        exact: share of the best keys by the reference's scores that the indexer selected, by query.
            Empty without an indexer.
    """

    layer: int
    has_indexer: bool
    needle_attention: list[float] = field(default_factory=list)
    found: dict[str, list[float]] = field(default_factory=lambda: {s: [] for s in SELECTORS})
    mass: dict[str, list[float]] = field(default_factory=lambda: {s: [] for s in SELECTORS})
    exact: list[float] = field(default_factory=list)

    @property
    def attends(self) -> bool:
        """True if a head attends to the needles. Otherwise recall has no meaning."""
        return _mean(self.needle_attention) >= ATTENDS

    def to_json(self) -> dict[str, Any]:
        # a query counts as one trial
        interval = wilson(round(sum(self.found[INDEXER])), len(self.found[INDEXER]))
        return {
            "layer": self.layer,
            "has_indexer": self.has_indexer,
            "strongest_head": _mean(self.needle_attention),
            "attends": self.attends,
            "needle_recall": {s: _mean(self.found[s]) for s in SELECTORS},
            "needle_recall_interval": [interval.low, interval.high],
            "attention_mass_recall": {s: _mean(self.mass[s]) for s in SELECTORS},
            "exactness": _mean(self.exact) if self.has_indexer else None,
        }


def measure(
    model: OpenModel,
    texts: Iterable[NeedleText],
    *,
    num_queries: int,
    backend: type[RecordingBackend] = RecordingBackend,
) -> list[LayerFigures]:
    """Return the figures of every layer.

    Args:
        texts: at least one. Their prompts are longer than `index_topk`.
        num_queries: number of compared tokens of each prompt in addition to the needle queries,
            spread evenly between `index_topk` and the end.

    Raises:
        FdDsaError: dense attention is not finite.
    """
    sequence, config = model.sequence, model.config
    figures = [LayerFigures(i, kind == "full") for i, kind in enumerate(config.indexer_types)]
    with recording(sequence.runner, backend) as watching:
        for text in texts:
            first = min(config.index_topk, len(text.prompt) - 1)
            others = np.linspace(first, len(text.prompt) - 2, num_queries).astype(np.int64)
            queries = list(dict.fromkeys([*text.needles, *others.tolist()]))
            watching.watch(queries)
            # run the prompt in chunks and the answer token by token, like the engine
            for _ in sequence.chunks(text.prompt):
                pass
            for token in text.answer:
                sequence.run([token], decode=True)
            _compare(model, text, queries, watching, figures)
    return figures


def _compare(
    model: OpenModel,
    text: NeedleText,
    queries: list[int],
    watching: RecordingBackend,
    figures: list[LayerFigures],
) -> None:
    sequence, topk = model.sequence, model.config.index_topk
    slots = sequence.slots(len(text.prompt) + len(text.answer))
    scale, layout = watching.config.softmax_scale, watching.config.cache_layout
    caches = sequence.runner.caches
    for figure in figures:
        trace = watching.layers[figure.layer]
        latents = read_latents(caches[2 * figure.layer], slots, layout)
        for query in queries:
            attention = dense_attention(trace.queries[query], latents[: query + 1], scale)
            if not np.isfinite(attention).all():
                raise FdDsaError(
                    f"layer {figure.layer}: dense attention of token {query} is not finite"
                )
            needle = text.needles.get(query)
            last = np.arange(max(0, query + 1 - topk), query + 1)
            for selector, chosen in ((INDEXER, trace.selected[query]), (LAST, last)):
                figure.mass[selector].append(mass_recall(attention, chosen))
                if needle is not None:
                    figure.found[selector].append(float(needle in chosen))
            figure.mass[RANDOM].append(len(last) / (query + 1))
            if needle is not None:
                figure.found[RANDOM].append(len(last) / (query + 1))
                figure.needle_attention.append(float(attention[:, needle].max()))
        if figure.has_indexer:
            keys = read_index_keys(caches[2 * figure.layer + 1], slots, layout)
            for query in queries:
                index_query, weights = trace.index_queries[query], trace.index_weights[query]
                scores = index_scores(index_query, weights, keys[: query + 1])
                figure.exact.append(exactness(trace.selected[query], scores, topk))


def _mean(values: list[float]) -> float:
    """Return the mean, or NaN without values."""
    return sum(values) / len(values) if values else math.nan


def dense_attention(query: np.ndarray, keys: np.ndarray, softmax_scale: float) -> np.ndarray:
    """Return dense attention, float32 [num_heads, n].

    Args:
        query: float32 [num_heads, width].
        keys: float32 [n, width].
    """
    scores = (query @ keys.T) * np.float32(softmax_scale)
    scores -= scores.max(axis=1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=1, keepdims=True, dtype=np.float32)
    return scores


def mass_recall(attention: np.ndarray, selected: np.ndarray) -> float:
    """Return the share of attention [num_heads, n] on the selected keys, mean over heads."""
    return float(attention[:, selected].sum(axis=1, dtype=np.float64).mean())


def index_scores(query: np.ndarray, weights: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Return the indexer's score of each key, float32 [n].

    score[s] = sum_h weights[h] * max(query[h] . keys[s], 0). All scale factors are in `weights`
    [index_n_heads] and in the keys [n, index_head_dim]. Source: DeepSeek-V3.2 (arXiv 2512.02556)
    §2, eq. 1.
    """
    return weights @ np.maximum(query @ keys.T, np.float32(0))


def exactness(selected: np.ndarray, scores: np.ndarray, k: int) -> float:
    """Return the share of the k best keys that a selection holds, up to rounding.

    A key counts if its score is within rounding of the k-th best score, because another order of
    summation may swap two close keys.
    """
    k = min(k, len(scores))
    last = np.partition(scores, -k)[-k]
    allowed = last - _SCORE_TOLERANCE * np.abs(scores).max()
    good = np.count_nonzero(scores[selected] >= allowed)
    return good / k


@dataclass(frozen=True)
class NeedleText:
    """A conversation with the beginning of its answer, up to its last query.

    Attributes:
        needles: query -> needle, positions in prompt + answer. At the query the model must predict
            the token at the needle.
    """

    prompt: list[int]
    answer: list[int]
    needles: dict[int, int]


def needle_texts(model: OpenModel, length: int, count: int, seed: int) -> Iterator[NeedleText]:
    """Yield conversations with prompts of exactly `length` tokens, needles at all depths.

    The same arguments and tokenizer give the same conversations.
    """
    counter = TokenCounter(model.tokenizer, "--model")
    builder = PromptBuilder(counter)
    for index in range(count):
        # seeded by its own index, so that the first texts do not depend on `count`
        random = Random(f"{seed}:{length}:{index}")
        item = passkey(random, (index + 0.5) * _GOLDEN % 1)
        content = builder.build(item, length, random)
        yield _with_answer(model.tokenizer, counter.ids(content), item)


def _with_answer(tokenizer: Tokenizer, prompt: list[int], item: Item) -> NeedleText:
    """Return a conversation whose answer repeats the needle's sentence up to the number."""
    sentence, number = item.needles[0].sentence, item.references[0]
    begun = sentence[: sentence.index(number) + len(number)]
    digits = tokenizer.encode(number, add_special_tokens=False)
    answer = tokenizer.encode(begun, add_special_tokens=False)
    size = len(digits)
    places = [place for place in range(len(prompt)) if prompt[place : place + size] == digits]
    if answer[-size:] != digits or len(places) != 1:
        raise ConfigError(
            f"selection: the tokenizer splits {number!r} differently in the answer and in the text"
        )
    # the token before each digit of the answer is a query
    first = len(prompt) + len(answer) - size - 1
    needles = {first + digit: places[0] + digit for digit in range(size)}
    return NeedleText(prompt, answer[:-1], needles)
