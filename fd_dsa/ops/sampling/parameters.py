"""Sampling parameters of one request, and their layout in the device's record of its batch row.

The module imports no kernels, because the sampler of a CPU uses its numbers too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

# indices of a record, in int32 values; the first seven numbers have 64 bits
SCALE, MARGIN, TOP_P, REPETITION, FREQUENCY, PRESENCE, SEED = range(0, 14, 2)
TOP_K, FLAGS, NUM_ENTRIES, HEADER = 14, 15, 16, 20
# entry of a token: token, first position at which it is allowed, and a float64 bias
ENTRY = 4
MAX_ENTRIES = 4096
RECORD = HEADER + ENTRY * MAX_ENTRIES
# flags
RANDOM, PENALIZED, LISTED = 1, 2, 4
# bit of a count that marks a token of the prompt
IN_PROMPT = 1 << 30

_INT32_MAX = 2**31 - 1
GREEDY_BELOW = 1e-5
# all tokens are equally likely at this temperature; a larger one would overflow float32
MAX_TEMPERATURE = 1e30
_MASK = 2**64 - 1


@dataclass(frozen=True)
class RowParameters:
    """Sampling parameters of a batch row, with the meanings of `engine.SamplingParams`.

    Args:
        temperature: greedy below 1e-5.
        min_p, top_p: shares in [0, 1]; 0 and 1 = off.
        top_k: number of tokens, 0 = off.
        seed: seed of the random numbers, modulo 2**64.
        repetition: penalty of tokens in prompt or output, > 0; 1 = off.
        frequency, presence: penalties of a token for each and for its first place in the output.
        bias: term added to the logit of a token id.
        banned: token ids that are never sampled.
        end_ids: token ids that are not sampled at positions below `min_tokens`.
    """

    temperature: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)
    banned: Sequence[int] = ()
    end_ids: Sequence[int] = ()
    min_tokens: int = 0

    @property
    def is_penalized(self) -> bool:
        """True if logits depend on the tokens so far."""
        return (self.repetition, self.frequency, self.presence) != (1, 0, 0)

    def record(self, vocab_size: int) -> npt.NDArray[np.int32]:
        """Return the used part of the device's record of the batch row.

        Raises:
            ValueError: more than MAX_ENTRIES tokens are biased or banned.
        """
        entries = self._entries()
        if len(entries) > MAX_ENTRIES:
            raise ValueError(
                f"{len(entries)} tokens are biased or banned; the device's sampler takes at most "
                f"{MAX_ENTRIES}"
            )
        record = np.zeros(HEADER + ENTRY * len(entries), np.int32)
        temperature = min(self.temperature, MAX_TEMPERATURE)
        is_random = self.temperature >= GREEDY_BELOW
        if is_random:
            is_ranked = self.min_p > 0 or 0 < self.top_k < vocab_size
            # the CPU divides by a float32, unless it ranks candidates
            divisor = temperature if is_ranked else float(np.float32(temperature))
            margin = temperature * float(np.log(self.min_p)) if self.min_p else -math.inf
            record[SCALE:TOP_P].view(np.float64)[:] = math.log2(math.e) / divisor, margin
        penalties = self.repetition, self.frequency, self.presence
        record[TOP_P:SEED].view(np.float64)[:] = self.top_p, *penalties
        record[SEED:TOP_K].view(np.uint64)[0] = mix(self.seed & _MASK)
        record[TOP_K] = min(max(self.top_k, 0), _INT32_MAX)
        record[FLAGS] = RANDOM * is_random | PENALIZED * self.is_penalized | LISTED * bool(entries)
        record[NUM_ENTRIES] = len(entries)
        table = record[HEADER:].reshape(-1, ENTRY)
        for place, (token, (until, bias)) in zip(table, entries.items(), strict=True):
            place[:2] = token, until
            place[2:].view(np.float64)[0] = bias
        return record

    def _entries(self) -> dict[int, tuple[int, float]]:
        """Return the first allowed position and the bias of each token that has one."""
        until = dict.fromkeys(self.end_ids, min(self.min_tokens, _INT32_MAX))
        until |= dict.fromkeys(self.banned, _INT32_MAX)
        tokens = [token for token in until if until[token] > 0]
        return {
            token: (until.get(token, 0), self.bias.get(token, 0.0))
            for token in dict.fromkeys([*self.bias, *tokens])
        }


def mix(state: Any) -> Any:
    """Return SplitMix64's output for an int in [0, 2**64) or uint64."""
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
    return state ^ (state >> 31)
