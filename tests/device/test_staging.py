"""Slabs that take turns on a device that is late: the order of calls, and what they protect."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fd_dsa.device.staging import InputStaging, StagedInputs
from fd_dsa.errors import DeviceError
from tests.gpu_rig.overlap_proof import GUARDS, without_guards
from tests.triton_runtime.late_driver import MAIN, LateLibrary, LateTensor, late_driver

pytestmark = pytest.mark.triton

SIZE, NUM_SLABS = 6, 3
# events in the order in which they are made
COPIED, USED = (1, 2, 3), (4, 5, 6)


@pytest.fixture
def library() -> Iterator[LateLibrary]:
    """The device of one test."""
    with late_driver() as library:
        yield library


def run_step(
    library: LateLibrary, staging: InputStaging, step: int, seen: list[np.ndarray]
) -> None:
    """One step: a slab full of its number, and a reader on the main stream."""
    staging.next_slab()[:] = step
    index = staging.upload(SIZE)
    staging.acquire(index)
    slab = staging.slabs.values[index]
    library.launch(MAIN, lambda: seen.append(slab.copy()))
    staging.release(index)


def check(seen: list[np.ndarray], steps: int) -> None:
    """Every step was read, with its own values only."""
    assert [values.tolist() for values in seen] == [[step] * SIZE for step in range(steps)]


def test_the_calls_of_a_step_in_their_order(library: LateLibrary) -> None:
    staging = InputStaging(LateTensor, SIZE)
    prep = staging.prep_stream
    assert prep not in (0, MAIN)
    assert library.log == [("record", MAIN, used) for used in USED]
    for step in range(7):
        library.log.clear()
        run_step(library, staging, step, [])
        copied, used = COPIED[step % 3], USED[step % 3]
        # nothing is waited for that the host knows to be done
        waits = [("wait", prep, used)] if step < 3 else []
        assert library.log == [
            *waits,
            ("h2d", prep, 4 * SIZE),
            ("record", prep, copied),
            ("wait", MAIN, copied),
            ("record", MAIN, used),
        ]
        if step >= 2:
            library.run()


def test_a_copy_runs_while_the_main_stream_is_busy(library: LateLibrary) -> None:
    staging, seen = InputStaging(LateTensor, SIZE), []
    library.run(MAIN)
    for step in range(NUM_SLABS):
        run_step(library, staging, step, seen)
        # the main stream does not move at all
        library.run(staging.prep_stream)
        assert (staging.slabs.values[step] == step).all()
    assert seen == [] and staging.num_waits == 0
    run_step(library, staging, 3, seen)
    library.run(staging.prep_stream)
    # this slab is still to be read by the step of three steps ago
    assert (staging.slabs.values[0] == 0).all()
    library.run()
    check(seen, 4)


def test_the_copy_waits_for_the_reader_three_steps_ago_and_no_later_one(
    library: LateLibrary,
) -> None:
    staging, seen = InputStaging(LateTensor, SIZE), []
    for step in range(NUM_SLABS):
        run_step(library, staging, step, seen)
    while len(seen) < 1:
        library.step(staging.prep_stream)
        library.step(MAIN)
    while not staging.used[0].done():
        library.step(MAIN)
    assert not staging.used[1].done() and len(seen) == 1
    run_step(library, staging, 3, seen)
    library.run(staging.prep_stream)
    assert (staging.slabs.values[0] == 3).all()


def test_memory_that_others_used_is_not_written_before_their_work_is_done(
    library: LateLibrary,
) -> None:
    found: list[int] = []
    # queued by the previous owner of the memory
    library.launch(MAIN, lambda: found.append(int(staging.slabs.values[0, 0])))
    staging = InputStaging(LateTensor, SIZE)
    staging.next_slab()[:] = 1
    staging.upload(SIZE)
    library.run(staging.prep_stream)
    library.run()
    assert found == [-9] and staging.slabs.values[0, 0] == 1


@pytest.mark.parametrize("lag", [1, NUM_SLABS - 1, NUM_SLABS])
def test_a_slab_in_flight_is_not_filled_again(library: LateLibrary, lag: int) -> None:
    staging, seen = InputStaging(LateTensor, SIZE), []
    for step in range(20):
        while len(seen) < step - lag:
            library.step()
        run_step(library, staging, step, seen)
    library.run()
    check(seen, 20)
    assert (staging.num_waits > 0) == (lag == NUM_SLABS)


@settings(max_examples=40)
@given(seed=st.integers(0, 1 << 30), work=st.lists(st.integers(0, 12), min_size=12, max_size=24))
def test_every_step_arrives_whatever_the_device_does_first(seed: int, work: list[int]) -> None:
    with late_driver(seed) as library:
        staging, seen = InputStaging(LateTensor, SIZE), []
        for step, entries in enumerate(work):
            run_step(library, staging, step, seen)
            for _ in range(entries):
                library.step()
        library.run()
        check(seen, len(work))
        del staging


@pytest.mark.parametrize("guard", GUARDS)
def test_without_one_of_its_guards_steps_are_spoiled(guard: str) -> None:
    spoiled = 0
    for seed in range(20):
        with late_driver(seed) as library:
            staging, seen = InputStaging(LateTensor, SIZE, num_slabs=1), []
            with without_guards([guard]):
                for step in range(12):
                    run_step(library, staging, step, seen)
                    for _ in range(3):
                        library.step()
            library.run()
            spoiled += any((values != step).any() for step, values in enumerate(seen))
            del staging
    assert spoiled > 10


def test_the_same_slab_until_it_is_uploaded(library: LateLibrary) -> None:
    staging = InputStaging(LateTensor, SIZE)
    first = staging.next_slab()
    assert staging.next_slab() is first
    assert staging.upload(1) == 0
    assert staging.next_slab() is not first


def test_what_was_seen_of_one_slab_says_nothing_of_the_next(library: LateLibrary) -> None:
    staging = InputStaging(LateTensor, SIZE)
    library.run()
    for _ in range(NUM_SLABS):
        run_step(library, staging, 0, [])
    library.step(MAIN)
    while not staging.used[0].done():
        library.step()
    staging.next_slab()
    library.log.clear()
    # the second slab is not asked for: it holds what it held
    for used in USED[:2]:
        staging.upload(SIZE)
        assert (("wait", staging.prep_stream, used) in library.log) == (used == USED[1])


def test_more_steps_ahead_than_slabs_are_refused(library: LateLibrary) -> None:
    staging = InputStaging(LateTensor, SIZE)
    for step in range(NUM_SLABS):
        staging.next_slab()[:] = step
        staging.upload(SIZE)
    before = list(library.log)
    with pytest.raises(RuntimeError, match="3 steps are uploaded and none is released"):
        staging.next_slab()
    assert library.log == before
    staging.acquire(0)
    staging.release(0)
    staging.next_slab()[:] = 3
    assert staging.upload(SIZE) == 0


def test_a_step_in_a_capture_is_refused(library: LateLibrary) -> None:
    staging = InputStaging(LateTensor, SIZE)
    before = list(library.log)
    library.captured.add(MAIN)
    with pytest.raises(RuntimeError, match="graph capture"):
        staging.next_slab()
    library.captured.clear()
    assert library.log == before
    staging.next_slab()
    assert staging.upload(1) == 0


@pytest.mark.parametrize("function", ["cuStreamWaitEvent", "cuMemcpyHtoDAsync_v2"])
def test_a_refusal_of_the_driver_is_named_and_the_step_can_be_tried_again(
    library: LateLibrary, function: str
) -> None:
    staging = InputStaging(LateTensor, SIZE)
    staging.next_slab()[:] = 5
    library.refused.add(function)
    with pytest.raises(DeviceError, match=function):
        staging.upload(SIZE)
    library.refused.clear()
    assert staging.next_slab()[0] == 5 and staging.upload(SIZE) == 0
    library.run()
    assert (staging.slabs.values[0] == 5).all()


def test_a_thread_without_a_context_gets_one(library: LateLibrary) -> None:
    staging, seen = InputStaging(LateTensor, SIZE), []
    library.needs_context = True
    library.enter(None)
    run_step(library, staging, 0, seen)
    library.run()
    check(seen, 1)


def test_no_copy_arrives_after_the_memory_is_gone(library: LateLibrary) -> None:
    staging = InputStaging(LateTensor, SIZE)
    values, prep = staging.slabs.values, staging.prep_stream
    staging.next_slab()[:] = 4
    staging.upload(SIZE)
    del staging
    gc.collect()
    assert (values[0] == 4).all()
    last = library.log.index(("sync stream", prep))
    freed = [call[1] for call in library.log if call[0] == "free"]
    assert sorted(freed) == ["event"] * 6 + ["host"] * 3 + ["stream", "tensor"]
    assert all(call[0] == "free" for call in library.log[last + 1 :])


def test_a_tensor_that_stays_is_filled_after_its_readers(
    library: LateLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fd_dsa.device.staging.section_view", lambda *_: None)
    staged, seen = StagedInputs(LateTensor, (2,), 2, 3), []
    prep, values = staged.staging.prep_stream, staged.tensor.values
    for step in range(12):
        library.log.clear()
        staged.upload([np.int32([step] * 2)], np.full((1, 3), step, np.int32))
        library.launch(MAIN, lambda: seen.append(values.copy()))
        used, copied = USED[step % 3], COPIED[step % 3]
        # of the table rows that are in use, at first all: nobody knows what they hold
        num_bytes = 4 * (64 + 3 * (1 if step else 2))
        assert [call for call in library.log if call[0] != "sync"] == [
            ("wait", prep, used),
            ("h2d", prep, num_bytes),
            ("record", prep, copied),
            ("wait", MAIN, copied),
            ("d2d", MAIN, num_bytes),
            ("record", MAIN, used),
        ]
    library.run()
    for step, tensor in enumerate(seen):
        wanted = [step] * 2 + [0] * 62 + [step] * 3 + [-1] * 3
        assert tensor.tolist() == wanted
