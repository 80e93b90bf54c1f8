"""Index lists of two DeepSeek-V4 steps with drafts, some of which are rejected later.

The example needs neither Paddle nor a GPU. Blocks hold 128 tokens. CSA entries cover 4 tokens, and
HCA entries cover 128.

.venv/bin/python examples/v4_steps.py
"""

from __future__ import annotations

import numpy as np

from fd_dsa.v4_prepare import V4Prepare, V4PrepareConfig

# the ratio of each layer, as in config.json; 0 is a layer with a window only
MODEL = {"compress_ratios": [0, 0, 4, 128, 4, 0], "sliding_window": 128, "index_topk": 512}

cfg = V4PrepareConfig.from_model(
    MODEL, max_rows=2, max_model_len=4096, num_slots=8, num_blocks=64, spec_tokens=3
)
prepare = V4Prepare(cfg, "numpy")
prepare.set_blocks(0, [7, 3])
prepare.set_blocks(1, [5])

# Row 0 goes from 126 to 130 tokens, one sampled token and three drafts. Row 1 decodes two tokens.
prepare.stage(ctx=[130, 10], q=[4, 2], slot=[1, 6])
out = prepare.expand()
print("positions:", out.positions[:6].tolist())
# The first token does not see the HCA entry that its successor at position 127 completes.
print("HCA entries of each token:", np.diff(out.hca_indptr)[:6].tolist())
print("CSA entries of each token:", out.csa_visible[:6].tolist())

# Token 1 of row 0 finishes the entry. It pools 126 sources from the state ring and two of this
# step, and the entry goes to row 7 of the pool.
token, row, position, from_state = out.plan_r2[0].tolist()
entry = int(out.plan_dst_r2[0]) - cfg.comp_base
print(f"token {token} of row {row} at {position} pools {from_state} old sources to entry {entry}")

# The host does not know yet that three drafts of row 0 were rejected, so it counts them as
# accepted. The device subtracts them.
prepare.stage(ctx=[134, 12], q=[4, 2], slot=[1, 6])
out = prepare.expand(rollback=np.array([3, 0], np.int32))
print("positions:", out.positions[:6].tolist(), "tokens after the step:", out.ctx.tolist())
prepare.poll_error()
