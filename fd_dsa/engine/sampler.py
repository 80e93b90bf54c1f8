"""From logits to tokens, for all rows of a step at once.

Random numbers are counter-based: each is a function of (seed, position) and of nothing else.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fd_dsa.engine.draws import RowDraw
from fd_dsa.engine.logit_rules import LogitRules, apply_rules
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.ops.sampling.parameters import GREEDY_BELOW, MAX_TEMPERATURE, mix
from fd_dsa.ops.sampling.token_buffer import NO_TOKEN, NOT_FINITE

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


class Sampler:
    """Samples one token for each row; parameters are kept by slot.

    The rules of the request (`logit_rules`), then temperature, then min-p (at least this share of
    the largest probability), then top-k (the k largest logits, ties to the lower id), then top-p
    (the fewest largest of those with at least this share of their mass), then one draw by inverse
    distribution function in the order of ids. Exact: no probability is left out or approximated
    beyond rounding. A row's token depends on its logits, parameters, seed and position only.
    """

    def __init__(self, max_num_seqs: int) -> None:
        self._draws: list[tuple[float, float, int, float]] = [(1.0, 0.0, 0, 1.0)] * max_num_seqs
        self._seeds = np.zeros(max_num_seqs, np.uint64)
        self._is_random = np.zeros(max_num_seqs, bool)
        self._is_ruled = np.zeros(max_num_seqs, bool)
        self._rules: list[LogitRules | None] = [None] * max_num_seqs
        self._row_draw: RowDraw | None = None

    def set_slot(
        self, slot: int, params: SamplingParams, seed: int, rules: LogitRules | None = None
    ) -> None:
        """Parameters of the request that has taken a slot, and its rules if it has any."""
        temperature = min(params.temperature, MAX_TEMPERATURE)
        self._draws[slot] = (temperature, params.min_p, max(params.top_k, 0), params.top_p)
        self._seeds[slot] = seed % 2**64
        self._is_random[slot] = params.temperature >= GREEDY_BELOW
        self._is_ruled[slot] = rules is not None
        self._rules[slot] = rules

    def sample(self, logits: Float32, slots: Int64, positions: Int64) -> Int64:
        """One token for each row.

        Args:
            logits: float32 [n, vocab_size]; stay as they are.
            slots: int64 [n]; slot of each row.
            positions: int64 [n]; position of the token in the output of its request, from 0.

        Returns:
            int64 [n]; token ids, NOT_FINITE where the logits are unusable, NO_TOKEN where the
            rules leave nothing. Greedy ties go to the lowest id.

        Cost: greedy rows one pass; others a few passes, most of them over what is in the
        processor's cache, and sorts of small candidate sets; rows with rules one copy more.
        """
        is_random, is_ruled = self._is_random[slots], self._is_ruled[slots]
        if not is_ruled.any():
            return self._choose(logits, slots, positions, is_random)
        tokens = self._choose(logits, slots, positions, is_random & ~is_ruled)
        ruled = np.flatnonzero(is_ruled & (tokens != NOT_FINITE))
        if len(ruled):
            adjusted = logits[ruled]
            rules = [self._rules[slot] for slot in slots[ruled].tolist()]
            apply_rules(adjusted, [rule for rule in rules if rule is not None])
            chosen = self._choose(adjusted, slots[ruled], positions[ruled], is_random[ruled])
            tokens[ruled] = np.where(chosen == NOT_FINITE, NO_TOKEN, chosen)
        return tokens

    def _choose(
        self, logits: Float32, slots: Int64, positions: Int64, is_drawn: npt.NDArray[np.bool_]
    ) -> Int64:
        """Drawn tokens of some rows, the largest logit's of the others; no rules."""
        tokens = np.empty(len(logits), np.int64)
        tokens.fill(NOT_FINITE)
        (greedy,), (drawn,) = (~is_drawn).nonzero(), is_drawn.nonzero()
        if len(greedy):
            rows = logits if len(greedy) == len(logits) else logits[greedy]
            best = rows.argmax(axis=1)
            # argmax stops at a NaN, so the largest value shows whether the row is usable
            usable = np.isfinite(rows[np.arange(len(rows)), best])
            tokens[greedy[usable]] = best[usable]
        if len(drawn):
            slots = slots[drawn]
            numbers = uniforms(self._seeds[slots], positions[drawn])
            if self._row_draw is None or self._row_draw.vocab_size != logits.shape[1]:
                self._row_draw = RowDraw(logits.shape[1])
            draw = self._row_draw.draw
            with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
                for row, slot, number in zip(
                    drawn.tolist(), slots.tolist(), numbers.tolist(), strict=True
                ):
                    tokens[row] = draw(logits[row], number, *self._draws[slot])
        return tokens


def uniforms(seeds: UInt64, positions: Int64) -> npt.NDArray[np.float64]:
    """Uniform numbers in [0, 1), one for each pair.

    u = mix(mix(seed) + (position + 1) * golden) / 2**64, cut to 53 bits.

    Args:
        seeds: uint64 [n].
        positions: int64 [n]; position of the token in its output, from 0.

    Returns:
        float64 [n].

    Source: SplitMix64 (Steele, Lea, Flood 2014); a seed names one of its streams, a position the
    element of the stream.
    """
    steps = (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
    bits = mix(mix(seeds) + steps) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53


def derive_seed(engine_seed: int, arrival: int) -> int:
    """Seed in [0, 2**64) of a request that brings none, from its arrival number."""
    base: int = mix((engine_seed ^ 0xBF58476D1CE4E5B9) & _MASK)
    seed: int = mix(base + (arrival + 1) * _GOLDEN & _MASK)
    return seed
