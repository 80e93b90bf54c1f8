"""Writing keys of a layer and attending to selected ones, through the caches."""

from __future__ import annotations

from collections import defaultdict
from importlib import import_module
from typing import Any

import numpy as np
import paddle
import pytest

from fd_dsa.errors import MissingStepError
from fd_dsa.ops.cache_write import CacheWriteParams
from tests.fakes import golden
from tests.fastdeploy_plugin.steps import (
    forward_meta,
    int32,
    make_backend,
    registered,
    upstream_class,
)
from tests.reference.sparse_mla import ref_attend

# of magnitude 3.5 = 448 / 128 at most, so an e4m3 cache holds them exactly
_EXACT = np.float32([-3.5, -2, -1, -0.5, 0, 0.5, 1, 2, 3.5])
TOKENS, LATENT, ROPE = golden.NUM_TOKENS, 512, 64


def exact_keys(seed: int = 0) -> np.ndarray:
    """[TOKENS, 576] float32 that the caches hold as they are."""
    rng = np.random.default_rng(seed)
    keys = rng.choice(_EXACT, (TOKENS, LATENT + ROPE))
    # every tile of 128 has the largest magnitude
    keys[:, [0, 128, 256, 384]] = 3.5
    return keys


def selection() -> np.ndarray:
    """int32 [TOKENS, 1, 131]: all keys up to a token's own, cached ones too; -1 past them."""
    chosen = np.full((TOKENS, 1, max(golden.POSITIONS) + 1), -1, np.int32)
    for token, (row, last) in enumerate(zip(golden.BATCH_IDS, golden.POSITIONS, strict=True)):
        positions = np.arange(last + 1)
        blocks = np.array(golden.TABLES[row])[positions // golden.BLOCK_SIZE]
        slots = blocks * golden.BLOCK_SIZE + positions % golden.BLOCK_SIZE
        chosen[token, 0, : last + 1] = slots
    return chosen


def query(heads: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((TOKENS, heads, 576)).astype(np.float32)


def expected(q: np.ndarray, keys: np.ndarray, chosen: np.ndarray, scale: float) -> np.ndarray:
    """Attention of each token over the keys it selected, in doubles."""
    # what earlier steps have left is zero
    by_slot = defaultdict(lambda: np.zeros(LATENT + ROPE))
    by_slot.update(zip(golden.SLOTS, keys, strict=True))
    rows = [
        ref_attend(one, by_slot, [s for s in slots[0] if s >= 0], scale, LATENT)
        for one, slots in zip(q, chosen.tolist(), strict=True)
    ]
    return np.stack(rows)


def written(backend: Any, meta: Any, keys: np.ndarray) -> None:
    """Latents of layer 0, without rotation and norm, which the layers' own tests have."""
    unit = np.tile(np.float32([1, 0]).repeat(ROPE // 2), (256, 1))
    params = CacheWriteParams("fp8_ds_mla")
    backend.write_layer(paddle.to_tensor(keys), None, unit, params, 0, meta)


@pytest.mark.parametrize("heads", [128, 64, 32, 16, 8])
def test_each_token_attends_once_through_the_cache(heads: int) -> None:
    """Prefill and decode rows in one call, on physical slots, for every share of 128 heads."""
    keys, q, chosen = exact_keys(), query(heads), selection()
    with registered():
        backend = make_backend(num_heads=heads)
        meta = forward_meta(backend)
        backend.init_attention_metadata(meta)
        written(backend, meta, keys)
        out = backend.current_core().attend(paddle.to_tensor(q), paddle.to_tensor(chosen), 0, meta)
        scale = backend.attn_softmax_scale
        found = np.asarray(out.reshape_([-1, heads, LATENT]))
    np.testing.assert_allclose(found, expected(q, keys, chosen, scale), rtol=1e-4, atol=1e-5)


def test_padded_tokens_write_nothing_and_attend_to_nothing() -> None:
    keys, q = exact_keys(), query(8)
    with registered():
        backend = make_backend()
        # three rows of one token each; ten launched ones are padding
        few = {
            "seq_lens_encoder": int32([0, 0, 0]),
            "seq_lens_decoder": int32([130, 3, 20]),
            "seq_lens_this_time": int32([1, 1, 1]),
            "block_tables": int32([[7, 2, 9, -1], [4, -1, -1, -1], [3, -1, -1, -1]]),
        }
        meta = forward_meta(backend, **few)
        for cache in meta.caches:
            cache.fill_(0xAB)
        backend.init_attention_metadata(meta)
        chosen = np.full((TOKENS, 1, 2), -1, np.int32)
        chosen[:3, 0, 0] = [578, 259, 212]
        written(backend, meta, keys)
        out = backend.current_core().attend(paddle.to_tensor(q), paddle.to_tensor(chosen), 0, meta)
        latents = np.asarray(meta.caches[0]).reshape(-1, 656)
        assert (np.asarray(out)[3:] == 0).all()
        touched = np.flatnonzero((latents != 0xAB).any(axis=1))
        assert touched.tolist() == [212, 259, 578]
        assert (np.asarray(meta.caches[1]) == 0xAB).all()


def test_what_is_missing_is_named() -> None:
    """A selection, and caches."""
    with registered():
        backend = make_backend()
        meta = forward_meta(backend)
        backend.init_attention_metadata(meta)
        with pytest.raises(MissingStepError, match="layer 3 has no selection"):
            backend.current_core().attend(paddle.to_tensor(query(8)), None, 3, meta)
        meta.caches = None
        with pytest.raises(MissingStepError, match=r"forward_meta.caches\[0\] is None"):
            written(backend, meta, exact_keys())


def test_other_models_find_the_static_form_under_the_name_that_is_ours() -> None:
    """Sliding windows of MLA and of fallback models (#8060, #8090) call FastDeploy's own."""
    with registered():
        ours = import_module("fastdeploy.model_executor.layers.attention").DSAAttentionBackend
        assert ours.forward_static is upstream_class().forward_static
