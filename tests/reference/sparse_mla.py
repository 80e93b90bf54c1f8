"""Oracle of attention over selected keys, in doubles: latent (absorbed) and expanded form.

Source: DeepSeek-V2 (arXiv 2405.04434) §2.1.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def ref_softmax(scores: list[float]) -> list[float]:
    """Softmax of finite scores."""
    top = max(scores)
    powers = [math.exp(s - top) for s in scores]
    return [p / sum(powers) for p in powers]


def ref_attend(
    q: Any, latents: Any, selected: list[int], softmax_scale: float, kv_lora_rank: int
) -> np.ndarray:
    """float64 [num_heads, kv_lora_rank]: one token's attention over the latents it selected.

    Args:
        q: [num_heads, width] absorbed query of the token.
        latents: [n, width]; row s is the latent and the roped key of key s.
        selected: keys that the token sees; an empty selection gives zeros.
    """
    out = np.zeros((len(q), kv_lora_rank))
    for h, query in enumerate(np.asarray(q, np.float64)):
        keys = [np.asarray(latents[s], np.float64) for s in selected]
        if not keys:
            continue
        shares = ref_softmax([softmax_scale * float(query @ key) for key in keys])
        for share, key in zip(shares, keys, strict=True):
            out[h] += share * key[:kv_lora_rank]
    return out


def ref_expanded(
    q_nope: Any, q_pe: Any, latents: Any, k_pe: Any, kv_b: Any, softmax_scale: float, v_dim: int
) -> np.ndarray:
    """float64 [num_heads, v_dim]: one token's attention with keys and values of every head.

    Args:
        q_nope: [num_heads, nope_dim]; q_pe: [num_heads, rope_dim], roped.
        latents: [n, rank], normed, of the keys the token sees; k_pe: [n, rope_dim], roped.
        kv_b: [num_heads * (nope_dim + v_dim), rank] as a checkpoint stores it.
    """
    num_heads, nope_dim = q_nope.shape
    per_head = np.asarray(kv_b, np.float64).reshape(num_heads, nope_dim + v_dim, -1)
    out = np.zeros((num_heads, v_dim))
    for h in range(num_heads):
        scores, values = [], []
        for latent, key_pe in zip(latents, k_pe, strict=True):
            key = per_head[h, :nope_dim] @ latent
            scores.append(softmax_scale * float(q_nope[h] @ key + q_pe[h] @ key_pe))
            values.append(per_head[h, nope_dim:] @ latent)
        for share, value in zip(ref_softmax(scores), values, strict=True):
            out[h] += share * value
    return out
