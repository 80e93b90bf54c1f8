"""Checks of the operators that make what attention asks with: projections and absorbed queries."""

from __future__ import annotations

import numpy as np

from fd_dsa.doctor.case import Memory, Outputs, require
from fd_dsa.ops.indexer_projection import project_indexer
from fd_dsa.ops.mla_query import prepare_mla_query
from fd_dsa.step.host_tensor import as_tensor

_TOKENS, _HEADS, _RANK, _ROPE = 3, 4, 512, 64
_POSITIONS = np.array([0, 7, 15], np.int64)


def indexer_projection(memory: Memory) -> Outputs:
    """Three tokens of 320 values, to keys of 128 and weights of four heads."""
    rng = np.random.default_rng(8)
    shapes = {"hidden": (_TOKENS, 320), "wk": (320, 128), "weights_proj": (320, _HEADS)}
    given = {name: rng.normal(0, 1, shape).astype(np.float32) for name, shape in shapes.items()}
    hidden, *parameters = (memory.put(array) for array in given.values())
    if memory.on_host:
        # parameters are Paddle's on a CPU, too
        parameters = [as_tensor(array) for array in parameters]
    keys, weights = project_indexer(hidden, *parameters)
    return given | {"keys": memory.get(keys), "weights": memory.get(weights)}


def is_indexer_projection(out: Outputs) -> None:
    """Both products are within the rounding of a float32 sum."""
    hidden = out["hidden"].astype(np.float64)
    for name, weight in (("keys", out["wk"]), ("weights", out["weights_proj"])):
        wanted, size = hidden @ weight, abs(hidden) @ abs(weight)
        worst = (abs(out[name] - wanted) / size).max()
        require(worst <= 2.0**-18, f"{name} are off by {worst} of the sum of their terms")


def mla_query(memory: Memory) -> Outputs:
    """Three tokens of four heads, the rotated part a slice of wider heads."""
    rng = np.random.default_rng(9)
    latent = rng.normal(0, 1, (_TOKENS, _HEADS, _RANK)).astype(np.float32)
    heads = rng.normal(0, 1, (_TOKENS, _HEADS, 2 * _ROPE)).astype(np.float32)
    angle = rng.uniform(0, 6, (16, _ROPE // 2))
    cos_sin = np.concatenate([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    query = prepare_mla_query(
        memory.put(latent),
        memory.put(heads)[:, :, _ROPE:],
        memory.put(_POSITIONS),
        memory.put(cos_sin),
    )
    return {"latent": latent, "heads": heads, "cos_sin": cos_sin, "query": memory.get(query)}


def is_mla_query(out: Outputs) -> None:
    """The latent part as it came, then neighbouring values turned by their position's angle."""
    cos, sin = (half[_POSITIONS, None] for half in np.split(out["cos_sin"], 2, axis=1))
    pe = out["heads"][:, :, _ROPE:].astype(np.float64)
    first, second = pe[..., ::2], pe[..., 1::2]
    turned = np.stack([first * cos - second * sin, second * cos + first * sin], -1)
    require(out["query"][..., :_RANK] == out["latent"], "the latent part is another")
    off = abs(out["query"][..., _RANK:] - turned.reshape(pe.shape)).max()
    require(off <= 1e-6 * (1 + abs(turned).max()), f"the rotated part is off by {off}")
