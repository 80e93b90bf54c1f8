"""Runs needle texts through a model and compares every layer's selection with dense attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fd_dsa.accuracy.embedded import OneSequence, OpenModel
from fd_dsa.accuracy.selection.metrics import (
    dense_attention,
    exactness,
    index_scores,
    last_keys,
    mass_recall,
    needle_recall,
    random_keys,
    strongest_head,
)
from fd_dsa.accuracy.selection.needles import NeedleText
from fd_dsa.accuracy.selection.tap import (
    LayerTrace,
    RecordingBackend,
    read_index_keys,
    read_latents,
    recording,
)
from fd_dsa.accuracy.stats import Estimate, wilson
from fd_dsa.errors import FdDsaError

INDEXER, LAST, RANDOM = "indexer", "last", "random"
SELECTORS = (INDEXER, LAST, RANDOM)
"""What is compared: the model's choice, as many last keys, as many random ones."""

ATTENDS = 0.1
"""Attention of a layer's strongest head from which on the layer counts as looking at needles."""

# random sets of a query, of which the mean is told
_DRAWS = 16
# tokens around the hidden number that are drawn
_BEFORE, _BEHIND = 20, 16


@dataclass
class LayerFigures:
    """One layer over all texts.

    Attributes:
        layer: its index.
        has_indexer: False where it shares the selection of a layer before it.
        needle_attention: strongest head's dense attention on the needle, by needle query.
        found: selector -> share of the needle that is selected, by needle query.
        mass: selector -> share of dense attention on the selected keys, by query; needle queries
            first, then the others of a text.
        exact: share of the best keys by the reference's scores that the indexer chose, by query;
            empty without an indexer.
    """

    layer: int
    has_indexer: bool
    needle_attention: list[float] = field(default_factory=list)
    found: dict[str, list[float]] = field(default_factory=lambda: {s: [] for s in SELECTORS})
    mass: dict[str, list[float]] = field(default_factory=lambda: {s: [] for s in SELECTORS})
    exact: list[float] = field(default_factory=list)

    @property
    def strongest(self) -> float:
        """Mean of `needle_attention`."""
        return _mean(self.needle_attention)

    @property
    def attends(self) -> bool:
        """True if a head attends to the needles: only then recall says something."""
        return self.strongest >= ATTENDS

    def recall(self, selector: str) -> Estimate:
        """Mean needle recall, a query counting as one trial."""
        found = self.found[selector]
        interval = wilson(round(sum(found)), len(found))
        return Estimate(_mean(found), interval.low, interval.high)

    def to_json(self) -> dict[str, Any]:
        """The figures as a JSON object."""
        recall = self.recall(INDEXER)
        return {
            "layer": self.layer,
            "has_indexer": self.has_indexer,
            "strongest_head": self.strongest,
            "attends": self.attends,
            "needle_recall": {s: _mean(self.found[s]) for s in SELECTORS},
            "needle_recall_interval": [recall.low, recall.high],
            "needle_queries": len(self.needle_attention),
            "attention_mass_recall": {s: _mean(self.mass[s]) for s in SELECTORS},
            "least_attention_mass_recall": min(self.mass[INDEXER], default=math.nan),
            "mass_queries": len(self.mass[INDEXER]),
            "exactness": _mean(self.exact) if self.has_indexer else None,
        }


@dataclass(frozen=True)
class Example:
    """What every layer chose in one text, to be drawn.

    Attributes:
        num_keys: keys that the first query sees.
        needle: position that it looks for, the number's first.
        num_needle_tokens: tokens of the number.
        selected: for each layer, the positions that the first query attends to.
        first: position of the first token near the number.
        near: texts of the tokens from there to some behind the number.
        shares: for each layer and of these tokens, the share of the number's queries that
            attend to it.
    """

    num_keys: int
    needle: int
    num_needle_tokens: int
    selected: tuple[tuple[int, ...], ...]
    first: int
    near: tuple[str, ...]
    shares: tuple[tuple[float, ...], ...]


