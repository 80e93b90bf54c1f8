"""The expand kernel against the loop oracle, in every memory that kernels run on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fd_dsa.v4_prepare.launch import ExpandTiles, tiles_for
from fd_dsa.v4_prepare.slab import ERROR_SLOTS, FAULT_CTX, FAULT_ROLLBACK
from tests.kernel_memory import KernelMemory
from tests.v4_prepare.golden import CASES, assert_outputs, config_of, inputs_of
from tests.v4_prepare.kernel_case import (
    CONFIGS,
    DeviceStepper,
    Step,
    assert_same,
    expected,
    make_step,
)

# the fixture holds no state that one example could leave to the next
EXAMPLES = settings(
    max_examples=min(4, settings.default.max_examples),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def _golden_step(name: str) -> Step:
    """The inputs of a worked example."""
    symbols = CASES[name]["config"]
    ctx, q, slot, table = inputs_of(CASES[name])
    cells = np.array(table, np.int32).reshape(len(ctx), symbols["MB"])
    return Step(*(np.array(x, np.int32) for x in (ctx, q, slot)), cells)


@pytest.mark.parametrize("name", CASES)
def test_the_worked_examples(kernel_memory: KernelMemory, name: str) -> None:
    stepper = DeviceStepper(kernel_memory, config_of(CASES[name]["config"]))
    found = stepper.run(_golden_step(name))
    assert_outputs(CASES[name], found.get)
    stepper.assert_nothing_else()


ROWS = st.lists(
    st.tuples(st.integers(0, 100), st.sampled_from([0, 1, 1, 2, 3, 4, 5, 9, 19, 40])),
    max_size=4,
)


@EXAMPLES
@given(
    name=st.sampled_from(list(CONFIGS)),
    steps=st.lists(ROWS, min_size=1, max_size=2),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_steps_equal_the_oracle(
    kernel_memory: KernelMemory, name: str, steps: list[list[tuple[int, int]]], seed: int
) -> None:
    cfg, rng = CONFIGS[name], np.random.default_rng(seed)
    stepper = DeviceStepper(kernel_memory, cfg)
    for rows in steps:
        step = make_step(cfg, rows, rng)
        assert_same(stepper.run(step), expected(cfg, step))
    stepper.assert_nothing_else()


# every kind of work shared by several programs, in rounds and tiles that do not divide it
FINE = ExpandTiles(
    token_parts=2,
    window_parts=3,
    hca_parts=2,
    padding_programs=2,
    token_tile=8,
    window_rows=4,
    hca_tile=4,
    hca_group=2,
    row_tile=4,
    num_warps=1,
)


@pytest.mark.parametrize("name", CONFIGS)
def test_shared_rows_equal_the_oracle(kernel_memory: KernelMemory, name: str) -> None:
    cfg = replace(CONFIGS[name], max_num_seqs=6)
    tiles = replace(FINE, hca_parts=0) if cfg.hca_mode == "table" else FINE
    stepper, rng = DeviceStepper(kernel_memory, cfg, tiles), np.random.default_rng(3)
    step = make_step(cfg, [(0, 1), (62, 1), (7, 0), (95, 3), (31, 1), (50, 30)], rng)
    assert_same(stepper.run(step), expected(cfg, step))
    stepper.assert_nothing_else()


def test_a_long_row_is_shared_by_many_programs() -> None:
    cfg = replace(CONFIGS["ring"], max_num_tokens=8192, max_tokens_per_seq=8192)
    cfg = replace(cfg, max_model_len=131072, max_blocks_per_seq=8192, hca_mode="table")
    assert tiles_for(cfg).window_parts >= 32
    assert tiles_for(cfg).token_parts >= 32
    # the lists of a lone decode row of 128k tokens
    cfg = replace(CONFIGS["decode"], max_model_len=131072, max_blocks_per_seq=8192)
    assert tiles_for(cfg).hca_parts >= 8


def test_no_row_at_all_and_only_idle_rows(kernel_memory: KernelMemory) -> None:
    cfg, rng = CONFIGS["ring"], np.random.default_rng(1)
    stepper = DeviceStepper(kernel_memory, cfg)
    for rows in ([(60, 5)], [], [(9, 0), (0, 0)]):
        step = make_step(cfg, rows, rng)
        found = stepper.run(step)
        assert_same(found, expected(cfg, step))
    assert (found["plan_r1"] == -1).all() and (found["wplan_r2"] == -1).all()
    assert found["ctx"].tolist() == [9, 0, 0, 0]


def test_the_changed_cells_alone_give_what_all_cells_give(kernel_memory: KernelMemory) -> None:
    rng = np.random.default_rng(11)
    for cfg in (CONFIGS["decode"], CONFIGS["paged"]):
        changed = DeviceStepper(kernel_memory, cfg)
        whole = DeviceStepper(kernel_memory, cfg, send_all=True)
        step = make_step(cfg, [(13, 1), (30, 2), (47, 1)][: cfg.max_num_seqs], rng)
        for _ in range(3 if kernel_memory.large else 2):
            assert_same(changed.run(step), whole.run(step))
            changed.assert_nothing_else()
            # rows grow over a block's edge; one block in the middle of a row is exchanged
            step.ctx += 5
            fresh = rng.integers(0, cfg.num_blocks, step.table.shape)
            used = np.arange(step.table.shape[1]) < -(-step.ctx[:, None] // cfg.block_size)
            step.table = np.where(used & (step.table < 0), fresh, step.table).astype(np.int32)
            step.table[1, 1] = (step.table[1, 1] + 1) % cfg.num_blocks


@pytest.mark.parametrize("name", ["decode", "paged"])
def test_any_pattern_of_rejected_drafts(kernel_memory: KernelMemory, name: str) -> None:
    rng = np.random.default_rng(5)
    rows = 12
    cfg = replace(CONFIGS[name], max_num_seqs=rows, num_slots=rows, max_num_tokens=4 * rows)
    cfg = replace(cfg, max_tokens_per_seq=4)
    stepper = DeviceStepper(kernel_memory, cfg)
    for _ in range(25 if kernel_memory.large else 1):
        lengths = rng.integers(4, cfg.max_model_len - 4, rows)
        step = make_step(cfg, [(int(n), int(rng.integers(0, 5))) for n in lengths], rng)
        rollback = rng.integers(0, 5, rows).clip(max=step.ctx - step.q)
        assert_same(stepper.run(step, rollback), expected(cfg, step, rollback))
    assert not stepper.errors.any()


def test_rollback_may_be_shorter_than_the_buffers_and_is_ignored_for_idle_rows(
    kernel_memory: KernelMemory,
) -> None:
    cfg, rng = CONFIGS["decode"], np.random.default_rng(6)
    stepper = DeviceStepper(kernel_memory, cfg)
    step = make_step(cfg, [(40, 4), (50, 0), (20, 2)], rng)
    for rollback in ([3, -7, 1], [0, 99, 2, 5], [1]):
        wanted = np.array([*rollback, 0, 0, 0][:3])
        assert_same(stepper.run(step, rollback), expected(cfg, step, wanted))
    assert not stepper.errors.any()


FAULTS = {
    "negative": ([0, -1, 2], [FAULT_ROLLBACK, 1, -1, 0]),
    "more than the row has": ([1, 23, 0], [FAULT_CTX, 1, 1, 2]),
    "the lowest of two": ([38, -5, 0], [FAULT_CTX, 0, 6, 4 + 3]),
    "all": ([-(2**31), 2**31 - 1, -1], [FAULT_ROLLBACK, 0, -(2**31), 0]),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_row_that_cannot_be_rolled_back_becomes_padding(
    kernel_memory: KernelMemory, name: str
) -> None:
    cfg, rng = CONFIGS["ring"], np.random.default_rng(7)
    stepper = DeviceStepper(kernel_memory, cfg)
    step = make_step(cfg, [(37, 7), (22, 2), (50, 1)], rng)
    stepper.stamp = ERROR_SLOTS + 2
    rollback, words = FAULTS[name]
    found = stepper.run(step, rollback)
    assert_same(found, expected(cfg, step, np.array(rollback)))
    assert found["cu_q"].tolist() == [0, 7, 9, 10, 10]
    assert stepper.errors[3].tolist() == [*words, ERROR_SLOTS + 3, 0, 0, 0]
    stepper.errors[3] = 0
    assert not stepper.errors.any()
    # the next step is as if nothing had been
    assert_same(stepper.run(step, [1, 0]), expected(cfg, step, np.array([1, 0, 0])))
    assert not stepper.errors.any()
