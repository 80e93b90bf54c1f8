"""The compiled expand kernel at real sizes, and ten thousand times."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fd_dsa.v4_prepare import OUTPUT_SHAPES, V4PrepareConfig
from tests.v4_prepare.cases import (
    Place,
    Step,
    assert_same,
    expected,
    make_step,
    rejected_drafts,
    serving_config,
)

pytestmark = pytest.mark.gpu

Rows = list[tuple[int, int]]
LONG = 131_072


def _ragged(num_rows: int, longest: int, drafts: int) -> Rows:
    """Rows of many lengths with 0..drafts + 1 tokens each."""
    return [(n * 7919 % longest, (n * 31 + 1) % (drafts + 2)) for n in range(num_rows)]


SERVING: dict[str, tuple[V4PrepareConfig, Rows]] = {
    "1 x 1k": (serving_config(1, 1024, 0), [(1000, 1)]),
    "128 x 8k, 1 draft": (serving_config(128, 8192, 1), [(8190 - n, 2) for n in range(128)]),
    "256 x 128k, 3 drafts": (serving_config(256, LONG, 3), [(LONG - 9 * n, 4) for n in range(256)]),
    "256 ragged": (serving_config(256, LONG, 3), _ragged(200, LONG, 3)),
    "300 rows": (serving_config(300, 4096, 1), _ragged(300, 4096, 1)),
    "1500 rows": (serving_config(1500, 2048, 0), _ragged(1500, 2048, 0)),
    "8 x 1M, table": (
        serving_config(8, 1 << 20, 3, hca_mode="table"),
        [((1 << 20) - 5 * n, 4) for n in range(8)],
    ),
    "2 x 1M, lists": (serving_config(2, 1 << 20, 1), [(1 << 20, 2), ((1 << 20) - 999, 2)]),
    "paged": (serving_config(64, 16384, 1, swa="paged"), _ragged(64, 16384, 1)),
    "a chunk of 8k among decode rows": (
        serving_config(129, 16384, 1, max_num_tokens=8448, max_tokens_per_seq=8192),
        [*_ragged(128, 16384, 1), (5000, 8192)],
    ),
    "chunks of 4k, paged": (
        serving_config(4, 16384, 1, max_num_tokens=16384, max_tokens_per_seq=4096, swa="paged"),
        [(0, 4096), (4096, 4096), (9999, 4096), (77, 3)],
    ),
}


@pytest.mark.parametrize("name", SERVING)
def test_sizes_of_real_serving(name: str) -> None:
    cfg, rows = SERVING[name]
    place, rng = Place("torch"), np.random.default_rng(8)
    prepare, steps = place.prepare(cfg), []
    for cut in (1, 2):
        step = make_step(cfg, rows[::cut], rng)
        steps.append(step)
        assert_same(place.run(prepare, step), expected(cfg, step))
        rollback = rejected_drafts(step, cfg.spec_tokens, rng)
        assert_same(place.run(prepare, step, rollback), expected(cfg, step, rollback))
    prepare.poll_error()
    place.assert_nothing_else(prepare, *steps)


def test_ten_thousand_steps_write_the_same_bytes() -> None:
    import torch

    place, rng = Place("torch"), np.random.default_rng(11)
    cfg = serving_config(128, 8192, 3)
    prepare = place.prepare(cfg)
    step = make_step(cfg, _ragged(120, 8192, 3), rng)
    wanted = place.run(prepare, step)
    assert_same(wanted, expected(cfg, step))
    total = int(wanted["counts"][2])
    tensors = {name: getattr(prepare.buffers, name) for name in OUTPUT_SHAPES(cfg)}
    held = {name: tensor.clone() for name, tensor in tensors.items()}
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(10_000):
        for tensor in tensors.values():
            tensor.fill_(-91)
        prepare.stage(step.ctx, step.q, step.slot)
        prepare.expand()
        for name, tensor in tensors.items():
            same = tensor == held[name]
            different += (~(same[:total] if name == "hca_idx" else same)).sum()
    assert different.item() == 0


def test_a_step_neither_waits_nor_allocates_nor_compiles() -> None:
    from benchmarks import _gpu
    from fd_dsa.triton_runtime import num_late_compilations

    place, rng = Place("torch"), np.random.default_rng(12)
    cfg = serving_config(32, 8192, 1)
    prepare, rollback = place.prepare(cfg), place.put(np.zeros(32, np.int32))
    compiled = num_late_compilations()
    for rows in (_ragged(32, 8192, 1), _ragged(1, 8192, 1), _ragged(17, 8192, 1)):
        step = make_step(cfg, rows, rng)
        for given in (None, rollback, rollback[:20]):

            def run(step: Step = step, given: Any = given) -> None:
                prepare.stage(*step.arrays())
                prepare.expand(given)

            found = _gpu.effects(run)
            assert found == {"launches": 1, "copies": 1, "host_waits": 0, "allocations": 0}
    assert num_late_compilations() == compiled
