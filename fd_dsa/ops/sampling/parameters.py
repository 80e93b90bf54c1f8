"""Sampling parameters of one request, and their place in the device's record of its slot.

The module needs no kernels, because the sampler of a CPU uses its numbers too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

# places in a record, in int32 values; the first seven numbers have 64 bits
SCALE, MARGIN, TOP_P, REPETITION, FREQUENCY, PRESENCE, SEED = range(0, 14, 2)
TOP_K, FLAGS, NUM_ENTRIES, HEADER = 14, 15, 16, 20
# of each entry: token, first position at which it may come, and a float64 bias
ENTRY = 4
MAX_ENTRIES = 4096
RECORD = HEADER + ENTRY * MAX_ENTRIES
# flags
RANDOM, PENALIZED, LISTED = 1, 2, 4
# bit of a count that marks a token of the prompt
IN_PROMPT = 1 << 30

_INT32_MAX = 2**31 - 1
GREEDY_BELOW = 1e-5
# all tokens are equally likely long before; what float32 cannot hold would make NaN of -inf
HOTTEST = 1e30
_MASK = 2**64 - 1


@dataclass(frozen=True)
class SlotParameters:
    """How the rows of a slot are sampled; meanings are those of `engine.SamplingParams`.

    Args:
        temperature: below 1e-5 is greedy.
        min_p, top_p: in [0, 1]; 0 and 1 = off.
        top_k: 0 = off.
        seed: of the draws, modulo 2**64.
        repetition: > 0; penalty of tokens in prompt or output. 1 = off.
        frequency, presence: penalties of a token in the output, each time and once.
        bias: token id -> what is added to its logit.
        banned: token ids that never come.
        end_ids: token ids that may not come at a position below `min_tokens`.
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
        """Whether logits depend on the tokens so far."""
        return (self.repetition, self.frequency, self.presence) != (1, 0, 0)

    def record(self, vocab_size: int) -> npt.NDArray[np.int32]:
        """The part of the device's record of the slot that is in use.

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
        temperature = min(self.temperature, HOTTEST)
        is_random = self.temperature >= GREEDY_BELOW
        if is_random:
            is_ranked = self.min_p > 0 or 0 < self.top_k < vocab_size
            # the CPU divides by a float32, except where it ranks candidates
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
        """Token -> first position at which it may come, and its bias."""
        until = dict.fromkeys(self.end_ids, min(self.min_tokens, _INT32_MAX))
        until |= dict.fromkeys(self.banned, _INT32_MAX)
        tokens = [token for token in until if until[token] > 0]
        return {
            token: (until.get(token, 0), self.bias.get(token, 0.0))
            for token in dict.fromkeys([*self.bias, *tokens])
        }


def mix(state: Any) -> Any:
    """SplitMix64's output function, of an int in [0, 2**64) or of uint64."""
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
    return state ^ (state >> 31)
