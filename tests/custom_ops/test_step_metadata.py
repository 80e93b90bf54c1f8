"""The Paddle operator fd_dsa_step_metadata against the naive loop, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from tests.reference.step_metadata import ref_step_metadata
from tests.strategies import StepBatch, make_batch, step_batches

paddle = pytest.importorskip("paddle")

OUTPUTS = {
    "batch_id_per_token": "int32",
    "position_ids": "int64",
    "slot_mapping": "int64",
    "cu_seqlens_q": "int32",
    "cache_seqlens": "int32",
    "position_ids_int32": "int32",
    "indexer_attn_mask_offsets": "int32",
    "cu_seqlens_kg": "int32",
}
INPUTS = ("seq_lens_encoder", "seq_lens_decoder", "seq_lens_this_time", "block_tables")
EXAMPLES = settings(
    max_examples=min(60, settings.default.max_examples),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
BATCH = make_batch([(3, 2, 3), (0, 9, 1), (0, 0, 0)], 16, num_padded_tokens=7)


def arguments_for(batch: StepBatch) -> dict[str, Any]:
    """Arguments of the operator for a step, its outputs poisoned."""
    wanted = ref_step_metadata(*batch.inputs(), batch.block_size, batch.num_padded_tokens)
    put = paddle.to_tensor
    given = {name: put(array) for name, array in zip(INPUTS, batch.inputs(), strict=True)}
    for name, dtype in OUTPUTS.items():
        if wanted[name] is not None:
            given[name] = put(np.full(len(wanted[name]), -91, dtype))
    return given | {"block_size": batch.block_size, "num_blocks": batch.num_blocks}


def assert_right(given: dict[str, Any], batch: StepBatch) -> None:
    """The arguments that the operator filled hold the step."""
    wanted = ref_step_metadata(*batch.inputs(), batch.block_size, batch.num_padded_tokens)
    for name in OUTPUTS:
        if wanted[name] is not None:
            np.testing.assert_array_equal(given[name].numpy(), wanted[name], err_msg=name)


@EXAMPLES
@given(batch=step_batches())
def test_any_step_equals_the_oracle(ops: Any, batch: StepBatch) -> None:
    given = arguments_for(batch)
    ops.fd_dsa_step_metadata(**given)
    assert_right(given, batch)


def test_it_writes_in_place_and_answers_with_the_same_memory(ops: Any) -> None:
    given = arguments_for(BATCH)
    addresses = {name: given[name].data_ptr() for name in OUTPUTS}
    found = ops.fd_dsa_step_metadata(*given.values())
    assert_right(given, BATCH)
    assert [tensor.data_ptr() for tensor in found] == list(addresses.values())
    assert [given[name].data_ptr() for name in OUTPUTS] == list(addresses.values())


def test_capacity_may_be_larger_than_the_step(ops: Any) -> None:
    given = arguments_for(BATCH)
    for name in ("cu_seqlens_q", "cu_seqlens_kg", "cache_seqlens"):
        given[name] = paddle.full([len(given[name]) + 4], -91, dtype="int32")
    ops.fd_dsa_step_metadata(**given)
    assert given["cu_seqlens_q"].tolist() == [0, 3, 4, 4, 4, 4, 4, 4]
    assert given["cu_seqlens_kg"].tolist() == [0, 5, 6, 6, 6, 6, 6, 6]
    assert given["cache_seqlens"].tolist() == [0, 10, 0, 0, 0, 0, 0]


def test_an_entry_that_is_no_block_gives_no_slot(ops: Any) -> None:
    given = arguments_for(BATCH)
    given["block_tables"][1, 0] = BATCH.num_blocks
    ops.fd_dsa_step_metadata(**given)
    assert given["slot_mapping"][3].item() == -1
    given["num_blocks"] = 0
    ops.fd_dsa_step_metadata(**given)
    assert given["slot_mapping"][3].item() == BATCH.num_blocks * 16 + 9


def test_tables_may_be_rows_of_a_wider_one(ops: Any) -> None:
    given = arguments_for(BATCH)
    columns = BATCH.block_tables.shape[1]
    wide = paddle.to_tensor(np.concatenate([BATCH.block_tables, BATCH.block_tables], axis=1))
    given["block_tables"] = wide[:, :columns]
    ops.fd_dsa_step_metadata(**given)
    assert_right(given, BATCH)


def test_lengths_that_no_step_has_stay_inside_the_arrays(ops: Any) -> None:
    rng, batch = np.random.default_rng(3), make_batch([(0, 1, 1)] * 9, 16, num_columns=4)
    extremes = np.array([-(2**31), -1, 0, 1, 40, 2**30, 2**31 - 1], np.int32)
    for windows in (True, False):
        for _ in range(20):
            outer, given = {}, arguments_for(batch)
            for name in INPUTS[:3]:
                given[name] = paddle.to_tensor(rng.choice(extremes, 9))
            given["block_tables"] = paddle.to_tensor(rng.choice(extremes, (9, 4)))
            sizes = dict.fromkeys(OUTPUTS, 40) | {"cu_seqlens_q": 10, "cu_seqlens_kg": 10}
            sizes |= {"cache_seqlens": 9, "indexer_attn_mask_offsets": 80}
            for name, dtype in OUTPUTS.items():
                outer[name] = paddle.full([sizes[name] + 512], -91, dtype=dtype)
                given[name] = outer[name][256 : 256 + sizes[name]]
            if not windows:
                given |= {"indexer_attn_mask_offsets": None, "cu_seqlens_kg": None}
            ops.fd_dsa_step_metadata(**given)
            slots = given["slot_mapping"].numpy()
            assert ((slots >= -1) & (slots < batch.num_blocks * 16)).all()
            for name, whole in outer.items():
                assert (whole[:256] == -91).all() and (whole[256 + sizes[name] :] == -91).all()


def _change(name: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    return lambda given: given.__setitem__(name, change(given[name]))


REFUSED = {
    "int64 lengths": (
        _change("seq_lens_decoder", lambda t: t.astype("int64")),
        ["seq_lens_decoder", "got dtype int64", "allowed is int32"],
    ),
    "fewer lengths": (
        _change("seq_lens_encoder", lambda t: t[:2]),
        ["seq_lens_encoder", "got shape [2]", "allowed is [3]"],
    ),
    "a table of other rows": (
        _change("block_tables", lambda t: t[:2]),
        ["block_tables", "got shape [2, 1]", "allowed is [3, "],
    ),
    "a flat table": (_change("block_tables", lambda t: t.flatten()), ["block_tables", "[3]"]),
    "int32 positions for int64": (
        _change("position_ids", lambda t: t.astype("int32")),
        ["position_ids", "got dtype int32", "allowed is int64"],
    ),
    "too few slots": (
        _change("slot_mapping", lambda t: t[:6]),
        ["slot_mapping", "got shape [6]", "allowed is [7] = [tokens of batch_id_per_token]"],
    ),
    "too few bounds": (
        _change("cu_seqlens_q", lambda t: t[:3]),
        ["cu_seqlens_q", "got shape [3]", "allowed is [4] = [entries of cache_seqlens + 1]"],
    ),
    "fewer row results than rows": (
        _change("cache_seqlens", lambda t: t[:2]),
        ["number of cache_seqlens", "got 2", "3.."],
    ),
    "half of the windows": (
        _change("cu_seqlens_kg", lambda t: None),
        ["indexer_attn_mask_offsets and cu_seqlens_kg", "both"],
    ),
    "no block size": (_change("block_size", lambda n: 0), ["block_size", "got 0", "1.."]),
    "negative blocks": (_change("num_blocks", lambda n: -1), ["num_blocks", "got -1", "0.."]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named_and_nothing_is_written(ops: Any, name: str) -> None:
    spoil, words = REFUSED[name]
    given = arguments_for(BATCH)
    spoil(given)
    with pytest.raises(OSError, match=r"^fd_dsa_step_metadata: ") as caught:
        ops.fd_dsa_step_metadata(**given)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    for field in OUTPUTS.keys() - {"position_ids"}:
        assert given[field] is None or (given[field] == -91).all(), field


@pytest.mark.parametrize(
    "change",
    [lambda g: g.pop("block_size"), lambda g: g.update(rows=3), lambda g: g.pop("cache_seqlens")],
    ids=["no block size", "an unknown name", "no cache_seqlens"],
)
def test_arguments_are_named_where_they_do_not_fit(ops: Any, change: Callable[[Any], Any]) -> None:
    given = arguments_for(BATCH)
    change(given)
    with pytest.raises(TypeError, match="fd_dsa_step_metadata takes seq_lens_encoder, "):
        ops.fd_dsa_step_metadata(**given)


def test_a_static_program_knows_shapes_and_types_before_it_runs(ops: Any) -> None:
    given = arguments_for(BATCH)
    arrays = {name: v.numpy() for name, v in given.items() if isinstance(v, paddle.Tensor)}
    paddle.enable_static()
    try:
        program = paddle.static.Program()
        with paddle.static.program_guard(program):
            names = {n: paddle.static.data(n, a.shape, str(a.dtype)) for n, a in arrays.items()}
            found = ops.fd_dsa_step_metadata(**given | names)
            for tensor, (name, dtype) in zip(found, OUTPUTS.items(), strict=True):
                assert list(tensor.shape) == list(arrays[name].shape), name
                assert str(tensor.dtype).rpartition(".")[2].lower() == dtype, name
            ran = paddle.static.Executor().run(program, feed=arrays, fetch_list=list(found))
    finally:
        paddle.disable_static()
    assert_right({n: paddle.to_tensor(a) for n, a in zip(OUTPUTS, ran, strict=True)}, BATCH)
