"""The double's operators on the worked step, and its caches."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import paddle
import pytest

from fd_dsa.config import demo_model_path
from tests.fakes import golden
from tests.fakes.trees import DEVELOP, UPSTREAM_ENV, V1_VARIABLE, installed

LENGTHS = ("encoder", "decoder")


@pytest.mark.parametrize("launched", [13, 16])
def test_tokens_of_a_step_are_packed(launched: int) -> None:
    """custom_ops/gpu_ops/get_padding_offset.cu, on the worked step."""
    step = golden.tensors()
    now, encoder, decoder = (step[f"seq_lens_{name}"] for name in ("this_time", *LENGTHS))
    ids = paddle.to_tensor(np.arange(5 * 8).reshape(5, 8))
    drafts = paddle.to_tensor(-np.arange(5 * 4).reshape(5, 4))
    with installed(DEVELOP):
        from fastdeploy.model_executor.pre_and_post_process import pre_process

        packed, rows, cu_q, cu_k = pre_process(launched, ids, now, True, drafts, encoder, decoder)
    expected = [0, 8, 9, 10, 11, 12, 24, 25, 26, 27, -16, -17, -18]
    assert packed.tolist() == expected + [2] * (launched - 13)
    assert rows.tolist() == golden.BATCH_IDS + [-1] * (launched - 13)
    assert cu_q.tolist() == golden.CU_SEQLENS_Q and cu_k.tolist() == golden.CU_SEQLENS_K


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_positions_and_slots_of_the_worked_step(dtype: str) -> None:
    """Memory past the last position stays as it was; slots of padding wrap to the last row."""
    with installed(replace(DEVELOP, position_dtype=dtype)):
        from fastdeploy.model_executor.ops.gpu import get_position_ids_and_mask_encoder_batch
        from fastdeploy.worker._runner_step import compute_slot_mapping

        step = golden.tensors()
        lengths = [step[f"seq_lens_{name}"] for name in (*LENGTHS, "this_time")]
        positions = paddle.full([15], 3, dtype)
        get_position_ids_and_mask_encoder_batch(*lengths, positions)
        assert positions.tolist() == [*golden.POSITIONS, 3, 3]
        with pytest.raises(TypeError):
            get_position_ids_and_mask_encoder_batch(*lengths, positions, positions)
        other = positions.astype("int64" if dtype == "int32" else "int32")
        with pytest.raises(ValueError, match="position_ids is"):
            get_position_ids_and_mask_encoder_batch(*lengths, other)
        batch_ids = paddle.to_tensor([*golden.BATCH_IDS, -1], dtype="int32")
        places = positions[:14].astype("int32")
        slots = compute_slot_mapping(step["block_tables"], places, batch_ids, 64)
        # -1 is the last row, whose first block is 3
        assert slots.tolist() == [*golden.SLOTS, 3 * 64 + 3]


@pytest.mark.parametrize("v1", ["1", "0"])
def test_who_makes_the_caches_decides_their_dtype(v1: str) -> None:
    """Bytes from the V1 cache manager; of the model's dtype from the runner since #8060."""
    with installed(DEVELOP, {**UPSTREAM_ENV, V1_VARIABLE: v1}):
        from fastdeploy.config import fd_config
        from fastdeploy.spec_decode import MTPProposer
        from fastdeploy.worker.gpu_worker import GpuWorker

        worker = GpuWorker(fd_config(demo_model_path(), max_model_len=256))
        worker.init_device()
        runner = worker.model_runner
        runner.num_gpu_blocks = 8
        runner.initialize_kv_cache()
        caches = runner.share_inputs["caches"]
        assert len(caches) == 2 * runner.model_config.num_hidden_layers
        dtype = "paddle.uint8" if v1 == "1" else "paddle.float32"
        assert {str(cache.dtype) for cache in caches} == {dtype}
        assert [cache.shape[-1] for cache in caches[:2]] == [656, 132]
        if v1 == "1":
            runner.attn_backends.pop()
            with pytest.raises(ValueError, match="attention backends for"):
                runner.initialize_kv_cache()
            return
        # spec_decode/mtp.py cannot start with upstream's DSA backend either, without V1
        with pytest.raises(ValueError, match="too many values to unpack"):
            MTPProposer(runner.fd_config, runner, 0, 0, runner.share_inputs)