def measure(
    model: OpenModel,
    texts: Iterable[NeedleText],
    *,
    num_queries: int,
    seed: int = 0,
    backend: type[RecordingBackend] = RecordingBackend,
    tell: Callable[[], None] = lambda: None,
) -> tuple[list[LayerFigures], Example]:
    """Figures of every layer, and the example: the first query of the first text.

    Args:
        model: open, and used by nobody else.
        texts: at least one, their prompts longer than `index_topk`.
        num_queries: tokens of each prompt that attention mass is looked at for, beside the needle
            queries; they lie evenly between `index_topk` and the prompt's end.
        seed: of the random sets.
        backend: what the layers call.
        tell: called after every text.

    Raises:
        FdDsaError: attention is not finite; says where.
        ValueError: no text.
    """
    runner, config = model.sequence.runner, model.model_config
    figures = [LayerFigures(i, kind == "full") for i, kind in enumerate(config.indexer_types)]
    generator = np.random.default_rng(seed)
    example = None
    with recording(runner, model.device, backend) as watching:
        for text in texts:
            first = min(config.index_topk, len(text.prompt) - 1)
            others = np.linspace(first, len(text.prompt) - 2, num_queries).astype(np.int64)
            queries = list(dict.fromkeys([*text.queries, *others.tolist()]))
            watching.watch(queries)
            _run(model.sequence, text)
            _compare(model, text, queries, watching, figures, generator)
            example = example or _example(model, text, watching)
            tell()
    if example is None:
        raise ValueError("texts: none was given, at least one is needed")
    return figures, example


def _run(sequence: OneSequence, text: NeedleText) -> None:
    """The prompt in chunks, the answer token by token, as the engine runs a request."""
    sequence.restart()
    for _ in sequence.chunks(text.prompt):
        pass
    for token in text.answer:
        sequence.run([token], decode=True)


def _compare(
    model: OpenModel,
    text: NeedleText,
    queries: list[int],
    watching: RecordingBackend,
    figures: list[LayerFigures],
    generator: np.random.Generator,
) -> None:
    """Add what one text showed to the figures of every layer."""
    sequence, topk = model.sequence, model.model_config.index_topk
    size = watching.block_size
    positions = np.arange(text.num_tokens)
    slots = sequence.block_table[positions // size].astype(np.int64) * size + positions % size
    layout, caches = watching.config.cache_layout, sequence.runner.caches
    # the same random sets for all layers
    drawn = {p: [random_keys(p + 1, topk, generator) for _ in range(_DRAWS)] for p in queries}
    needles = dict(text.pairs)
    for figure in figures:
        trace = watching.layers[figure.layer]
        latents = read_latents(caches[2 * figure.layer], slots, layout)
        keys = None
        if figure.has_indexer:
            keys = read_index_keys(caches[2 * figure.layer + 1], slots, layout)
        for query in queries:
            attention = dense_attention(
                trace.queries[query], latents[: query + 1], watching.config.softmax_scale
            )
            if not np.isfinite(attention).all():
                raise FdDsaError(
                    f"layer {figure.layer}: dense attention of token {query} is not finite"
                )
            chosen = {
                INDEXER: [trace.selected[query]],
                LAST: [last_keys(query + 1, topk)],
                RANDOM: drawn[query],
            }
            for selector, sets in chosen.items():
                figure.mass[selector].append(_mean([mass_recall(attention, s) for s in sets]))
            if query in needles:
                needle = [needles[query]]
                figure.needle_attention.append(strongest_head(attention, needle))
                for selector, sets in chosen.items():
                    found = _mean([needle_recall(s, needle) for s in sets])
                    figure.found[selector].append(found)
            if keys is not None:
                figure.exact.append(_exactness(trace, query, keys, topk))


def _exactness(trace: LayerTrace, query: int, keys: np.ndarray, topk: int) -> float:
    """See `exactness`; of one recorded query."""
    scores = index_scores(trace.index_queries[query], trace.index_weights[query], keys[: query + 1])
    return exactness(trace.selected[query], scores, topk)


def _example(model: OpenModel, text: NeedleText, watching: RecordingBackend) -> Example:
    """What the layers chose where the tokens of the number are due."""
    query, needle = text.pairs[0]
    layers = [watching.layers[layer] for layer in sorted(watching.layers)]
    selected = tuple(tuple(trace.selected[query].tolist()) for trace in layers)
    first, end = max(0, needle - _BEFORE), min(text.pairs[-1][1] + _BEHIND, len(text.prompt))
    positions = np.arange(first, end)
    shares = [
        np.mean([np.isin(positions, trace.selected[query]) for query in text.queries], axis=0)
        for trace in layers
    ]
    near = tuple(model.tokenizer.decode([token]) for token in text.prompt[first:end])
    told = tuple(tuple(row.tolist()) for row in shares)
    return Example(query + 1, needle, len(text.pairs), selected, first, near, told)


def _mean(values: list[float]) -> float:
    """Mean; NaN without values."""
    return sum(values) / len(values) if values else math.nan
