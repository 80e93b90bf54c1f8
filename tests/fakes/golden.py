"""The worked step that every position operator must reproduce: five rows, thirteen tokens."""

from __future__ import annotations

from typing import Any

import numpy as np

BLOCK_SIZE = 64
# decode, first chunk, idle, later chunk, decode with two drafts
ENCODER = [0, 5, 0, 4, 0]
DECODER = [130, 0, 0, 64, 20]
THIS_TIME = [1, 5, 0, 4, 3]
TABLES = [[7, 2, 9, -1], [4, -1, -1, -1], [-1, -1, -1, -1], [1, 6, -1, -1], [3, -1, -1, -1]]
NUM_TOKENS = 13
BATCH_IDS = [0, 1, 1, 1, 1, 1, 3, 3, 3, 3, 4, 4, 4]
CU_SEQLENS_Q = [0, 1, 6, 6, 10, 13]
POSITIONS = [130, 0, 1, 2, 3, 4, 64, 65, 66, 67, 20, 21, 22]
SLOTS = [578, 256, 257, 258, 259, 260, 384, 385, 386, 387, 212, 213, 214]
MAXIMA = [5, 5, 130, 131, 130, 131]
# (start, end) of each token's keys, those in the cache among them (#7598)
WINDOWS = [(0, 0), (1, 2), (1, 3), (1, 4), (1, 5), (1, 6)]
WINDOWS += [(6, 71), (6, 72), (6, 73), (6, 74), (0, 0), (0, 0), (0, 0)]


def tensors(**overrides: Any) -> dict[str, Any]:
    """The step's inputs as int32 tensors, by the names of ForwardMeta."""
    import paddle

    values = {
        "seq_lens_encoder": ENCODER,
        "seq_lens_decoder": DECODER,
        "seq_lens_this_time": THIS_TIME,
        "block_tables": TABLES,
        "batch_id_per_token": BATCH_IDS,
        "cu_seqlens_q": CU_SEQLENS_Q,
        **overrides,
    }
    return {name: paddle.to_tensor(np.int32(value)) for name, value in values.items()}
