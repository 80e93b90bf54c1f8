"""The double's FlashMLA and DeepGEMM: numbers against loops, and what the real ones refuse."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import paddle
import pytest

from tests.fakes.trees import DEVELOP, installed
from tests.ops.e4m3 import E4M3_VALUES
from tests.reference.fp8 import ref_index_key, ref_record
from tests.reference.indexer import ref_score
from tests.reference.sparse_mla import ref_attend

random = np.random.default_rng
_VALUES = np.array([float(value) for value in E4M3_VALUES], np.float32)
SCALE = 0.1


def _latents(seed: int, num_blocks: int) -> tuple[Any, np.ndarray]:
    """A cache of random records, and their values float32 [slots, 576]."""
    normal = random(seed).standard_normal((num_blocks * 64, 576)).astype(np.float32)
    records = np.stack([ref_record(row[:512], row[512:]) for row in normal])
    scales = records[:, 512:528].copy().view(np.float32).repeat(128, axis=1)
    rope = records[:, 528:].copy().view(np.uint16).astype(np.uint32) << 16
    values = np.concatenate([_VALUES[records[:, :512]] * scales, rope.view(np.float32)], axis=1)
    return paddle.to_tensor(records.reshape(num_blocks, 64, 1, 656)), values


def _queries(seed: int, *shape: int) -> Any:
    return paddle.to_tensor(random(seed).standard_normal(shape).astype(np.float32))


def _decode(q: Any, cache: Any, indices: Any, schedule: Any, **more: Any) -> Any:
    import flash_mla

    return flash_mla.flash_mla_with_kvcache(
        q,
        cache,
        tile_scheduler_metadata=schedule,
        softmax_scale=SCALE,
        is_fp8_kvcache=True,
        indices=paddle.to_tensor(np.int32(indices)),
        **more,
    )


def test_decode_is_softmax_over_the_chosen_slots() -> None:
    with installed(DEVELOP):
        import flash_mla

        cache, values = _latents(1, 2)
        q = _queries(2, 3, 1, 64, 576)
        indices = [[[5, 99, -1, 64]], [[-1, -1, -1, -1]], [[127, 127, 3, 0]]]
        schedule, _ = flash_mla.get_mla_metadata("whatever", ignored=1)
        out, lse = _decode(q, cache, indices, schedule)
        assert out.shape == [3, 1, 64, 512] and lse.shape == [3, 64, 1]
        for row in range(3):
            chosen = [slot for slot in indices[row][0] if slot >= 0]
            expected = ref_attend(q[row, 0].numpy(), values, chosen, SCALE, 512)
            assert np.allclose(out[row, 0].numpy(), expected, atol=1e-4)
            if chosen:
                logits = SCALE * (q[row, 0, 7].numpy() @ values[chosen].T)
                assert math.isclose(
                    lse[row, 7, 0].item(), np.log(np.exp(logits).sum()), rel_tol=1e-4
                )
        assert out[1].abs().max().item() == 0 and (lse[1] == math.inf).all().item()
        limited, _ = _decode(
            q, cache, indices, schedule, topk_length=paddle.to_tensor([1, 4, 2], dtype="int32")
        )
        expected = ref_attend(q[0, 0].numpy(), values, [5], SCALE, 512)
        assert np.allclose(limited[0, 0].numpy(), expected, atol=1e-4)


def test_a_schedule_is_made_once_and_kept_for_its_sizes() -> None:
    with installed(DEVELOP):
        import flash_mla
        from fastdeploy import _counters

        cache, _ = _latents(3, 1)
        schedule, _ = flash_mla.get_mla_metadata()
        for _ in range(3):
            _decode(_queries(4, 2, 1, 64, 576), cache, [[[0, 1]], [[2, 3]]], schedule)
        assert len(_counters.events("launch", "flash_mla_schedule")) == 1
        with pytest.raises(AssertionError, match="schedule of"):
            _decode(_queries(4, 1, 1, 64, 576), cache, [[[0, 1]]], schedule)


@pytest.mark.parametrize("heads", [16, 32, 64, 128])
def test_heads_are_64_or_128(heads: int) -> None:
    with installed(DEVELOP):
        import flash_mla

        cache, _ = _latents(5, 1)
        calls = (
            lambda: _decode(
                _queries(6, 1, 1, heads, 576), cache, [[[0]]], flash_mla.get_mla_metadata()[0]
            ),
            lambda: flash_mla.flash_mla_sparse_fwd(
                _queries(6, 1, heads, 576),
                _queries(7, 4, 1, 576),
                paddle.zeros([1, 1, 2], "int32"),
                SCALE,
            ),
        )
        for call in calls:
            if heads in (64, 128):
                call()
            else:
                with pytest.raises(RuntimeError, match="Unsupported h_q"):
                    call()


def test_prefill_attends_to_rows_of_the_keys_it_is_given() -> None:
    with installed(DEVELOP):
        import flash_mla

        q, kv = _queries(8, 2, 64, 576), _queries(9, 5, 1, 576)
        indices = [[[0, 4, -1]], [[5, 2, 77]]]
        out, largest, lse = flash_mla.flash_mla_sparse_fwd(
            q, kv, paddle.to_tensor(np.int32(indices)), SCALE
        )
        for t, chosen in enumerate(([0, 4], [2])):
            expected = ref_attend(q[t].numpy(), kv[:, 0].numpy(), chosen, SCALE, 512)
            assert np.allclose(out[t].numpy(), expected, atol=1e-4)
        assert np.allclose(lse[1].numpy(), largest[1].numpy())


def test_the_older_flash_mla_takes_its_schedule_as_tensors() -> None:
    with installed(replace(DEVELOP, flash_mla="2025")):
        import flash_mla

        cache, values = _latents(10, 1)
        lengths = paddle.to_tensor([9], dtype="int32")
        schedule, splits = flash_mla.get_mla_metadata(lengths, 64, 1, 64, True, 2)
        q = _queries(11, 1, 1, 64, 576)
        indices = paddle.to_tensor([[[8, 1]]], dtype="int32")
        out, _ = flash_mla.flash_mla_with_kvcache(
            q, cache, None, lengths, 512, schedule, splits, SCALE, False, True, indices
        )
        expected = ref_attend(q[0, 0].numpy(), values, [8, 1], SCALE, 512)
        assert np.allclose(out[0, 0].numpy(), expected, atol=1e-4)
        with pytest.raises(TypeError):
            flash_mla.flash_mla_with_kvcache(q, cache)


class _Keys:
    """Random quantised queries and keys, and their values."""

    def __init__(self, seed: int, num_queries: int, num_keys: int, heads: int) -> None:
        from fastdeploy._arrays import tensor_of

        q = random(seed).integers(0, 112, (num_queries, heads, 128)).astype(np.uint8)
        keys = random(seed + 1).standard_normal((num_keys, 128)).astype(np.float32)
        pairs = [ref_index_key(key, "ue8m0") for key in keys]
        codes = np.stack([pair[0] for pair in pairs])
        scales = np.float32([pair[1] for pair in pairs])
        self.weights = random(seed + 2).standard_normal((num_queries, heads)).astype(np.float32)
        self.q_values, self.key_values = _VALUES[q], _VALUES[codes] * scales[:, None]
        place = paddle.CPUPlace()
        self.q = tensor_of(q, place, "float8_e4m3fn")
        self.kv = tensor_of(codes, place, "float8_e4m3fn"), paddle.to_tensor(scales)
        self.codes, self.scales = codes, scales

    def score(self, query: int, key: int) -> float:
        return ref_score(self.q_values[query], self.weights[query], self.key_values[key])

    def cache(self, slots: list[int], num_blocks: int) -> Any:
        """An indexer cache [N, 64, 1, 132] with key i at slots[i]."""
        cache = np.zeros((num_blocks, 8448), np.uint8)
        for i, slot in enumerate(slots):
            block, row = divmod(slot, 64)
            cache[block, row * 128 : row * 128 + 128] = self.codes[i]
            scale = self.scales[i : i + 1].view(np.uint8)
            cache[block, 8192 + row * 4 : 8196 + row * 4] = scale
        return paddle.to_tensor(cache.reshape(num_blocks, 64, 1, 132))


def _int32(values: Any) -> Any:
    return paddle.to_tensor(np.int32(values))


@pytest.mark.parametrize("variant", ["2025", "bundled", "2026", "2026_fp4"])
def test_logits_of_packed_keys(variant: str) -> None:
    with installed(replace(DEVELOP, deep_gemm=variant)):
        import deep_gemm

        keys = _Keys(20, 3, 9, 32)
        starts, ends = [0, 2, 5], [4, 9, 5]
        fp4 = variant == "2026_fp4"
        call = deep_gemm.fp8_fp4_mqa_logits if fp4 else deep_gemm.fp8_mqa_logits
        q = (keys.q, None) if fp4 else keys.q
        arguments = (q, keys.kv, paddle.to_tensor(keys.weights), _int32(starts), _int32(ends))
        logits = call(*arguments).numpy()
        assert logits.shape == (3, 9)
        for t in range(3):
            for key in range(9):
                if starts[t] <= key < ends[t]:
                    assert math.isclose(
                        logits[t, key], keys.score(t, key), rel_tol=1e-4, abs_tol=1e-3
                    )
                else:
                    assert logits[t, key] == -math.inf
        if variant == "2025":
            with pytest.raises(TypeError):
                call(*arguments, clean_logits=False, max_seqlen_k=7)
            return
        relative = call(*arguments, clean_logits=False, max_seqlen_k=7).numpy()
        assert relative.shape == (3, 7)
        assert math.isclose(relative[1, 6], keys.score(1, 8), rel_tol=1e-4, abs_tol=1e-3)
        assert np.isnan(relative[0, 4:]).all() and np.isnan(relative[2]).all()
        with pytest.raises(RuntimeError, match="cleaned"):
            call(*arguments, max_seqlen_k=7)


def test_bounds_of_packed_keys_are_contiguous() -> None:
    with installed(DEVELOP):
        import deep_gemm

        keys = _Keys(21, 2, 3, 32)
        both = _int32([[0, 1], [0, 2]])
        with pytest.raises(RuntimeError, match="contiguous"):
            deep_gemm.fp8_mqa_logits(
                keys.q, keys.kv, paddle.to_tensor(keys.weights), both[:, 0], both[:, 1]
            )


@pytest.mark.parametrize("variant", ["2025", "bundled", "2026", "2026_fp4"])
def test_logits_of_pages(variant: str) -> None:
    with installed(replace(DEVELOP, deep_gemm=variant)):
        import deep_gemm

        lengths, tables = [70, 2], [[3, 1], [0, -1]]
        slots = [tables[0][p // 64] * 64 + p % 64 for p in range(70)] + [0, 1]
        keys = _Keys(22, 4, 72, 32)
        one_length = variant in ("2025", "bundled")
        windows = [[69, 70], [1, 2]]
        context = _int32(lengths if one_length else windows)
        schedule = deep_gemm.get_paged_mqa_logits_metadata(context, 64, deep_gemm.get_num_sms())
        fp4 = variant == "2026_fp4"
        call = deep_gemm.fp8_fp4_paged_mqa_logits if fp4 else deep_gemm.fp8_paged_mqa_logits
        q = keys.q.reshape([2, 2, 32, 128])
        arguments = (
            (q, None) if fp4 else q,
            keys.cache(slots, 4),
            paddle.to_tensor(keys.weights),
            context,
            _int32(tables),
            schedule,
            100,
        )
        logits = call(*arguments).numpy()
        assert logits.shape == (4, 100)
        for query in range(4):
            row, first = query // 2, (0, 70)[query // 2]
            seen = windows[row][query % 2]
            for position in range(seen):
                expected = keys.score(query, first + position)
                assert math.isclose(logits[query, position], expected, rel_tol=1e-4, abs_tol=1e-3)
            assert np.isnan(logits[query, seen:]).all()
        if one_length:
            assert (call(*arguments, clean_logits=True).numpy()[2, 1:] == -math.inf).all()
        else:
            with pytest.raises(RuntimeError, match="clean_logits"):
                call(*arguments, clean_logits=True)
        other_rank = _int32(windows if one_length else lengths)
        with pytest.raises(RuntimeError, match="context_lens"):
            deep_gemm.get_paged_mqa_logits_metadata(other_rank, 64, 132)


def test_pages_take_32_or_64_heads_of_blocks_of_64() -> None:
    with installed(DEVELOP):
        import deep_gemm

        keys = _Keys(23, 1, 2, 16)
        context = _int32([2])
        schedule = deep_gemm.get_paged_mqa_logits_metadata(context, 64, 132)
        with pytest.raises(RuntimeError, match="heads"):
            deep_gemm.fp8_paged_mqa_logits(
                keys.q.reshape([1, 1, 16, 128]),
                keys.cache([0, 1], 1),
                paddle.to_tensor(keys.weights),
                context,
                _int32([[0]]),
                schedule,
                2,
            )
        with pytest.raises(RuntimeError, match="block_kv"):
            deep_gemm.get_paged_mqa_logits_metadata(context, 32, 132)
