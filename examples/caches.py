"""An FP8 cache: find the slots of a step's tokens, write their keys there, and read them back.

Queries of the indexer are quantised the same way. Operators need neither engine nor model.

.venv/bin/python examples/caches.py
"""

from __future__ import annotations

import paddle

from fd_dsa.ops import (
    CacheWriteParams,
    dequantize,
    indexer_query,
    position_ids,
    step_metadata,
    write_caches,
)

NUM_BLOCKS, BLOCK_SIZE, NUM_TOKENS = 2, 64, 4

paddle.seed(0)
# Row 0 has three tokens of a prompt after two cached ones, and row 1 decodes its fifth token.
lengths = [paddle.to_tensor(counts, dtype="int32") for counts in ([3, 0], [2, 4], [3, 1])]
block_tables = paddle.to_tensor([[1], [0]], dtype="int32")

# 1. Slots are block * 64 + offset, the same in every layer.
step = step_metadata(*lengths, block_tables, block_size=BLOCK_SIZE)
print("positions:", step.position_ids.tolist(), "slots:", step.slot_mapping.tolist())

# FastDeploy's operator computes only positions, and leaves the elements after the last token.
positions = paddle.full([NUM_TOKENS + 2], -1, "int32")
position_ids(*lengths, positions)
print("by FastDeploy's operator:", positions.tolist())

# 2. One launch norms, rotates and quantises the keys of a layer, and writes both caches.
latents = paddle.zeros([NUM_BLOCKS, 1, BLOCK_SIZE, 656], "uint8")
index_keys = paddle.zeros([NUM_BLOCKS, BLOCK_SIZE, 132], "uint8")
keys, index_k = paddle.randn([NUM_TOKENS, 576]), paddle.randn([NUM_TOKENS, 128])
# cos 1 and sin 0 keep the keys as they are
cos_sin = paddle.concat([paddle.ones([NUM_TOKENS, 32]), paddle.zeros([NUM_TOKENS, 32])], axis=1)
params = CacheWriteParams("fp8_ds_mla")
write_caches(keys, index_k, None, step.slot_mapping, cos_sin, latents, index_keys, params)

# 3. Queries of the indexer become codes, and their scales are folded into the head weights.
queries, weights = paddle.randn([NUM_TOKENS, 64, 128]), paddle.randn([NUM_TOKENS, 64])
codes, folded = indexer_query(queries, weights, None, cos_sin)
print("codes:", [*codes.shape], "folded weights:", [*folded.shape])

# 4. A record reads back within the rounding of e4m3.
values = dequantize(latents.reshape([NUM_BLOCKS * BLOCK_SIZE, 656]), step.slot_mapping)
print("error of a key below 0.2:", bool((values - keys).abs().max() < 0.2))
