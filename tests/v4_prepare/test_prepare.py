"""Steps that are staged and expanded: same outputs in every place, in order, at fixed addresses."""

from __future__ import annotations

import numpy as np
import pytest

from fd_dsa.errors import DtypeError, LaunchError, ShapeError
from fd_dsa.v4_prepare import (
    OUTPUT_SHAPES,
    V4PrepareConfig,
    V4PrepareError,
    csa_translate,
    v4_prepare_np,
)
from tests.reference.v4_prepare import naive
from tests.v4_prepare.cases import PLACES, Place, Step, assert_same, expected
from tests.v4_prepare.golden import (
    CASES,
    ERRORS,
    assert_outputs,
    config_of,
    error_config,
    inputs_of,
)


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Place:
    return Place(request.param)


SIZES = dict(
    window_size=5,
    spec_tokens=2,
    block_size=8,
    csa_ratio=2,
    hca_ratio=4,
    index_topk=3,
    num_slots=4,
    num_blocks=40,
    max_blocks_per_seq=5,
    max_num_seqs=3,
    max_num_tokens=16,
    max_tokens_per_seq=12,
    max_model_len=40,
)
CFG = V4PrepareConfig(**SIZES)  # type: ignore[arg-type]
# a decode row, a prompt and an idle row; one token more each; the rows in another order
STEPS = [
    Step(*(np.array(values, np.int32) for values in inputs))
    for inputs in (
        ([17, 9, 6], [3, 9, 0], [2, 0, -1], [[7, 3, 1], [4, 5, -1], [-1, -1, -1]]),
        ([20, 10, 6], [3, 1, 2], [2, 0, 1], [[7, 3, 1], [4, 5, -1], [9, -1, -1]]),
        ([12, 25], [1, 1], [0, 2], [[4, 5, -1, -1], [7, 3, 1, 30]]),
    )
]


@pytest.mark.parametrize("name", CASES)
def test_goldens(place: Place, name: str) -> None:
    case = CASES[name]
    prepare, inputs = place.prepare(config_of(case["config"])), inputs_of(case)
    prepare.stage(*inputs)
    buffers = prepare.expand()
    assert_outputs(case, lambda field: place.get(getattr(buffers, field)))
    if not place.is_host:
        *lengths, table = (np.array(one, np.int32) for one in inputs)
        table = table.reshape(len(lengths[0]), prepare.cfg.max_blocks_per_seq)
        place.assert_nothing_else(prepare, Step(*lengths, table))


def test_steps_without_tokens(place: Place) -> None:
    prepare = place.new(CFG)
    assert_same(place.outputs(prepare), naive(CFG, [], [], [], []))
    place.run(prepare, STEPS[0])
    for ctx in ([], [9, 0]):
        idle = Step(*np.array([ctx, [0] * len(ctx), ctx], np.int32), np.zeros((len(ctx), 0)))
        idle.table = idle.table.astype(np.int32)
        assert_same(place.run(prepare, idle), expected(CFG, idle))


