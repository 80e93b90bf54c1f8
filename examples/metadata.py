"""A runner class of one's own with fd_dsa's step metadata: computed once, read by all layers.

`DSAModelRunnerMixin` calls the attention backend once a step. Layers then call `forward` of the
backend with `runner.forward_meta`.

.venv/bin/python examples/metadata.py
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from fd_dsa.attention import CacheLayout, DSAAttentionBackend, DSABackendConfig
from fd_dsa.runner import DSAModelRunnerMixin

LAYOUT = CacheLayout("fp8_ds_mla", 64, kv_lora_rank=512, qk_rope_head_dim=64, index_head_dim=128)
CONFIG = DSABackendConfig(
    num_heads=8,
    index_n_heads=64,
    index_topk=2048,
    softmax_scale=192**-0.5,
    cache_layout=LAYOUT,
    max_num_seqs=4,
    max_num_tokens=256,
    max_blocks_per_seq=16,
)


class Engine:
    """Fills lengths and block tables of a step, as your runner does."""

    def __init__(self, **rows: list[int] | list[list[int]]) -> None:
        self.rows = {name: np.array(values, np.int32) for name, values in rows.items()}

    def initialize_forward_meta(self) -> None:
        """Make the object of a step that all layers get."""
        self.forward_meta = SimpleNamespace(**self.rows)


class Runner(DSAModelRunnerMixin, Engine):
    """Adds the metadata of the step to `forward_meta`."""

    attn_backends = (DSAAttentionBackend(CONFIG, device="cpu"),)


runner = Runner(
    # one row that decodes its 71st token, in blocks 7 and 3
    seq_lens_encoder=[0],
    seq_lens_decoder=[70],
    seq_lens_this_time=[1],
    block_tables=[[7, 3] + [-1] * 14],
)
runner.initialize_forward_meta()
meta = runner.forward_meta
print("position:", meta.position_ids.tolist(), "slot:", meta.slot_mapping.tolist())
