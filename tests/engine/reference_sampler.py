"""The sampler's rules written plainly, one row at a time, in float64."""

from __future__ import annotations

import numpy as np

from fd_dsa.engine.sampling_params import SamplingParams


def ref_adjusted(
    logits: np.ndarray,
    params: SamplingParams,
    prompt: list[int],
    output: list[int],
    bad_sequences: list[tuple[int, ...]] = (),
    end_ids: list[int] = (),
    allowed: set[int] | None = None,
) -> np.ndarray:
    """Logits after penalties, bias and bans, token by token; float64 [vocab_size]."""
    adjusted = []
    for token, value in enumerate(logits.astype(np.float64)):
        count = output.count(token)
        if params.repetition_penalty != 1 and token in [*prompt, *output]:
            r = params.repetition_penalty
            value = value / r if value > 0 else value * r
        value -= count * params.frequency_penalty
        value -= params.presence_penalty if count else 0
        value += (params.logit_bias or {}).get(token, 0)
        banned = token in (params.bad_words_token_ids or ())
        for sequence in bad_sequences:
            before = list(sequence[:-1])
            if token == sequence[-1] and (not before or output[-len(before) :] == before):
                banned = True
        if len(output) < params.min_tokens and token in end_ids:
            banned = True
        if allowed is not None and token not in allowed:
            banned = True
        adjusted.append(-np.inf if banned else value)
    return np.array(adjusted)


def ref_distribution(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float = 0.0
) -> np.ndarray:
    """Probability of every token; float64 [vocab_size]."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    exponents = (logits.astype(np.float64) - logits.max()) / temperature
    weights = np.exp(exponents)
    if min_p > 0:
        # not of the weights, which round to 1 at high temperatures
        weights[exponents < np.log(min_p)] = 0
    if 0 < top_k < len(logits):
        order = order[:top_k]
    total = sum(weights[i] for i in order)
    kept = []
    mass = 0.0
    for i in order:
        kept.append(i)
        mass += weights[i]
        if top_p < 1 and mass >= top_p * total:
            break
    probabilities = np.zeros(len(logits))
    probabilities[kept] = weights[kept] / weights[kept].sum()
    return probabilities


def ref_uniform(seed: int, position: int) -> float:
    """SplitMix64 in Python integers: element `position` of the stream named by `seed`."""
    mask = 2**64 - 1

    def mix(state: int) -> int:
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & mask
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & mask
        return state ^ (state >> 31)

    step = (position + 1) * 0x9E3779B97F4A7C15 & mask
    return (mix((mix(seed & mask) + step) & mask) >> 11) / 2**53


def ref_token(probabilities: np.ndarray, uniform: float) -> tuple[int, float]:
    """Drawn token in the order of ids, and how near the draw was to a neighbour."""
    ends = np.cumsum(probabilities)
    token = int(np.searchsorted(ends, uniform * ends[-1], side="right"))
    return token, float(np.abs(ends - uniform * ends[-1]).min())