def test_a_refused_step_changes_nothing(place: Place) -> None:
    cfg = error_config()
    prepare = place.prepare(cfg)
    good = [5, 20, 33], [1, 2, 1], [0, 3, 2], [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    prepare.stage(*good)
    prepare.expand()
    before = place.outputs(prepare)
    for case in ERRORS.values():
        with pytest.raises(V4PrepareError) as caught:
            prepare.stage(*inputs_of(case))
        assert (caught.value.code, caught.value.row) == (case["code"], case["row"])
        assert str(caught.value) == case["text"]
    with pytest.raises(RuntimeError, match="no step is staged"):
        prepare.expand()
    assert_same(place.outputs(prepare), before)
    # the blocks of the good step are still those of its rows
    prepare.stage([6, 21, 33], [1, 1, 1], good[2])
    prepare.expand()
    assert_same(place.outputs(prepare), naive(cfg, [6, 21, 33], [1, 1, 1], *good[2:]))


def test_steps_are_expanded_in_the_order_of_staging(place: Place) -> None:
    prepare = place.prepare(CFG)
    for step in STEPS:
        arrays = [array.copy() for array in step.arrays()]
        prepare.stage(*arrays)
        for array in arrays:
            array.fill(-7)
    with pytest.raises(RuntimeError, match="3 steps are staged"):
        prepare.stage(*STEPS[0].arrays())
    addresses = None
    for step in STEPS:
        buffers = prepare.expand()
        assert buffers is prepare.buffers
        assert_same(place.outputs(prepare), expected(CFG, step))
        found = {n: place.address(getattr(buffers, n)) for n in OUTPUT_SHAPES(CFG)}
        assert addresses in (None, found)
        addresses = found
    assert_same(place.run(prepare, STEPS[0]), expected(CFG, STEPS[0]))


def test_drafts_that_were_rejected(place: Place) -> None:
    prepare = place.prepare(CFG)
    # an idle row keeps its tokens, whatever its number; rows past the rollback keep theirs
    for step, rollback in (
        (STEPS[1], [2, 0, 1]),
        (STEPS[1], [1]),
        (STEPS[1], [0] * 3),
        (STEPS[0], [3, 0, 100]),
        (STEPS[0], [1, 0, -7, 99, 5]),
    ):
        assert_same(place.run(prepare, step, rollback), expected(CFG, step, rollback))
        prepare.poll_error()


def test_a_rollback_of_another_type(place: Place) -> None:
    prepare = place.prepare(CFG)
    prepare.stage(*STEPS[0].arrays())
    with pytest.raises((DtypeError, LaunchError), match="rollback"):
        prepare.expand(place.put(np.zeros(3, np.float32)))
    # the step is still there
    prepare.expand()
    assert_same(place.outputs(prepare), expected(CFG, STEPS[0]))


IMPOSSIBLE = [
    (STEPS[1], [0, -4, 0], "row 1: rollback=-4 < 0"),
    (STEPS[1], [19, 0, 0], "row 0: ctx=1 < q=3"),
    (STEPS[1], [0, 10, -1], "row 1: ctx=0 < q=1"),
    (STEPS[1], [2**31 - 1, 1, -(2**31)], "row 0: ctx=-2147483627 < q=3"),
    (STEPS[2], [0, -1], "row 1: rollback=-1 < 0"),
    (STEPS[0], [0, 1, 0], "row 1: ctx=8 < q=9"),
]


def test_impossible_rollbacks(place: Place) -> None:
    prepare = place.prepare(CFG)
    for step, rollback, text in IMPOSSIBLE:
        with pytest.raises(V4PrepareError) as caught:
            # only the device goes on, with padding instead of the rows' tokens
            assert_same(place.run(prepare, step, rollback), expected(CFG, step, rollback))
            prepare.poll_error()
        assert str(caught.value) == f"v4_prepare: E_CTX: {text}"
        assert (caught.value.code, caught.value.row) == ("E_CTX", int(text[4]))
        prepare.poll_error()
        if place.is_host:
            # the step is still there
            prepare.expand()
            assert_same(place.outputs(prepare), expected(CFG, step))
    # nothing is left of them
    assert_same(place.run(prepare, STEPS[2], [0, 0]), expected(CFG, STEPS[2]))
    prepare.poll_error()


@pytest.mark.triton
def test_errors_of_two_steps_are_raised_in_order_once_they_have_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fd_dsa.device.transfers import Event

    place = Place("interpreter")
    prepare = place.prepare(CFG)
    # the later one has the lower slot for errors
    prepare.steps.stamp = 28
    for row in (None, 2, None, None, None, 1):
        rollback = None if row is None else -(np.arange(3) == row).astype(np.int32)
        place.run(prepare, STEPS[1], rollback)
    with monkeypatch.context() as busy:
        busy.setattr(Event, "done", lambda event: False)
        prepare.poll_error()
    for row in (2, 1):
        with pytest.raises(V4PrepareError, match=f"row {row}: rollback=-1"):
            prepare.poll_error()
    prepare.poll_error()


def test_table_mode(place: Place) -> None:
    cfg = V4PrepareConfig(**SIZES, hca_mode="table")  # type: ignore[arg-type]
    prepare = place.prepare(cfg)
    found, wanted = place.run(prepare, STEPS[0]), expected(cfg, STEPS[0])
    assert prepare.buffers.hca_idx is None
    assert_same(found, wanted)
    # the reader takes rows from the table that the step was built from
    table, per_block = place.get(prepare.buffers.block_table), cfg.block_size // cfg.hca_ratio
    rows = [
        cfg.comp_base + table[b, e // per_block] * per_block + e % per_block
        for t, b in enumerate(found["req_of_token"][: found["counts"][1]])
        for e in range(found["hca_indptr"][t + 1] - found["hca_indptr"][t])
    ]
    assert rows == wanted["hca_idx"].tolist()


def test_rows_of_chosen_entries(place: Place) -> None:
    """Those of the host function, at one address; numbers that are no entry give -1."""
    prepare, rng, addresses = place.prepare(CFG), np.random.default_rng(1), set()
    for step in STEPS[:2]:
        place.run(prepare, step)
        out = v4_prepare_np(CFG, *step.arrays())
        visible = out.csa_visible[:, None]
        chosen = rng.integers(0, np.maximum(visible, 1), (CFG.max_num_tokens, CFG.index_topk))
        garbage = rng.random(chosen.shape) < 0.3
        chosen[garbage] = rng.choice([-1, -(2**31), 2**31 - 1], garbage.sum())
        chosen = np.where(rng.random(chosen.shape) < 0.1, visible, chosen).astype(np.int32)
        rows = prepare.csa_translate(place.put(chosen))
        found = place.get(rows)
        wanted = csa_translate(out, step.table, chosen)
        np.testing.assert_array_equal(found[: len(wanted)], wanted)
        addresses.add(place.address(rows))
    assert len(addresses) == 1
    for shape in ((5, 3), (6, 2), (18,)):
        with pytest.raises(ShapeError, match=r"local_topk: got .*, must be \[6 or more, 3\]"):
            prepare.csa_translate(place.put(np.zeros(shape, np.int32)))
