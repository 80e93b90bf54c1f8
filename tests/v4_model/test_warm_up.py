"""Steps of the warm-up on a device, with the index arrays of NumPy."""

from __future__ import annotations

import numpy as np

from fd_dsa.models.registry import config_from_dict
from fd_dsa.runner import InputBatch
from fd_dsa.startup.trial_rows import fill_rows
from fd_dsa.startup.trial_steps import dense_steps, sparse_steps
from fd_dsa.v4_attention.pools import prepare_sizes
from fd_dsa.v4_prepare import V4Prepare
from tests.v4_model.cases import CASES


def test_every_step_is_valid_and_some_select() -> None:
    config, batch = config_from_dict(CASES["mixed"].config), InputBatch(4, 64, 8, 16)
    prepare = V4Prepare(prepare_sizes(config, batch, 9), "numpy")
    slots, selecting = np.arange(4, dtype=np.int32), set()
    for steps in (dense_steps, sparse_steps):
        for rows in steps(batch, config.max_dense_keys):
            fill_rows(batch, rows)
            end = batch.num_rows
            q = batch.num_scheduled_tokens[:end]
            length = batch.num_computed_tokens[:end] + q
            prepare.stage(length, q, slots[:end], batch.block_tables[:end])
            visible = prepare.expand().csa_visible.max()
            selecting.add((q.max() > 1, visible > config.index_topk))
    assert selecting == {(p, s) for p in (False, True) for s in (False, True)}
