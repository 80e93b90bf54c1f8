"""Operators on Paddle tensors: select keys by the indexer's scores and attend only to them.

Decodes one token of one sequence with five cached keys. Operators need neither engine nor model.

.venv/bin/python examples/operators.py
"""

from __future__ import annotations

import paddle

from fd_dsa.ops import indexer_logits, sparse_mla, step_metadata, topk_indices

BLOCK_SIZE, NUM_BLOCKS, TOPK = 2, 6, 3

paddle.seed(0)
# Four tokens are in the cache, and the fifth is computed: blocks 1, 0 and 2, two tokens each.
lengths = [paddle.to_tensor([count], dtype="int32") for count in (0, 4, 1)]
block_tables = paddle.to_tensor([[1, 0, 2]], dtype="int32")

# 1. What all layers of a step share is computed once.
step = step_metadata(*lengths, block_tables, block_size=BLOCK_SIZE)
print("position and slot of the new token:", step.position_ids.item(), step.slot_mapping.item())

# 2. The indexer scores every key of the sequence.
index_keys = paddle.randn([NUM_BLOCKS, BLOCK_SIZE, 128])
queries, weights = paddle.randn([1, 8, 128]), paddle.ones([1, 8])
scores = indexer_logits(queries, weights, index_keys, step)

# 3. The highest scores select keys: as positions to read, and as slots of the cache to use.
seen = paddle.to_tensor([5])
print("selected positions:", topk_indices(scores, seen, TOPK)[0].tolist())
pages = {"batch_ids": step.batch_id_per_token, "block_tables": block_tables}
slots = topk_indices(scores, seen, TOPK, **pages, block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS)

# 4. Attention reads only the latents of the selected slots.
latents = paddle.randn([NUM_BLOCKS * BLOCK_SIZE, 576])
out = sparse_mla(paddle.randn([1, 16, 576]), latents, slots, softmax_scale=0.1)
print("attention output:", out.shape)
