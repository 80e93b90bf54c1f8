"""The double's runner: states of rows, and what a step is given."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import paddle
import pytest

from fd_dsa.config import demo_model_path
from tests.fakes import golden
from tests.fakes.trees import DEVELOP, UPSTREAM_ENV, V1_VARIABLE, installed

ROWS = ("seq_lens_encoder", "seq_lens_decoder", "seq_lens_this_time_buffer")


@pytest.fixture
def develop() -> Iterator[None]:
    with installed(DEVELOP):
        yield


def make_runner(**overrides: Any) -> Any:
    """A runner without a model."""
    from fastdeploy.config import fd_config
    from fastdeploy.worker.gpu_worker import GpuWorker

    sizes = {"max_model_len": 256, "max_num_seqs": 4, "max_num_batched_tokens": 64}
    worker = GpuWorker(fd_config(demo_model_path(), **{**sizes, **overrides}))
    worker.init_device()
    return worker.model_runner


def task(kind: str, row: int = 1, **fields: Any) -> Any:
    from fastdeploy.engine.request import Request, RequestType

    return Request(idx=row, task_type=RequestType[kind], **fields)


# (encoder, decoder, this_time), prompt_lens, sampled -> the same after the step, stopped
TRANSITIONS = {
    "the prompt's end": ((100, 0, 100), 100, [5], (0, 100, 1), False),
    "a chunk": ((40, 0, 40), 100, [], (0, 0, 0), True),
    "the last chunk": ((60, 40, 60), 100, [5], (0, 100, 1), False),
    "decode": ((0, 110, 1), 100, [6], (0, 111, 1), False),
    "drafts, two accepted": ((0, 110, 4), 100, [6, 7], (0, 112, 1), False),
    "no block for the next token": ((0, 127, 1), 100, [6], (0, 0, 0), True),
}


def test_rows_after_a_step(develop: None) -> None:
    """custom_ops/gpu_ops/update_inputs_v1.cu."""
    from fastdeploy.model_executor.pre_and_post_process import set_row, update_inputs_v1

    runner = make_runner()
    share = runner.share_inputs
    for name, (before, prompt_len, sampled, after, stopped) in TRANSITIONS.items():
        runner.insert_tasks_v1([task("DECODE", block_tables=[2, 3])], 2)
        set_row(share, 1, before, stopped=False)
        share["prompt_lens"][1] = prompt_len
        share["is_block_step"][1] = False
        update_inputs_v1(share, {1: sampled}, 64)
        state = tuple(int(share[one].numpy().reshape(-1)[1]) for one in ROWS)
        assert (state, bool(share["stop_flags"].numpy()[1, 0])) == (after, stopped), name
        if sampled and not stopped:
            assert share["input_ids"].numpy()[1, 0] == sampled[-1]
        blocked = bool(share["is_block_step"].numpy()[1])
        assert blocked == (name == "no block for the next token")


@pytest.mark.parametrize("launched", [13, 16])
def test_tokens_of_a_step_are_packed(develop: None, launched: int) -> None:
    """custom_ops/gpu_ops/get_padding_offset.cu, on the worked step."""
    from fastdeploy.model_executor.pre_and_post_process import pre_process

    ids = paddle.to_tensor(np.arange(5 * 8).reshape(5, 8))
    drafts = paddle.to_tensor(-np.arange(5 * 4).reshape(5, 4))
    now, encoder, decoder = (
        paddle.to_tensor(lengths, dtype="int32")
        for lengths in (golden.THIS_TIME, golden.ENCODER, golden.DECODER)
    )
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
        lengths = [step[f"seq_lens_{name}"] for name in ("encoder", "decoder", "this_time")]
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


def test_forward_meta_has_the_running_rows(develop: None) -> None:
    runner = make_runner()
    runner.num_gpu_blocks = 8
    runner.initialize_kv_cache()
    ids = {"prompt_token_ids": list(range(10, 110)), "prefill_end_index": 9, "block_tables": [5]}
    runner.insert_tasks_v1([task("PREFILL", row=0, **ids)], 1)
    runner._prepare_inputs()
    meta = runner.forward_meta
    assert meta.seq_lens_encoder.shape == meta.seq_lens_this_time.shape == [1]
    assert meta.block_tables.shape[0] == 1
    # the runner makes them after that
    assert meta.position_ids is None
    runner._pad_and_place()
    assert meta.position_ids.tolist() == list(range(9))
    assert meta.slot_mapping.tolist() == list(range(5 * 64, 5 * 64 + 9))


@pytest.mark.parametrize("v1", ["1", "0"])
def test_who_makes_the_caches_decides_their_dtype(v1: str) -> None:
    """Bytes from the V1 cache manager; of the model's dtype from the runner since #8060."""
    with installed(DEVELOP, {**UPSTREAM_ENV, V1_VARIABLE: v1}):
        from fastdeploy.spec_decode import MTPProposer

        runner = make_runner()
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
