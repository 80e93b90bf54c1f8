"""The double's operators against loops, with what upstream's get wrong."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import paddle
import pytest

from tests.fakes import golden
from tests.fakes.trees import DEVELOP, TREES, installed
from tests.reference.fp8 import ref_index_key, ref_record
from tests.reference.rope import ref_rotate
from tests.reference.topk import ref_slot, ref_topk

LENGTHS = ("seq_lens_encoder", "seq_lens_decoder", "seq_lens_this_time")
random = np.random.default_rng


def _gpu() -> Any:
    from fastdeploy.model_executor.ops import gpu

    return gpu


@pytest.fixture
def develop() -> Iterator[None]:
    with installed(DEVELOP):
        yield


def _lengths(step: dict[str, Any]) -> list[Any]:
    return [step[name] for name in LENGTHS]


def _fused(step: dict[str, Any], position_ids: Any, slot_mapping: Any) -> None:
    _gpu().get_position_ids_and_slot_mapping(
        *_lengths(step),
        step["batch_id_per_token"],
        step["block_tables"],
        position_ids,
        slot_mapping,
        64,
    )


@pytest.fixture
def fused() -> Iterator[None]:
    with installed(TREES["fused"]):
        yield


def test_the_fused_operator_gives_the_worked_step(fused: None) -> None:
    positions, slots = (paddle.full([15], -7, "int64") for _ in range(2))
    _fused(golden.tensors(), positions, slots)
    # the memory past the last token stays as it was
    assert positions.tolist() == [*golden.POSITIONS, -7, -7]
    assert slots.tolist() == [*golden.SLOTS, -7, -7]


def test_the_fused_operator_follows_an_unused_entry(fused: None) -> None:
    tables = [row[:] for row in golden.TABLES]
    tables[3][1] = -1
    positions, slots = (paddle.zeros([13], "int64") for _ in range(2))
    _fused(golden.tensors(block_tables=tables), positions, slots)
    assert slots.tolist()[6:10] == [-64, -63, -62, -61]


@pytest.mark.parametrize("num_rows", [1024, 1025])
def test_position_operators_have_a_thread_a_row(fused: None, num_rows: int) -> None:
    ones, zeros = np.ones(num_rows), np.zeros(num_rows)
    tables = np.zeros((num_rows, 1))
    step = golden.tensors(
        seq_lens_encoder=zeros, seq_lens_decoder=zeros, seq_lens_this_time=ones, block_tables=tables
    )
    outputs = [paddle.zeros([num_rows], "int64") for _ in range(2)]
    if num_rows > 1024:
        with pytest.raises(RuntimeError, match="1025 rows"):
            _fused(step, *outputs)
    else:
        _fused(step, *outputs)


def test_positions_of_the_runner_s_first_form() -> None:
    with installed(TREES["pr7367"]):
        positions = paddle.zeros([13], "int32")
        step = golden.tensors()
        _gpu().get_position_ids_and_mask_encoder_batch(*_lengths(step), positions)
        assert positions.tolist() == golden.POSITIONS
        with pytest.raises(TypeError):
            _gpu().get_position_ids_and_mask_encoder_batch(*_lengths(step), positions, positions)
        with pytest.raises(ValueError, match="int64"):
            wrong = positions.astype("int64")
            _gpu().get_position_ids_and_mask_encoder_batch(*_lengths(step), wrong)


def test_slots_of_the_runner_wrap_for_padding(develop: None) -> None:
    from fastdeploy.worker._runner_step import compute_slot_mapping

    step = golden.tensors()
    positions = paddle.to_tensor([*golden.POSITIONS, 3], dtype="int32")
    batch_ids = paddle.to_tensor([*golden.BATCH_IDS, -1], dtype="int32")
    slots = compute_slot_mapping(step["block_tables"], positions, batch_ids, 64)
    # -1 is the last row, whose first block is 3
    assert slots.tolist() == [*golden.SLOTS, 3 * 64 + 3]


def _split(step: dict[str, Any], max_len: Any) -> None:
    unused = paddle.zeros([1], "int32")
    from fastdeploy.model_executor.layers.attention.ops import get_block_shape_and_split_kv_block

    get_block_shape_and_split_kv_block(
        *_lengths(step), *[unused] * 5, max_len, *[unused] * 6, -1, -1, -1, 64
    )


def test_the_launch_operator_gives_six_maxima_and_waits(develop: None) -> None:
    from fastdeploy import _counters

    max_len = paddle.zeros([6], "int32")
    _split(golden.tensors(), max_len)
    assert max_len.tolist() == golden.MAXIMA
    assert len(_counters.events("sync", "get_block_shape_and_split_kv_block")) == 1
    only_later_chunk = golden.tensors(
        seq_lens_encoder=[0, 4], seq_lens_decoder=[0, 64], seq_lens_this_time=[0, 4]
    )
    _split(only_later_chunk, max_len)
    assert max_len.tolist() == [4, 4, 64, 68, 0, 68]
    # a capture keeps the numbers of the run before it
    _counters.capturing = True
    _split(golden.tensors(), max_len)
    assert max_len.tolist() == [4, 4, 64, 68, 0, 68]
    with pytest.raises(TypeError):
        _gpu().get_block_shape_and_split_kv_block(*_lengths(golden.tensors()))


def test_cache_writes_are_the_records_at_their_slots(develop: None) -> None:
    values = random(1)
    latent, rope, keys = (
        values.standard_normal((4, width)).astype(np.float32) for width in (512, 64, 128)
    )
    latent[2, :128] = 0
    slots = paddle.to_tensor([130, -1, 3, 64], dtype="int64")
    cache = paddle.full([3, 1, 64, 656], 9, "uint8")
    index_cache = paddle.full([3, 64, 132], 9, "uint8")
    address = cache.data_ptr()
    gpu, tensor = _gpu(), paddle.to_tensor
    k_pe = tensor(rope).unsqueeze(1)
    gpu.dsk_attn_write_cache(tensor(latent), k_pe, cache, slots, None, "fp8_ds_mla")
    gpu.indexer_k_quant_and_cache(tensor(keys), index_cache, slots, 128, "ue8m0")
    expected = np.full(3 * 64 * 656, 9, np.uint8)
    expected_index = np.full(3 * 8448, 9, np.uint8)
    for t, slot in enumerate(slots.tolist()):
        if slot >= 0:
            at = (slot // 64) * 41984 + (slot % 64) * 656
            expected[at : at + 656] = ref_record(latent[t], rope[t])
            codes, scale = ref_index_key(keys[t], "ue8m0")
            block, row = (slot // 64) * 8448, slot % 64
            expected_index[block + row * 128 : block + row * 128 + 128] = codes
            at = block + 8192 + row * 4
            expected_index[at : at + 4] = np.float32([scale]).view(np.uint8)
    assert cache.data_ptr() == address
    assert np.array_equal(cache.numpy().ravel(), expected)
    assert np.array_equal(index_cache.numpy().ravel(), expected_index)


def test_gathered_keys_start_at_the_row_s_first_position(develop: None) -> None:
    cache = paddle.to_tensor(random(2).integers(0, 120, (4, 64, 132)).astype(np.uint8))
    tables = paddle.to_tensor([[2, 0], [3, 1]], dtype="int32")
    lengths = [66, 3]
    n = sum(lengths)
    keys, scales = paddle.zeros([n, 128], "uint8"), paddle.zeros([n, 4], "float32")
    ends = paddle.to_tensor([0, 66, 69], dtype="int32")
    _gpu().cp_gather_indexer_k_quant_cache(cache, keys, scales, tables, ends)
    flat = cache.numpy().reshape(4, -1)
    row = 0
    for b, length in enumerate(lengths):
        for position in range(length):
            slot = ref_slot(position, tables[b].tolist(), 64)
            block, at = flat[slot // 64], slot % 64
            assert np.array_equal(keys[row].numpy(), block[at * 128 : at * 128 + 128])
            scale = block[8192 + at * 4 : 8196 + at * 4].view(np.float32)[0]
            assert scales.flatten()[row].item() == scale
            row += 1
    with pytest.raises(ValueError, match="dst_scale"):
        narrow = paddle.zeros([n, 1], "float32")
        _gpu().cp_gather_indexer_k_quant_cache(cache, keys, narrow, tables, ends)


def _top_k(scores: np.ndarray, **arguments: Any) -> np.ndarray:
    tensors = {
        name: None if value is None else paddle.to_tensor(np.int32(value))
        for name, value in arguments.items()
        if name not in ("top_k", "rows")
    }
    top_k = arguments["top_k"]
    output = paddle.full([arguments["rows"], top_k], -1, "int32")
    _gpu().radix_topk_ragged_transform(
        paddle.to_tensor(scores),
        output,
        **tensors,
        buffer=None,
        max_block_num=2,
        top_k=top_k,
        q_num_heads=1,
    )
    return output.numpy()


def test_ragged_selection_adds_each_row_s_offset(develop: None) -> None:
    scores = random(3).permutation(40).reshape(4, 10).astype(np.float32)
    lengths, offsets = [10, 3, 0, 7], [0, 100, 200, 300]
    none = dict.fromkeys(("seq_len_decoder", "batch_id_per_token", "block_tables"))
    found = _top_k(scores, rows=4, top_k=5, offsets=offsets, lengths=lengths, **none)
    for row in range(4):
        best = ref_topk(scores[row], lengths[row], 5)
        expected = sorted(column + offsets[row] if column >= 0 else -1 for column in best)
        assert sorted(found[row].tolist()) == expected


def test_paged_selection_gives_slots_at_the_row_s_first_token(develop: None) -> None:
    scores = random(4).permutation(240).reshape(3, 80).astype(np.float32)
    tables = [[5, 2], [-1, -1], [3, 7]]
    lengths = [70, 0, 4]
    batch = [0, 0, 2, 2, 2]
    arguments = {"offsets": [0], "lengths": [0], "seq_len_decoder": lengths}
    found = _top_k(
        scores, rows=5, top_k=6, batch_id_per_token=batch, block_tables=tables, **arguments
    )
    for row, first in ((0, 0), (2, 2)):
        best = ref_topk(scores[row], lengths[row], 6)
        expected = sorted(ref_slot(column, tables[row], 64) for column in best)
        assert sorted(found[first].tolist()) == expected
    # one token a row: those of drafts get nothing
    assert (found[[1, 3, 4]] == -1).all()


def test_equal_scores_fall_another_way_in_every_launch(develop: None) -> None:
    scores = np.zeros((1, 64), np.float32)
    arguments: dict[str, Any] = {"offsets": [0], "lengths": [64], "rows": 1, "top_k": 8}
    none = dict.fromkeys(("seq_len_decoder", "batch_id_per_token", "block_tables"))
    first, second = (_top_k(scores, **arguments, **none) for _ in range(2))
    assert sorted(first[0]) != sorted(second[0])


def test_the_merge_copies_a_few_tokens_of_rows_without_prefill(develop: None) -> None:
    step = golden.tensors(
        seq_lens_encoder=[0, 2, 0, 3],
        seq_lens_decoder=[9, 0, 7, 64],
        seq_lens_this_time=[1, 2, 6, 3],
        cu_seqlens_q=[0, 1, 3, 9, 12],
    )
    prefill, decode = paddle.zeros([12, 2, 512]), paddle.ones([12, 2, 512])
    arguments = (*_lengths(step), step["cu_seqlens_q"])
    _gpu().merge_prefill_decode_output(prefill, decode, *arguments, 2 * 4, 128, 1)
    # row 2 has six tokens, of which four are covered
    assert prefill[:, 0, 0].tolist() == [1, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="head_dim"):
        _gpu().merge_prefill_decode_output(prefill, decode, *arguments, 2, 512, 1)


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("tree", ["develop", "fused"])
def test_rotation_is_in_place_and_takes_the_tree_s_positions(tree: str, is_neox: bool) -> None:
    with installed(TREES[tree]):
        table = random(5).standard_normal((7, 8)).astype(np.float32)
        q = random(6).standard_normal((3, 2, 12)).astype(np.float32)
        k = random(7).standard_normal((3, 1, 8)).astype(np.float32)
        positions = paddle.to_tensor([4, 0, 6], dtype=TREES[tree].position_dtype)
        query, key = paddle.to_tensor(q), paddle.to_tensor(k)
        cache = paddle.to_tensor(table)
        _gpu().fused_rotary_position_encoding(query, key, positions, cache, 8, is_neox)
        for values, rotated in ((q, query), (k, key)):
            for t, position in enumerate((4, 0, 6)):
                for h in range(values.shape[1]):
                    expected = values[t, h].copy()
                    expected[:8] = _rotated(values[t, h, :8], table[position], not is_neox)
                    assert np.allclose(rotated[t, h].numpy(), expected, atol=1e-5)
        wrong = positions.astype("int32" if tree == "fused" else "int64")
        with pytest.raises(ValueError, match="position_ids"):
            _gpu().fused_rotary_position_encoding(query, key, wrong, cache, 8, is_neox)


def _rotated(x: np.ndarray, row: np.ndarray, interleaved: bool) -> np.ndarray:
    """The oracle on a row of cos and sin that need not be those of an angle."""
    cos, sin = np.split(row, 2)
    angles, radius = np.arctan2(sin, cos), np.hypot(sin, cos)
    turned = ref_rotate(x, angles, interleaved)
    return turned * (np.repeat(radius, 2) if interleaved else np.tile(radius, 2))


def test_groups_are_quantised_with_powers_of_two(develop: None) -> None:
    from fastdeploy._arrays import host
    from fastdeploy.model_executor.layers.quantization.fp8_utils import per_token_group_quant_fp8

    x = random(8).standard_normal((3, 256)).astype(np.float32)
    codes, scales = per_token_group_quant_fp8(
        paddle.to_tensor(x), 128, column_major_scales=False, use_ue8m0=True
    )
    assert str(codes.dtype) == "paddle.float8_e4m3fn" and scales.shape == [3, 2]
    for row in range(3):
        for group in range(2):
            expected, scale = ref_index_key(x[row, 128 * group : 128 * group + 128], "ue8m0")
            assert np.array_equal(host(codes)[row, 128 * group : 128 * group + 128], expected)
            assert scales[row, group].item() == scale and math.frexp(float(scale))[0] == 0.5


@pytest.mark.parametrize("form", ["guard", "no_torch", "driver_swap"])
def test_wrappers_of_triton_kernels(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    class Kernel:
        def __getitem__(self, grid: Any) -> Callable[[], None]:
            return lambda: seen.append(len(sys.meta_path))

    with installed(replace(DEVELOP, triton_wrapper=form)):
        from fastdeploy.model_executor.ops.triton_ops import triton_utils

        monkeypatch.setattr(triton_utils, "_torch_is_installed", lambda: False)
        kernel = Kernel()
        before = len(sys.meta_path)
        wrapped = triton_utils.enable_compat_on_triton_kernel(kernel)
        wrapped[(1,)]()
        # imports of torch are redirected around each launch, or not at all
        assert seen == [before + (form == "guard")] and len(sys.meta_path) == before
        assert (wrapped is kernel) == (form != "guard")
