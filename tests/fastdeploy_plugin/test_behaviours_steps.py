"""Steps as FastDeploy's runner makes them in order, with our plug-in in between."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fakes.driver import Job
from tests.fakes.trees import TREES
from tests.fastdeploy_plugin.engines import ours, prompt
from tests.fastdeploy_plugin.watching import answers, small_engine, watch_steps

SERVED = ["pr7367", "develop"]


@pytest.mark.parametrize("tree", SERVED)
def test_a_step_is_a_new_object_over_buffers_that_stay(tree: str) -> None:
    """A long step, a short one, a longer one: `copy_` adopts shapes, addresses stay."""
    with ours(TREES[tree]):
        engine = small_engine()
        watch = watch_steps(engine)
        shapes = []

        def note(*_: Any) -> None:
            meta = engine.runner.forward_meta
            shapes.append([meta.batch_id_per_token.shape[0], meta.cu_seqlens_q.shape[0]])

        engine.runner.model.register_forward_post_hook(note)
        engine.generate([Job(prompt(40), 3), Job(prompt(9, 1), 5, start_at=2)])
    steps = watch.steps
    assert [step.tokens for step in steps] == [40, 1, 10, 1, 1, 1, 1]
    assert [shape[0] for shape in shapes] == [step.launched for step in steps]
    assert {shape[1] for shape in shapes} == {2, 3}
    assert len({id(step.forward_meta) for step in steps}) == len(steps)
    for name in ("position_ids", "slot_mapping", "ids_remove_padding", "block_tables"):
        tensors = [getattr(step.forward_meta, name) for step in steps]
        assert len({tensor.data_ptr() for tensor in tensors}) == 1, name
    assert watch.trespasses == []


def test_slots_follow_a_table_that_changes_under_a_decode_row() -> None:
    """The scheduler moves a row's block: the next step reads and writes where it lies now."""
    with ours():
        expected = answers(Job(prompt(70), 6))[0]
        engine = small_engine()
        watch = watch_steps(engine)
        moving, waiting = Job(prompt(70), 6), []
        waiting.append(moving)
        for _ in range(3):
            engine.step(waiting)
        _move_block(engine, moving)
        while moving.row >= 0:
            engine.step([])
        assert moving.output == expected
        assert watch.trespasses == []


def _move_block(engine: Any, moving: Any) -> None:
    """Put a row's first block somewhere else; what it leaves is not to be read again."""
    from fastdeploy._arrays import writable
    from fastdeploy.engine.request import Request, RequestType

    old, new = moving.blocks[0], 23
    assert new not in moving.blocks
    for cache in engine.runner.share_inputs["caches"]:
        with writable(cache) as values:
            values[new], values[old] = values[old], 0xFF
    moving.blocks[0] = new
    task = Request(moving.row, RequestType.DECODE, block_tables=list(moving.blocks))
    engine.worker.preprocess_new_task([task], 1)


@pytest.mark.parametrize("expert_parallel_size", [1, 2])
@pytest.mark.parametrize("overlap", [False, True], ids=["normal", "overlap"])
def test_a_step_without_tokens(expert_parallel_size: int, overlap: bool) -> None:
    """All rows wait for blocks; a rank of experts runs those of others meanwhile."""
    with ours():
        expected = answers(Job(prompt(62), 6))[0]
        engine = small_engine(
            expert_parallel_size=expert_parallel_size, enable_overlap_schedule=overlap
        )
        empty, called = [], []
        model = engine.runner.model
        original = model.empty_input_forward
        model.empty_input_forward = lambda meta: (called.append(meta), original(meta))
        finish = engine.runner._execute

        def execute() -> None:
            if not engine.runner.not_need_stop():
                empty.append(engine.runner.forward_meta)
            finish()

        engine.runner._execute = execute
        assert engine.generate([Job(prompt(62), 6, late_blocks=3)])[0] == expected
    assert len(empty) >= 2
    assert all(meta.fd_dsa_step is not None for meta in empty)
    if not overlap:
        assert all(meta.is_zero_size and meta.slot_mapping.shape == [0] for meta in empty)
    assert called == (empty if expert_parallel_size > 1 else [])
