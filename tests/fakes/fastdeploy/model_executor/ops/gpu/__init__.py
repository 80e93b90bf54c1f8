"""FastDeploy's compiled operators, in NumPy and in place; which names exist is the tree's."""

from __future__ import annotations

from typing import Any

from fastdeploy import _tree

from . import _caches, _positions, _rope, _selection, _signals

_DSA_OPS = (
    _caches.dsk_attn_write_cache,
    _caches.indexer_k_quant_and_cache,
    _caches.cp_gather_indexer_k_quant_cache,
    _selection.radix_topk_ragged_transform,
    _selection.merge_prefill_decode_output,
    _positions.get_block_shape_and_split_kv_block,
)
_OTHER_OPS = (
    _rope.fused_rotary_position_encoding,
    _signals.init_kv_signal_per_query,
    _signals.init_signal_layerwise,
    _signals.open_shm_and_get_meta_signal,
)


def _operators() -> dict[str, Any]:
    tree = _tree.current()
    found = {op.__name__: op for op in (*_OTHER_OPS, *_DSA_OPS)}
    found[tree.position_op] = _positions.POSITION_OPS[tree.position_op]
    return found


globals().update(_operators())
