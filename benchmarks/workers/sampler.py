"""Worker: the sampler alone, on rows of logits over a real model's vocabulary."""

from __future__ import annotations

import time
from functools import lru_cache
from itertools import count
from typing import Any

import numpy as np

_VOCAB_SIZE = 129_280
_NUM_ROWS = 32
_DEVIATION = 3.0
_TEXT_TOKENS = 1024


def write_demo_logits(path: str) -> None:
    """Logits of the demo model after each of the first tokens of a tale, float32 [1024, 4096]."""
    from fd_dsa.accuracy.embedded import open_model
    from fd_dsa.accuracy.perplexity import DEFAULT_TEXT

    model = open_model(max_model_len=_TEXT_TOKENS)
    tokens = model.tokenizer.encode(DEFAULT_TEXT.read_text("utf-8"), add_special_tokens=False)[
        :_TEXT_TOKENS
    ]
    hidden = [model.sequence.logits(states).copy() for _, states in model.sequence.chunks(tokens)]
    np.save(path, np.concatenate(hidden))


def _normal(rng: np.random.Generator) -> np.ndarray:
    """Rows of normal logits."""
    return rng.standard_normal((_NUM_ROWS, _VOCAB_SIZE), np.float32) * np.float32(_DEVIATION)


def _stretched(rng: np.random.Generator, rows: np.ndarray) -> np.ndarray:
    """Rows of logits whose quantiles are those of some of `rows`, over more ids.

    A row's logits in order are a curve; it is read at as many places as there are ids, and the
    values get ids by chance. So each share of the ids holds the share of the mass that it has in
    the model, and a nucleus has the same share of the ids.
    """
    places = np.linspace(0, rows.shape[1] - 1, _VOCAB_SIZE)
    chosen = np.sort(rows[rng.choice(len(rows), _NUM_ROWS, replace=False)], axis=1)
    curves = [np.interp(places, np.arange(rows.shape[1]), row) for row in chosen]
    return rng.permuted(np.array(curves, np.float32), axis=1)


class Sampling:
    """Samplers of a package; the same logits and seeds in each process.

    Args:
        path: file of `write_demo_logits`.
    """

    def __init__(self, path: str) -> None:
        demo = np.load(path)
        self._position = count()

        @lru_cache(maxsize=1)
        def rows(spread: str, index: int) -> np.ndarray:
            rng = np.random.default_rng(index)
            return _normal(rng) if spread == "normal" else _stretched(rng, demo)

        # logits [32, 129280] number `index` of a spread, "normal" or "demo model"
        self._rows = rows

    def _sampler(self, sampling: dict[str, Any]) -> Any:
        """A sampler whose slots all have these parameters."""
        from fd_dsa.engine.sampler import Sampler
        from fd_dsa.engine.sampling_params import SamplingParams

        sampler = Sampler(_NUM_ROWS)
        for slot in range(_NUM_ROWS):
            sampler.set_slot(slot, SamplingParams(**sampling), slot)
        return sampler

    def cpu_ms(self, spread: str, sampling: dict[str, Any], repeats: int) -> list[float]:
        """Milliseconds of processor time of each of `repeats` calls."""
        logits, sampler = self._rows(spread, 0), self._sampler(sampling)
        slots = np.arange(_NUM_ROWS)
        times = []
        for _ in range(repeats):
            positions = np.full(_NUM_ROWS, next(self._position))
            begin = time.process_time()
            sampler.sample(logits, slots, positions)
            times.append(1e3 * (time.process_time() - begin))
        return times

    def tokens(self, spread: str, index: int, samplings: list[dict[str, Any]]) -> list[list[int]]:
        """Tokens drawn in each way from the rows number `index` of a spread."""
        logits, slots = self._rows(spread, index), np.arange(_NUM_ROWS)
        positions = np.full(_NUM_ROWS, index)
        return [
            self._sampler(sampling).sample(logits, slots, positions).tolist()
            for sampling in samplings
        ]
