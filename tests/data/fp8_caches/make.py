"""Writes the .npz files beside it: cache writes and queries, and every byte of their results.

    python -m tests.data.fp8_caches.make

The bytes come from tests/reference (float32.py, fp8.py), which computes one number at a time and
imports nothing of fd_dsa, so any implementation can be held against them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._harness import parser_of
from tests.reference import float32 as ref
from tests.reference.fp8 import ref_index_key, ref_record

HERE = Path(__file__).parent
UNTOUCHED = 0xA5
RANK, ROPE, DIM, BLOCK, NUM_BLOCKS, HEADS, POSITIONS = 512, 64, 128, 64, 2, 2, 9
# the last slots of a block and of the cache among them, one that is padding, one past the cache
SLOTS = [63, 0, -1, 64, 127, 17, NUM_BLOCKS * BLOCK]
CASES: dict[str, dict[str, Any]] = {
    "half-split": {},
    "interleaved": {"interleave": True, "kv_norm_eps": 1e-2, "k_norm_eps": 1e-3},
    "float-scales": {"scale_fmt": None},
    "hadamard": {"hadamard": True, "interleave": True},
    "ready-made": {"ready": True},
    "ready-made-float-scales": {"ready": True, "scale_fmt": None},
}
DEFAULTS = {
    "interleave": False,
    "kv_norm_eps": 1e-6,
    "k_norm_eps": 1e-6,
    "scale_fmt": "ue8m0",
    "hadamard": False,
    "ready": False,
}


def special_rows(rng: np.random.Generator, width: int) -> np.ndarray:
    """float32 [7, width]: zeros, tiny, huge, halves between codes, one NaN, one infinity."""
    rows = rng.standard_normal((len(SLOTS), width)).astype(np.float32)
    rows[0] = 0.0
    rows[0, 1::2] = -0.0
    rows[1] *= np.float32(1e-40)
    # absmax 448 * 2^k: the scale is a power of two and quotients are the values themselves
    rows[3] = (rng.integers(0, 1 << 12, width) / 256.0).astype(np.float32)
    rows[3, ::128] = 448.0
    rows[4] *= np.float32(3e37)
    rows[4, 5] = np.inf
    rows[5, 7] = np.nan
    return rows


def case_inputs(name: str, options: dict[str, Any]) -> dict[str, np.ndarray]:
    """The arrays that an implementation gets."""
    rng = np.random.default_rng(sorted(CASES).index(name))
    n = len(SLOTS)
    angles = rng.uniform(-3, 3, (POSITIONS, ROPE // 2))
    inputs = {
        "kv_a": rng.standard_normal((n, RANK + ROPE)).astype(np.float32),
        "index_k": (0.5 + 2 * rng.standard_normal((n, DIM))).astype(np.float32),
        "slot_mapping": np.array(SLOTS, np.int64),
        "position_ids": rng.permutation(POSITIONS)[:n].astype(np.int64),
        "cos_sin_cache": np.concatenate([np.cos(angles), np.sin(angles)], 1).astype(np.float32),
        "kv_norm_weight": rng.uniform(0.5, 2, RANK).astype(np.float32),
        "k_norm_weight": rng.uniform(0.5, 2, DIM).astype(np.float32),
        "k_norm_bias": rng.standard_normal(DIM).astype(np.float32),
        "q": (3 * rng.standard_normal((n, HEADS, DIM))).astype(np.float32),
        "weights": rng.standard_normal((n, HEADS)).astype(np.float32),
        "weights_scale": np.float64(HEADS**-0.5 * DIM**-0.5),
    }
    if options["ready"]:
        inputs["kv_a"][:, :RANK] = special_rows(rng, RANK)
        inputs["index_k"] = special_rows(rng, DIM)
    return inputs


def written(inputs: dict[str, np.ndarray], options: dict[str, Any]) -> dict[str, np.ndarray]:
    """Both caches after the write."""
    latent = np.full((NUM_BLOCKS, 1, BLOCK, 656), UNTOUCHED, np.uint8)
    index = np.full((NUM_BLOCKS, BLOCK, 132), UNTOUCHED, np.uint8)
    ready = options["ready"]
    rms = None if ready else inputs["kv_norm_weight"].tolist()
    layer = None if ready else inputs["k_norm_weight"].tolist()
    for token, slot in enumerate(SLOTS):
        if not 0 <= slot < NUM_BLOCKS * BLOCK:
            continue
        row, key = inputs["kv_a"][token].tolist(), inputs["index_k"][token].tolist()
        angles = inputs["cos_sin_cache"][inputs["position_ids"][token]].tolist()
        c, k_pe = ref.ref_latent(row[:RANK], rms, options["kv_norm_eps"]), row[RANK:]
        key = ref.ref_key(key, layer, inputs["k_norm_bias"].tolist(), options["k_norm_eps"])
        if not ready:
            k_pe = ref.ref_rope(k_pe, angles, True)
            key = ref.ref_rope(key, angles, options["interleave"])
        if options["hadamard"]:
            key = ref.ref_hadamard(key)
        codes, scale = ref_index_key(key, options["scale_fmt"])
        block, offset = divmod(slot, BLOCK)
        latent[block, 0, offset] = ref_record(c, k_pe)
        planes = index[block].reshape(-1)
        planes[offset * DIM : (offset + 1) * DIM] = codes
        start = BLOCK * DIM + 4 * offset
        planes[start : start + 4] = np.float32([scale]).view(np.uint8)
    return {"latent_cache": latent, "index_cache": index}


def queries(inputs: dict[str, np.ndarray], options: dict[str, Any]) -> dict[str, np.ndarray]:
    """Codes and folded weights of the queries."""
    codes = np.empty(inputs["q"].shape, np.uint8)
    weights = np.empty(inputs["weights"].shape, np.float32)
    for t, heads in enumerate(inputs["q"].tolist()):
        angles = inputs["cos_sin_cache"][inputs["position_ids"][t]].tolist()
        for h, row in enumerate(heads):
            head = ref.ref_rope(row, angles, options["interleave"])
            head = ref.ref_hadamard(head) if options["hadamard"] else head
            codes[t, h], scale = ref_index_key(head, options["scale_fmt"])
            # float32 arithmetic of NumPy's scalars
            weights_scale = np.float32(inputs["weights_scale"])
            weights[t, h] = (inputs["weights"][t, h] * weights_scale) * scale
    return {"q_codes": codes, "q_weights": weights}


def main() -> int:
    """Write one file a case; returns 0."""
    for name, changes in CASES.items():
        options = DEFAULTS | changes
        inputs = case_inputs(name, options)
        results = written(inputs, options) | queries(inputs, options)
        settings = {key: np.array(str(value)) for key, value in options.items()}
        np.savez_compressed(HERE / f"{name}.npz", **inputs, **results, **settings)
        print(HERE / f"{name}.npz")
    return 0


if __name__ == "__main__":
    parser_of(__doc__).parse_args()
    raise SystemExit(main())
