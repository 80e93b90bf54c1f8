"""The compiled expand kernel at real sizes, in graphs, and ten thousand times."""

from __future__ import annotations

import numpy as np
import pytest

from fd_dsa.v4_prepare import OUTPUT_SHAPES, V4PrepareConfig
from tests.kernel_memory import open_memory
from tests.v4_prepare.kernel_case import (
    DeviceStepper,
    assert_same,
    expected,
    make_step,
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
    stepper, rng = DeviceStepper(open_memory("torch"), cfg), np.random.default_rng(8)
    for cut in (1, 2):
        step = make_step(cfg, rows[::cut], rng)
        assert_same(stepper.run(step), expected(cfg, step))
        rollback = rng.integers(0, cfg.spec_tokens + 1, len(step.ctx))
        rollback = rollback.clip(max=step.ctx - step.q)
        assert_same(stepper.run(step, rollback), expected(cfg, step, rollback))
    stepper.assert_nothing_else()


def test_a_million_tokens_in_table_mode_allocate_no_list() -> None:
    cfg = serving_config(8, 1 << 20, 3, hca_mode="table")
    shapes = OUTPUT_SHAPES(cfg)
    assert "hca_idx" not in shapes
    assert max(np.prod(shape) for shape in shapes.values()) == 32 * 128
    stepper, rng = DeviceStepper(open_memory("torch"), cfg), np.random.default_rng(9)
    step = make_step(cfg, [((1 << 20) - 5 * n, 4) for n in range(8)], rng)
    assert_same(stepper.run(step), expected(cfg, step))


def test_a_graph_captured_at_1k_is_right_up_to_128k() -> None:
    import torch

    m, rng = open_memory("torch"), np.random.default_rng(10)
    cfg = serving_config(8, LONG, 3)
    captured, eager = DeviceStepper(m, cfg), DeviceStepper(m, cfg)
    first = make_step(cfg, [(1000, 1)] * 4, rng)
    rollback = m.put(np.zeros(8, np.int32))
    for _ in range(2):
        captured.launch(captured.write(first, slab=0), rollback)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.launch(0, rollback)
    addresses = {name: getattr(captured.buffers, name).data_ptr() for name in OUTPUT_SHAPES(cfg)}
    for number in range(300):
        longest = 1000 + number * (LONG - 1004) // 299
        rows = [(int(rng.integers(0, longest + 1)), int(rng.integers(0, 5))) for _ in range(8)]
        rows[number % 8] = (longest, 4)
        step = make_step(cfg, rows[: 1 + number % 8] if number % 3 else rows, rng)
        rejected = rng.integers(0, 4, 8)
        rejected[: len(step.ctx)] = rejected[: len(step.ctx)].clip(max=step.ctx - step.q)
        captured.write(step, slab=0)
        rollback.copy_(torch.from_numpy(rejected.astype(np.int32)))
        graph.replay()
        found = captured.outputs()
        assert_same(found, eager.run(step, rejected))
        if number % 50 == 49:
            assert_same(found, expected(cfg, step, rejected))
    for name, address in addresses.items():
        assert getattr(captured.buffers, name).data_ptr() == address


def test_ten_thousand_launches_write_the_same_bytes() -> None:
    import torch

    m, rng = open_memory("torch"), np.random.default_rng(11)
    cfg = serving_config(128, 8192, 3)
    stepper = DeviceStepper(m, cfg)
    step = make_step(cfg, _ragged(120, 8192, 3), rng)
    stepper.launch(stepper.write(step))
    wanted = stepper.outputs()
    assert_same(wanted, expected(cfg, step))
    total = int(wanted["counts"][2])
    tensors = {name: getattr(stepper.buffers, name) for name in OUTPUT_SHAPES(cfg)}
    held = {name: tensor.clone() for name, tensor in tensors.items()}
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    offset = stepper.stamp % 2 * stepper.num_words
    for _ in range(10_000):
        for tensor in tensors.values():
            tensor.fill_(-91)
        stepper.launch(offset)
        for name, tensor in tensors.items():
            same = tensor == held[name]
            different += (~(same[:total] if name == "hca_idx" else same)).sum()
    assert different.item() == 0


def test_a_step_neither_waits_nor_allocates_nor_compiles() -> None:
    from benchmarks import _gpu
    from fd_dsa.triton_runtime import num_late_compilations

    m, rng = open_memory("torch"), np.random.default_rng(12)
    cfg = serving_config(32, 8192, 1)
    stepper = DeviceStepper(m, cfg)
    rollback = m.put(np.zeros(32, np.int32))
    compiled = num_late_compilations()
    for rows in (_ragged(32, 8192, 1), _ragged(1, 8192, 1), _ragged(17, 8192, 1)):
        offset = stepper.write(make_step(cfg, rows, rng))
        for given in (None, rollback, rollback[:20]):
            found = _gpu.effects(lambda offset=offset, given=given: stepper.launch(offset, given))
            assert found == {"launches": 1, "copies": 0, "host_waits": 0, "allocations": 0}
    assert num_late_compilations() == compiled
